"""What the critic's routes take and give, and from a request to what the critic judges."""

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from serve_apps.guard import ApiError
from serve_apps.remote_images import RequestImages
from sima_ray.config import ServiceConfig
from sima_ray.critic.judge import Case
from sima_ray.images import ImageProblem, read_header

_DATA_URL = re.compile(r"data:image/(?:jpeg|jpg|png|webp);base64,", re.IGNORECASE)

CASE = {
    "question": "What is on the table?",
    "ground_truth": "A red cup.",
    "responses": ["A red cup.", "Two green bottles."],
}
"""An example of a request, for `GET /openapi.json`."""

THREE = {**CASE, "responses": ["A red cup.", "Two green bottles.", "A cup."]}


def _sound(text: str) -> str:
    """Text that can be encoded (JSON can hold half a surrogate pair)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("is not valid Unicode") from error
    return text


Text = Annotated[str, AfterValidator(_sound)]
Filled = Annotated[str, Field(min_length=1), AfterValidator(_sound)]


class CritiqueRequest(BaseModel):
    """Responses to judge: two, or more to rank."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [CASE, THREE]})

    image: str | None = Field(
        None,
        description="data:image/png;base64,… (JPEG, PNG or WebP), or a URL of one of service.image_origins.",
    )
    question: Filled
    ground_truth: Filled | None = Field(None, description="The answer known to be right.")
    responses: list[Text] = Field(
        min_length=2, description="Two, or up to service.max_responses, which are ranked."
    )


class BatchRequest(BaseModel):
    """Cases to judge, each by itself."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"cases": [CASE, THREE]}]}
    )

    # Each is checked by itself, so that a bad one spoils no other.
    cases: list[
        Annotated[Any, WithJsonSchema({"$ref": "#/components/schemas/CritiqueRequest"})]
    ] = Field(min_length=1, description="Up to service.max_cases.")


class OrderReport(BaseModel):
    """The verdict in one order: "12" shows the first response first."""

    order: Literal["12", "21"]
    reason: str
    findings: dict[str, str] = Field(
        description="The reason's parts under objects, relationships and attributes, where it is written so."
    )
    raw: str
    choice: Literal[1, 2] | None = Field(
        description="The number the chosen response was shown under; null: no verdict."
    )
    probability: float | None = Field(
        description="That the first response is better, in whichever place it was shown."
    )


class ComparisonReport(BaseModel):
    """The verdict on two of more than two responses."""

    responses: tuple[int, int] = Field(description="Their numbers, from 1.")
    winner: int | None = Field(description="The number of the better one; null is a tie.")
    consistent: bool = Field(description="Whether both orders gave the same verdict.")
    outcome: str
    probability: float | None = Field(description="That the first of the two is better.")
    orders: list[OrderReport]


class CritiqueReport(BaseModel):
    """The verdict over both orders; of more than two responses, over both orders of every pair."""

    winner: int | None = Field(
        description="The number, from 1, of the better response; of more than two, of the one that is better "
        "than every other; null: there is none."
    )
    consistent: bool = Field(
        description="Whether both orders gave the same verdict, of every pair."
    )
    outcome: str = Field(
        description="Of two: preferred_first, preferred_second, inconsistent, unparseable or identical; of "
        "more: preferred, undecided or identical."
    )
    probability: float | None = Field(
        description="Of two: that the first is better, the mean of both orders; 0.5 where they say the same; "
        "null where the policy does not tell."
    )
    ranking: list[int] = Field(
        description="All numbers, best first: by comparisons won (a tie counts half), then by the sum of the "
        "probabilities, then as they were given."
    )
    agreement: float = Field(description="Share of the comparisons whose two orders agree.")
    orders: list[OrderReport] = Field(
        description="Of two; empty for more, and where they say the same."
    )
    comparisons: list[ComparisonReport] = Field(description="Of more than two; else empty.")
    model_version: str
    prompt_version: str
    tokens: int = Field(description="Generated, over all critiques.")
    prompt_tokens: int = Field(description="Read, over all critiques, those of the image included.")
    cached_tokens: int = Field(description="Of those read: found in the engine's prefix cache.")
    seconds: float


class ErrorWords(BaseModel):
    """What is wrong with a case."""

    code: str
    message: str


class CaseError(BaseModel):
    """In place of a report."""

    error: ErrorWords


class BatchReport(BaseModel):
    """One result a case, in the order of the cases."""

    results: list[CritiqueReport | CaseError]


@dataclass(frozen=True, slots=True)
class Contest:
    """Two or more responses to one question; see `Case`."""

    image: bytes | None
    question: str
    ground_truth: str | None
    responses: tuple[str, ...]

    def case(self, first: int, second: int) -> Case:
        """Two of the responses, by their indices."""
        pair = (self.responses[first], self.responses[second])
        return Case(self.image, self.question, self.ground_truth, pair)


async def to_contest(
    request: CritiqueRequest, service: ServiceConfig, remote: RequestImages
) -> Contest:
    """Check what the types cannot: numbers, lengths and the image.

    Raises:
        ApiError: 422.
    """
    if len(request.responses) > service.max_responses:
        raise invalid(f"responses: over the {service.max_responses} allowed")
    texts = {"question": request.question, "ground_truth": request.ground_truth or ""}
    texts |= {f"responses.{n}": text for n, text in enumerate(request.responses)}
    check_lengths(texts, service)
    url = request.image
    image = None if url is None else await image_bytes(url, service, remote)
    return Contest(image, request.question, request.ground_truth, tuple(request.responses))


def check_lengths(texts: dict[str, str], service: ServiceConfig) -> None:
    """Refuse a text that is too long; the names are for the message.

    Raises:
        ApiError: 422.
    """
    for name, text in texts.items():
        if len(text) > service.max_text_chars:
            raise invalid(f"{name}: over the {service.max_text_chars:,} characters allowed")


async def image_bytes(url: str, service: ServiceConfig, remote: RequestImages) -> bytes:
    """The bytes of an image's URL. Its header is checked here; the policy decodes it.

    Args:
        url: The image itself (`data:`), or where it is.
        service: The limits.
        remote: Fetches what is elsewhere, if that is allowed.

    Raises:
        ApiError: 422.
    """
    data = _decoded(url) if is_inline(url) else await remote.get(url)
    try:
        read_header(data, service.max_image_pixels)
    except ImageProblem as problem:
        raise invalid(f"image: {problem}") from problem
    return data


def is_inline(url: str) -> bool:
    """Whether a URL is the image itself."""
    return url[:5].lower() == "data:"


def _decoded(url: str) -> bytes:
    prefix = _DATA_URL.match(url)
    if prefix is None:
        raise invalid("image: must be a data:image/(jpeg|png|webp);base64, URL")
    try:
        return base64.b64decode(url[prefix.end() :], validate=True)
    except (binascii.Error, ValueError) as problem:
        raise invalid("image: not valid base64") from problem


def invalid(message: str) -> ApiError:
    """A request that can never succeed."""
    return ApiError(422, "invalid_request", message)


def in_words(errors: Sequence[Any]) -> str:
    """The first of pydantic's errors: where, and what."""
    return "; ".join(
        f"{'.'.join(str(place)[:100] for place in e['loc'] if place != 'body') or 'body'}: "
        f"{str(e['msg']).removeprefix('Value error, ')}"
        for e in errors[:5]
    )

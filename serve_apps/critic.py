"""The critic's Serve application: `POST /v1/critique` judges two responses to a question about an image.

Imports no engine, and is up in seconds: it asks the policy's deployment.
"""

import asyncio
import base64
import binascii
import math
import re
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from starlette.exceptions import HTTPException

from serve_apps.guard import ApiError, App, Guard, Limits, Quota, Tokens, error_response
from serve_apps.shared_quota import shared_quota
from sima_ray.config import CriticConfig, Section, ServiceConfig
from sima_ray.critic.judge import Case, RequestRefused, critique
from sima_ray.critic.prompt import CriticPrompt, Layout, load_examples
from sima_ray.critic.vote import decide, identical
from sima_ray.errors import ServiceError
from sima_ray.images import ImageProblem, read_header
from sima_ray.ports import Policy, text_part
from sima_ray.records import ORDERS, Critique, Outcome
from sima_ray.runtime.client import HandlePolicy

DEPLOYMENT = "Critic"

RETRIES = 2
"""Of a critique's calls to the policy: a person waits; a client that can wait longer retries by itself."""

_DATA_URL = re.compile(r"data:image/(?:jpeg|jpg|png|webp);base64,", re.IGNORECASE)


class CriticApp(Section):
    """What `build_app` takes."""

    critic: CriticConfig = CriticConfig()
    service: ServiceConfig = ServiceConfig()
    policy: str = Field("policy", description="The Serve application to ask.")
    token_hashes: list[str] = Field(
        default_factory=list,
        description="SHA-256 of each token, in hex; see also service.token_file.",
    )
    without_token: bool = Field(False, description="Answer anybody.")


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
    """Two responses to judge."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "question": "What is on the table?",
                    "ground_truth": "A red cup.",
                    "responses": ["A red cup.", "Two green bottles."],
                }
            ]
        },
    )

    image: str | None = Field(
        None, description="data:image/png;base64,… (JPEG, PNG or WebP). Nothing is ever fetched."
    )
    question: Filled
    ground_truth: Filled | None = Field(None, description="The answer known to be right.")
    responses: list[Text] = Field(min_length=2, max_length=2)


class OrderReport(BaseModel):
    """The verdict in one order: "12" shows the first response first."""

    order: Literal["12", "21"]
    reason: str
    raw: str
    choice: Literal[1, 2] | None = Field(
        description="The number the chosen response was shown under; null: no verdict."
    )


class CritiqueReport(BaseModel):
    """The verdict over both orders."""

    winner: Literal[1, 2] | None = Field(description="The better response; null is a tie.")
    consistent: bool = Field(description="Whether both orders gave the same verdict.")
    outcome: str
    orders: list[OrderReport]
    model_version: str
    prompt_version: str
    tokens: int = Field(description="Generated, over both orders.")
    seconds: float


class Judge:
    """Both orders of a critique, at once."""

    def __init__(self, policy: Policy, config: CriticConfig) -> None:
        examples = load_examples(Path(config.examples)) if config.examples else load_examples()
        self._policy, self._max_tokens = policy, config.max_tokens
        self._prompt = CriticPrompt(Layout(config.layout), examples)

    async def judge(self, case: Case) -> CritiqueReport:
        """Judge one case.

        Raises:
            RequestRefused: Never to succeed.
            ServiceError: The policy is not reachable.
        """
        start = time.perf_counter()
        critiques: list[Critique] = []
        if not identical(*case.responses):
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(
                        critique(self._policy, self._prompt, case, order, self._max_tokens)
                    )
                    for order in ORDERS
                ]
            critiques = [task.result() for task in tasks]
        return self._report(decide(case.responses, critiques), critiques, start)

    def _report(self, outcome: Outcome, critiques: list[Critique], start: float) -> CritiqueReport:
        winners: dict[Outcome, Literal[1, 2]] = {
            Outcome.PREFERRED_FIRST: 1,
            Outcome.PREFERRED_SECOND: 2,
        }
        return CritiqueReport(
            winner=winners.get(outcome),
            consistent=outcome.is_preference or outcome is Outcome.IDENTICAL,
            outcome=outcome.value,
            orders=[
                OrderReport(order=c.order, reason=c.reason, raw=c.raw, choice=c.choice)
                for c in critiques
            ],
            model_version="+".join(sorted({c.model_version for c in critiques})),
            prompt_version=self._prompt.version,
            tokens=sum(c.tokens for c in critiques),
            seconds=round(time.perf_counter() - start, 4),
        )


class Readiness:
    """Whether the policy answers; asked at most every few seconds, since anybody may ask."""

    def __init__(self, policy: Policy, every_s: float = 5.0) -> None:
        self._policy, self._every_s = policy, every_s
        self._lock, self._asked, self._ready = asyncio.Lock(), -math.inf, False

    async def check(self) -> bool:
        """The last answer, or a new one when that is too old."""
        async with self._lock:
            if time.monotonic() - self._asked > self._every_s:
                self._ready = await self._ask()
                self._asked = time.monotonic()
            return self._ready

    async def _ask(self) -> bool:
        try:
            async with asyncio.timeout(self._every_s):
                await self._policy.complete(
                    {"content": [text_part("?")], "max_tokens": 1, "temperature": 0.0}
                )
        except (ServiceError, TimeoutError):
            return False
        return True


def make_app(settings: CriticApp, policy: Policy, quota: Quota | None = None) -> App:
    """The guarded ASGI application; `policy` is whatever answers, `quota` knows what each token may ask."""
    api = FastAPI(title="sima-ray critic", docs_url=None, redoc_url=None, redirect_slashes=False)
    judge, service = Judge(policy, settings.critic), settings.service

    @api.post("/v1/critique")
    async def post_critique(request: CritiqueRequest) -> CritiqueReport:
        """Judge two responses, in both orders."""
        case = to_case(request, service)
        try:
            async with asyncio.timeout(service.request_timeout_s):
                return await judge.judge(case)
        except TimeoutError as error:
            raise ApiError(504, "timeout", "no verdict in time") from error
        except ExceptionGroup as group:
            raise _in_words(group.exceptions[0]) from group

    readiness = Readiness(policy)

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether this process answers."""
        return {"status": "ok"}

    @api.get("/readyz")
    async def readyz() -> dict[str, str]:
        """Whether the policy answers too."""
        if not await readiness.check():
            raise ApiError(503, "unavailable", "the policy does not answer", {"Retry-After": "2"})
        return {"status": "ready"}

    _answer_errors(api)
    tokens = Tokens(settings.token_hashes, service.token_file, settings.without_token)
    return Guard(api, tokens, Limits.of(service), quota)


def to_case(request: CritiqueRequest, service: ServiceConfig) -> Case:
    """Check what the types cannot: lengths and the image.

    Raises:
        ApiError: 422.
    """
    texts = {
        "question": request.question,
        "ground_truth": request.ground_truth or "",
        "responses.0": request.responses[0],
        "responses.1": request.responses[1],
    }
    for name, text in texts.items():
        if len(text) > service.max_text_chars:
            raise _invalid(f"{name}: over the {service.max_text_chars:,} characters allowed")
    image = None if request.image is None else _image(request.image, service.max_image_pixels)
    first, second = request.responses
    return Case(image, request.question, request.ground_truth, (first, second))


def _image(url: str, max_pixels: int) -> bytes:
    """The bytes of an image's data URL. Its header is checked here; the policy decodes it."""
    prefix = _DATA_URL.match(url)
    if prefix is None:
        raise _invalid("image: must be a data:image/(jpeg|png|webp);base64, URL")
    try:
        data = base64.b64decode(url[prefix.end() :], validate=True)
        read_header(data, max_pixels)
    except (binascii.Error, ValueError) as problem:
        words = problem if isinstance(problem, ImageProblem) else "not valid base64"
        raise _invalid(f"image: {words}") from problem
    return data


def _in_words(error: BaseException) -> ApiError:
    """What a caller may know about a failure."""
    match error:
        case RequestRefused():
            return _invalid(str(error))
        case ServiceError() | TimeoutError():
            return ApiError(
                503,
                "unavailable",
                "the policy does not answer now; try again",
                {"Retry-After": "2"},
            )
        case _:
            raise error


def _invalid(message: str) -> ApiError:
    return ApiError(422, "invalid_request", message)


def _answer_errors(api: FastAPI) -> None:
    """One shape for all errors, and no internals in them."""

    def answer(request: Request, error: ApiError) -> Response:
        status, headers, body = error_response(error, request.state.request_id)
        return Response(body, status, {**headers, "x-sima-error": "1"})

    @api.exception_handler(ApiError)
    async def ours(request: Request, error: ApiError) -> Response:
        return answer(request, error)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        problems = [
            f"{'.'.join(str(place)[:100] for place in e['loc'] if place != 'body') or 'body'}: "
            f"{str(e['msg']).removeprefix('Value error, ')}"
            for e in error.errors()[:5]
        ]
        return answer(request, _invalid("; ".join(problems)))

    @api.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        codes = {404: "not_found", 405: "method_not_allowed", 400: "bad_request"}
        code = codes.get(error.status_code, "http_error")
        headers = dict(error.headers or {})  # which methods a route has
        return answer(request, ApiError(error.status_code, code, code.replace("_", " "), headers))


class Critic:
    """The deployment: the application over the policy's handle."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = CriticApp.model_validate(settings)

    def __serve_build_asgi_app__(self) -> App:
        settings = self._settings
        timeout_s = settings.service.request_timeout_s
        policy = HandlePolicy(settings.policy, RETRIES, timeout_s)
        return make_app(settings, policy, shared_quota(settings.service))


def build_app(settings: CriticApp) -> Application:
    """Build the application, for `serve deploy` and `deploy_critic`."""
    service = settings.service
    deployment: Any = serve.deployment(
        serve.ingress()(Critic),
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": 0.1},
        # Beyond the guard's own limit, so that it is the guard that says 503, in our words.
        max_ongoing_requests=service.max_ongoing_requests + 64,
        max_queued_requests=service.max_queued_requests,
        autoscaling_config={
            "min_replicas": max(1, service.min_replicas),
            "max_replicas": service.max_replicas,
            "target_ongoing_requests": service.target_ongoing_requests,
            "upscale_delay_s": service.upscale_delay_s,
            "downscale_delay_s": service.downscale_delay_s,
        },
    )
    return deployment.bind(settings.model_dump(mode="json"))


__all__ = ["CriticApp", "CritiqueReport", "CritiqueRequest", "Judge", "build_app", "make_app"]

"""What is sent: a case, its image sniffed and its size known before a byte leaves."""

import base64
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sima_ray.client.errors import CaseRefused

MAX_BODY_BYTES = 20_000_000
"""What the service takes by default (`policy.service.max_body_bytes`)."""

URLS = ("data:", "http://", "https://")
"""How an image starts that is no path."""

ImageSource = str | os.PathLike[str] | bytes | None


@dataclass(frozen=True, slots=True)
class Case:
    """Responses to one question about one image.

    Attributes:
        question: What was asked.
        responses: Two, or more where the service ranks them.
        image: A path to a JPEG, PNG or WebP, its bytes, or a URL: `data:image/…`, or http(s) of an origin in the
            service's `image_origins`.
        ground_truth: The answer known to be right.
        id: Yours; it is not sent.
    """

    question: str
    responses: Sequence[str]
    image: ImageSource = None
    ground_truth: str | None = None
    id: str | None = None


def request_body(case: Case, max_bytes: int) -> bytes:
    """The JSON of one case.

    Raises:
        CaseRefused: It cannot be judged, or is too large.
    """
    return _encoded(_request(case, max_bytes), max_bytes)


def batch_body(cases: Sequence[Case], max_bytes: int) -> bytes:
    """The JSON of several cases in one request.

    Raises:
        CaseRefused: One of them cannot be judged, or all together are too large.
    """
    requests: list[dict[str, Any]] = []
    for number, case in enumerate(cases, 1):
        try:
            requests.append(_request(case, max_bytes))
        except CaseRefused as error:
            raise CaseRefused(f"case {number}: {error}", code=error.code) from error
    return _encoded({"cases": requests}, max_bytes)


def _request(case: Case, max_bytes: int) -> dict[str, Any]:
    responses: Any = case.responses
    if isinstance(responses, str) or not all(isinstance(text, str) for text in responses):
        raise CaseRefused("responses: give a list of texts", code="invalid_case")
    if len(responses) < 2:
        raise CaseRefused(f"{len(responses)} responses: give two or more", code="invalid_case")
    if not case.question:
        raise CaseRefused("question: is empty", code="invalid_case")
    request: dict[str, Any] = {"question": case.question, "responses": list(responses)}
    if case.ground_truth is not None:
        request["ground_truth"] = case.ground_truth
    if case.image is not None:
        request["image"] = image_url(case.image, max_bytes)
    return request


def _encoded(request: dict[str, Any], max_bytes: int) -> bytes:
    body = json.dumps(request, separators=(",", ":")).encode()
    if len(body) > max_bytes:
        raise _too_large("the request", len(body), max_bytes)
    return body


def image_url(image: str | os.PathLike[str] | bytes, max_bytes: int = MAX_BODY_BYTES) -> str:
    """An image as the service takes it. A URL stays as it is: the service says which it fetches.

    Raises:
        CaseRefused: It cannot be read, is no JPEG, PNG or WebP, or too large for one request.
    """
    if isinstance(image, str) and image.startswith(URLS):
        return image
    if isinstance(image, bytes):
        name, data = "image", image
        _check_size(name, len(data), max_bytes)
    else:
        name, data = os.fspath(image), _read(os.fspath(image), max_bytes)
    kind = image_kind(data)
    if kind is None:
        raise CaseRefused(
            f"{name}: not a JPEG, PNG or WebP: convert it first", code="invalid_image"
        )
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def image_kind(data: bytes) -> str | None:
    """ "jpeg", "png" or "webp" by the first bytes; None for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _read(name: str, max_bytes: int) -> bytes:
    path = Path(name)
    try:
        if not path.is_file():
            words = "is no file" if path.exists() else "there is no such file"
            raise CaseRefused(f"{name}: {words}", code="invalid_image")
        _check_size(name, path.stat().st_size, max_bytes)
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, CaseRefused):
            raise
        words = getattr(error, "strerror", None) or error
        raise CaseRefused(f"{name}: cannot be read: {words}", code="invalid_image") from error


def _check_size(name: str, size: int, max_bytes: int) -> None:
    encoded = -(-size // 3) * 4
    if encoded > max_bytes:
        raise _too_large(name, encoded, max_bytes)


def _too_large(name: str, size: int, max_bytes: int) -> CaseRefused:
    return CaseRefused(
        f"{name}: {size / 1e6:,.1f} MB once encoded, over the {max_bytes / 1e6:,.1f} MB of one request: "
        "scale the image down (or raise policy.service.max_body_bytes, and max_body_bytes here)",
        code="too_large",
    )

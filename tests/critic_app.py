"""The critic's application in one process, over a fake policy; what tests of its routes share."""

import asyncio
import base64
import io
import math
import random
import re
from typing import Any

import httpx
from PIL import Image

from serve_apps.critic import CriticApp, make_app
from serve_apps.critic_models import CritiqueReport
from sima_ray.config import ServiceConfig
from sima_ray.errors import ServiceError
from sima_ray.ports import Policy

SERVICE = ServiceConfig(max_text_chars=2_000, max_image_pixels=1_000_000, request_timeout_s=5)


class ScoringPolicy(Policy):
    """Prefers the response with the higher `score=N`, by the more probability the further they are apart.

    Words in the question make it do other things; what it answers to any other request is an echo.
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.inside = self.most = 0

    async def complete(self, request: Any) -> Any:
        self.requests.append(request)
        text = "".join(part.get("text", "") for part in request["content"])
        images = sum(part["type"] == "image" for part in request["content"])
        if "please refuse" in text:
            return {"error": "too long: the model reads at most 7 tokens"}
        if "please be down" in text:
            raise ServiceError("secret: no replica at 10.0.0.1")
        if "please break" in text:
            raise RuntimeError("secret: a bug")
        if "please wait" in text:
            await asyncio.Event().wait()
        self.inside += 1
        self.most = max(self.most, self.inside)
        await asyncio.sleep(0)
        self.inside -= 1
        told = {"model_version": "fake-1", "finish_reason": "stop", "prompt_tokens": 5}
        if "Response 1:" not in text:
            return {"text": f"{images} images, {text!r}", "tokens": 3, **told}
        first, second = (float(score) for score in re.findall(r"score=([\d.-]+)", text)[-2:])
        margin = 1.0 if "please be partial" in text else first - second
        verdict = "I cannot say." if "please mumble" in text else f"[[{1 if margin >= 0 else 2}]]"
        answer = {"text": f"By {abs(margin):g}, {images} images.\nChoice: {verdict}", "tokens": 9}
        if "please hide" not in text and "please mumble" not in text:
            assert request["alternatives"] == ["Choice: [[1]]", "Choice: [[2]]"]
            answer["alternatives"] = [-math.log1p(math.exp(-margin)), -math.log1p(math.exp(margin))]
        return answer | told


class Noisy(Policy):
    """As sure of anything as its prompt's hash says: no order, no symmetry of its own."""

    async def complete(self, request: Any) -> Any:
        text = "".join(part.get("text", "") for part in request["content"])
        draw = random.Random(text)
        said = [-draw.expovariate(1), -draw.expovariate(1)]
        choice = 1 if said[0] >= said[1] else 2
        verdict = f"[[{choice}]]" if draw.random() < 0.95 else "neither"
        return {"text": f"So. {verdict}", "tokens": 4, "alternatives": said, "model_version": "f"}


class Tally:
    """A meter that remembers."""

    def __init__(self) -> None:
        self.reports: list[CritiqueReport] = []
        self.codes: list[str] = []

    def judged(self, report: CritiqueReport) -> None:
        self.reports.append(report)

    def failed(self, code: str) -> None:
        self.codes.append(code)


def client(
    policy: Any, meter: Tally | None = None, prefix: str = "", **service: Any
) -> httpx.AsyncClient:
    """A client of the application, without a network between them; `prefix`: where Serve puts it."""
    values = {"service": SERVICE.model_copy(update=service), "without_token": True}
    settings = CriticApp.model_validate(values)
    transport = httpx.ASGITransport(make_app(settings, policy, meter=meter), root_path=prefix)
    return httpx.AsyncClient(transport=transport, base_url=f"http://critic{prefix}", timeout=30)


def case(*scores: float, question: str = "What is it?", **more: Any) -> dict[str, Any]:
    """A case whose responses have these scores."""
    return {"question": question, "responses": [f"score={score:g}" for score in scores], **more}


def png(side: int = 32) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (200, 40, 40)).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


async def judge(http: httpx.AsyncClient, case: dict[str, Any]) -> dict[str, Any]:
    """The report on a case."""
    reply = await http.post("/v1/critique", json=case)
    assert reply.status_code == 200, reply.text
    return reply.json()


def error_of(reply: httpx.Response) -> tuple[int, str, str]:
    """Status, code and message of an error, which has one shape and tells nothing of the inside."""
    assert set(reply.json()) == {"error"}
    error = reply.json()["error"]
    assert set(error) == {"code", "message", "request_id"} and "secret" not in reply.text
    return reply.status_code, error["code"], error["message"]

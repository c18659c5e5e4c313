"""The critic's Serve application: `POST /v1/critique` judges responses to a question about an image.

Imports no engine, and is up in seconds: it asks the policy's deployment.
"""

import asyncio
import math
import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import Field
from ray import serve
from ray.serve import Application
from starlette.exceptions import HTTPException

from serve_apps.chat import Chat, add_chat_routes
from serve_apps.critic_models import (
    BatchReport,
    BatchRequest,
    CritiqueReport,
    CritiqueRequest,
    in_words,
    invalid,
)
from serve_apps.guard import ApiError, App, Guard, Limits, Quota, Tokens, error_response
from serve_apps.judging import Judge, Meter
from serve_apps.meters import ServeMeter
from serve_apps.remote_images import RemoteImages
from serve_apps.shared_quota import shared_quota
from serve_apps.upload import Uploads
from sima_ray.config import CriticConfig, Section, ServiceConfig
from sima_ray.errors import ServiceError
from sima_ray.ports import Policy, text_part
from sima_ray.runtime.client import HandlePolicy
from sima_ray.runtime.deployment import ingress_options

DEPLOYMENT = "Critic"

RETRIES = 2
"""Of a critique's calls to the policy: a person waits; a client that can wait longer retries by itself."""

UPLOADS = ("/v1/critique",)
"""Where a form with an image file is taken, too."""

_FORM = {
    "schema": {
        "type": "object",
        "required": ["question", "responses"],
        "properties": {
            "image": {"type": "string", "format": "binary"},
            "question": {"type": "string"},
            "ground_truth": {"type": "string"},
            "responses": {"type": "array", "items": {"type": "string"}},
        },
    }
}


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


def make_app(
    settings: CriticApp,
    policy: Policy,
    quota: Quota | None = None,
    meter: Meter | None = None,
) -> App:
    """The guarded ASGI application.

    Args:
        settings: Of the application.
        policy: Whatever answers.
        quota: Knows what each token may ask.
        meter: Counts verdicts.
    """
    api = FastAPI(title="sima-ray critic", docs_url=None, redoc_url=None, redirect_slashes=False)
    critic, service = settings.critic, settings.service
    images = RemoteImages(service)
    judge = Judge(policy, critic, service, meter, images)

    @api.post(
        "/v1/critique",
        openapi_extra={"requestBody": {"content": {"multipart/form-data": _FORM}}},
    )
    async def post_critique(request: CritiqueRequest) -> CritiqueReport:
        """Judge two responses in both orders, or rank more by judging every pair."""
        return await judge.one(request)

    @api.post("/v1/critique/batch")
    async def post_batch(batch: BatchRequest, request: Request) -> BatchReport:
        """Judge many cases, each by itself: what is wrong with one is that one's result."""
        count = len(batch.cases)
        if count > service.max_cases:
            raise invalid(f"cases: over the {service.max_cases} allowed")
        if count > (service.requests_per_minute or count):
            raise invalid(f"cases: over the {service.requests_per_minute} a minute of a token")
        await request.state.charge(count - 1)  # the guard has counted one
        return BatchReport(results=await judge.batch(batch.cases))

    add_chat_routes(api, Chat(policy, judge, critic, service, images))
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
    return Guard(Uploads(api, UPLOADS), tokens, Limits.of(service), quota, UPLOADS)


def _answer_errors(api: FastAPI) -> None:
    """One shape for all errors, and no internals in them."""

    def answer(request: Request, error: ApiError) -> Response:
        status, headers, body = error_response(error, request.state.request_id)
        return Response(body, status, {**headers, "x-sima-error": "1"})

    @api.exception_handler(ApiError)
    async def ours(request: Request, error: ApiError) -> Response:
        return answer(request, error)

    @api.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return answer(request, invalid(in_words(error.errors())))

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
        return make_app(settings, policy, shared_quota(settings.service), ServeMeter())


def build_app(settings: CriticApp) -> Application:
    """Build the application, for `serve deploy` and `deploy_critic`."""
    service = settings.service
    deployment: Any = serve.deployment(
        serve.ingress()(Critic),
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": 0.1},
        **ingress_options(service),
    )
    return deployment.bind(settings.model_dump(mode="json"))

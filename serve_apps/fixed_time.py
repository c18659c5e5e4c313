"""A policy application without a model: each request takes a fixed time. For tests and benchmarks of the service.

Answers, versions, swaps and scaling follow the same rules as the policy's (`serve_apps.weights`); its "weights"
are a folder's name. A folder named `bad-…` does not load.
"""

import asyncio
import os
from typing import Any

from pydantic import BaseModel
from ray import serve
from ray.serve import Application

from serve_apps.weights import Weights
from sima_ray.ports import Completion, CompletionRequest, JsonDict, Policy
from sima_ray.runtime.client import DEPLOYMENT


class FixedTime(BaseModel, extra="forbid"):
    """Settings of the application.

    Attributes:
        seconds: Of each request.
        at_once: Requests that a replica works on at once; others wait in it, as in an engine.
        swap_seconds: Of loading other weights.
        start_seconds: Of a replica's start.
        cpus: That a replica reserves.
    """

    seconds: float = 0.1
    at_once: int = 1000
    swap_seconds: float = 0.0
    start_seconds: float = 0.0
    cpus: float = 0.1


class FixedTimePolicy(Policy):
    """One replica."""

    async def __init__(self, settings: JsonDict) -> None:
        self._settings = FixedTime.model_validate(settings)
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._held = ""
        self._places = asyncio.Semaphore(self._settings.at_once)
        self._weights = Weights("", self._load, self._check)
        await asyncio.sleep(self._settings.start_seconds)

    async def complete(self, request: CompletionRequest) -> Completion:
        """Answer one request (see `sima_ray.ports`), in the settings' time."""
        async with self._weights.answering() as version, self._places:
            held = self._held
            await asyncio.sleep(self._settings.seconds)
            assert held == self._held, "the weights changed under a request"
        return {
            "text": held,
            "tokens": 1,
            "prompt_tokens": 1,
            "cached_tokens": 0,
            "logprob": 0.0,
            "finish_reason": "stop",
            "model_version": version,
        }

    async def reconfigure(self, user_config: JsonDict) -> None:
        """Serve's hook, as the policy's."""
        await self._weights.swap(**user_config)

    async def state(self) -> JsonDict:
        """Which replica this is and what it serves."""
        return {"replica": self._replica, "pid": os.getpid(), **self._weights.state()}

    async def check_health(self) -> None:
        """Serve's hook."""
        self._weights.check_health()

    async def _load(self, model: str) -> None:
        await asyncio.sleep(self._settings.swap_seconds)
        if model.startswith("bad-"):
            raise RuntimeError(f"{model}: no such weights")
        self._held = model

    async def _check(self, sample: JsonDict) -> float:
        if self._held not in sample.get("held", [self._held]):
            raise RuntimeError("the weights compute something else")
        return 0.0


def build_app(settings: FixedTime) -> Application:
    """Build the application."""
    deployment: Any = serve.deployment(
        FixedTimePolicy,
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": settings.cpus},
        health_check_period_s=1,
        health_check_timeout_s=5,
    )
    return deployment.bind(settings.model_dump())


def declaration(
    name: str, settings: FixedTime, scaling: JsonDict, user_config: JsonDict | None = None
) -> JsonDict:
    """What `sima_ray.runtime.applications.apply` takes.

    Args:
        name: Of the application.
        settings: Of each replica.
        scaling: Serve's options (`sima_ray.runtime.deployment.scaling_options`).
        user_config: Model and version; default: "base".
    """
    user_config = user_config or {"model": "base", "version": "base"}
    return {
        "name": name,
        "route_prefix": None,
        "import_path": "serve_apps.fixed_time:build_app",
        "args": settings.model_dump(),
        "deployments": [{"name": DEPLOYMENT, "user_config": user_config, **scaling}],
    }

"""Calling the policy service from inside the cluster: a `Policy` over its deployment handle, with retries."""

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from sima_ray.errors import ServiceError, last_line
from sima_ray.ports import Completion, CompletionRequest, Policy

logger = logging.getLogger(__name__)

DEPLOYMENT = "Policy"
"""Name of the deployment that answers, in every policy application."""

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 15.0

MAY_PASS = (RayError, RayServeException, TimeoutError)
"""A replica that died, an overloaded queue, an engine that failed once, a deadline."""


class HandlePolicy(Policy):
    """`sima_ray.ports.Policy` over Serve. Made where it is used: it does not travel between processes.

    Args:
        app: The policy's Serve application.
        retries: Tries again after a failure that may pass.
        timeout_s: Of one try, queueing included.
        handle: What to call instead of the application's deployment.
    """

    def __init__(
        self,
        app: str = "policy",
        retries: int = 5,
        timeout_s: float = 600.0,
        handle: DeploymentHandle[Any] | None = None,
    ) -> None:
        self._app, self._retries, self._timeout_s = app, retries, timeout_s
        self._handle = handle

    async def complete(self, request: CompletionRequest) -> Completion:
        """Answer one request (see `sima_ray.ports.Policy`)."""
        (answer,) = await self.complete_all([request])
        return answer

    async def complete_all(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        """Answer requests about one image in one call (see `sima_ray.ports.Policy`)."""
        for attempt in range(self._retries + 1):
            try:
                return await self._once(list(requests))
            except MAY_PASS as error:
                if attempt == self._retries:
                    raise ServiceError(
                        f"policy service {self._app!r} failed {attempt + 1} times: {_reason(error)}"
                    ) from error
                logger.info("Request to %r failed, trying again: %s", self._app, _reason(error))
                await asyncio.sleep(pause_s(attempt))
        raise AssertionError("unreachable")

    async def _once(self, requests: list[CompletionRequest]) -> list[Completion]:
        if self._handle is None:
            self._handle = serve.get_deployment_handle(DEPLOYMENT, self._app)
        response = self._handle.complete_all.remote(requests)
        try:
            async with asyncio.timeout(self._timeout_s):
                return cast(list[Completion], await response)
        except (TimeoutError, asyncio.CancelledError):
            response.cancel()  # so that the engine stops working on it
            raise


def connect_policy(
    app: str = "policy", retries: int = 5, timeout_s: float = 600.0
) -> Callable[[], Policy]:
    """A picklable factory of `HandlePolicy`, for Ray Data workers."""
    return partial(HandlePolicy, app, retries, timeout_s)


def pause_s(attempt: int) -> float:
    """How long to wait before trying again: doubling, capped, with jitter so that callers spread out."""
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt) * random.uniform(0.5, 1.0)


def _reason(error: BaseException) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else last_line(error)

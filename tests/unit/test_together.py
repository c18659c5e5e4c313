"""Several requests at once: one that fails leaves no other computing."""

import asyncio

import pytest

from sima_ray.errors import ServiceError
from sima_ray.ports import Completion, CompletionRequest, Policy
from sima_ray.together import together


class Half(Policy):
    """Fails a request of one token at once; computes any other until it is told to stop."""

    def __init__(self) -> None:
        self.computing = self.stopped = 0

    async def complete(self, request: CompletionRequest) -> Completion:
        if request["max_tokens"] == 1:
            await asyncio.sleep(0)  # the others have begun
            raise ServiceError("no replica answers")
        self.computing += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.computing, self.stopped = self.computing - 1, self.stopped + 1
        raise AssertionError("unreachable")


async def test_a_request_that_fails_stops_those_of_its_call() -> None:
    policy = Half()
    requests: list[CompletionRequest] = [
        {"content": [], "max_tokens": tokens, "temperature": 0.0} for tokens in (9, 1, 9)
    ]
    async with asyncio.timeout(10):
        with pytest.raises(ServiceError, match="no replica answers"):  # itself, not in a group
            await policy.complete_all(requests)
    assert (policy.computing, policy.stopped) == (0, 2)


async def test_results_come_in_order_whoever_is_first() -> None:
    async def later(turns: int) -> int:
        for _ in range(turns):
            await asyncio.sleep(0)
        return turns

    assert await together(later(turns) for turns in (5, 1, 3)) == [5, 1, 3]
    assert await together([]) == []


async def test_who_is_cancelled_cancels_all() -> None:
    policy = Half()
    request: CompletionRequest = {"content": [], "max_tokens": 9, "temperature": 0.0}
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await policy.complete_all([request, request])
    assert (policy.computing, policy.stopped) == (0, 2)

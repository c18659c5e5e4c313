"""The handle client: what it tries again, for how long, and what it says in the end."""

import asyncio
import pickle
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from sima_ray.errors import ServiceError
from sima_ray.ports import CompletionRequest, text_part
from sima_ray.runtime import client
from sima_ray.runtime.client import HandlePolicy, connect_policy, pause_s

REQUEST: CompletionRequest = {"content": [text_part("?")], "max_tokens": 1, "temperature": 0.0}


class FakeHandle:
    """A handle whose calls end as scripted: an answer, an error, or never (None)."""

    def __init__(self, *script: Any) -> None:
        self.script, self.cancelled, self.complete_all = list(script), 0, self

    def remote(self, requests: list[CompletionRequest]) -> "FakeHandle":
        assert requests == [REQUEST]
        self.next = self.script.pop(0)
        return self

    def __await__(self) -> Any:
        return self._answer().__await__()

    async def _answer(self) -> Any:
        if self.next is None:
            await asyncio.Event().wait()
        if isinstance(self.next, Exception):
            raise self.next
        return [self.next]

    def cancel(self) -> None:
        self.cancelled += 1


def policy(handle: FakeHandle, retries: int = 2) -> HandlePolicy:
    return HandlePolicy(retries=retries, timeout_s=0.5, handle=cast(Any, handle))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.0)


async def test_dead_replicas_and_full_queues_are_tried_again() -> None:
    handle = FakeHandle(
        ActorDiedError(),
        BackPressureError(num_queued_requests=1, max_queued_requests=1),
        {"text": "at last"},
    )
    assert await policy(handle).complete(REQUEST) == {"text": "at last"}


async def test_requests_that_belong_together_are_one_call() -> None:
    class Together(FakeHandle):
        def remote(self, requests: list[CompletionRequest]) -> FakeHandle:
            assert requests == [REQUEST, REQUEST]
            return super().remote(requests[:1])

        async def _answer(self) -> Any:
            return [*await super()._answer(), {"error": "too long"}]

    handle = Together(ActorDiedError(), {"text": "first"})
    assert await policy(handle).complete_all([REQUEST, REQUEST]) == [
        {"text": "first"},
        {"error": "too long"},
    ]
    assert not handle.script


async def test_no_answer_in_time_cancels_and_tries_again() -> None:
    handle = FakeHandle(None, {"text": "now"})
    assert await policy(handle).complete(REQUEST) == {"text": "now"}
    assert handle.cancelled == 1


async def test_beyond_the_retries_it_says_why() -> None:
    handle = FakeHandle(None, None, None, None)
    with pytest.raises(ServiceError, match="'policy' failed 3 times: no answer in time"):
        await policy(handle).complete(REQUEST)
    assert len(handle.script) == 1


async def test_refusals_and_bugs_are_not_tried_again() -> None:
    handle = FakeHandle({"error": "too long"}, {"text": "not asked"})
    assert await policy(handle).complete(REQUEST) == {"error": "too long"}
    with pytest.raises(KeyError):
        await policy(FakeHandle(KeyError("bug"), {"text": "not asked"})).complete(REQUEST)


async def test_a_caller_that_leaves_cancels_the_work() -> None:
    handle = FakeHandle(None)
    task = asyncio.create_task(HandlePolicy(handle=cast(Any, handle)).complete(REQUEST))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert handle.cancelled == 1


def test_pauses_grow_to_a_cap_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.5)
    for attempt in range(20):
        full = min(client.LONGEST_WAIT_S, 0.5 * 2**attempt)
        assert full / 2 <= pause_s(attempt) <= full
    assert len({pause_s(3) for _ in range(10)}) > 1


def test_the_factory_travels() -> None:
    factory = pickle.loads(pickle.dumps(connect_policy("other", retries=1, timeout_s=2)))
    assert isinstance(factory(), HandlePolicy)

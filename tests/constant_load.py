"""Constant load on a policy service, from a thread: every request is kept, with its answer or its failure."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from sima_ray.ports import CompletionRequest, Policy

REQUEST: CompletionRequest = {"content": [], "max_tokens": 1, "temperature": 0.0}


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: when it was sent, when its answer came, and which version answered."""

    sent: float
    received: float
    version: str


class Load:
    """So many requests in flight until the block ends; then all that were sent are answered.

    Attributes:
        answers: What was answered.
        failures: What was not.
    """

    def __init__(self, connect: Callable[[], Policy], in_flight: int) -> None:
        self._connect, self._in_flight = connect, in_flight
        self.answers: list[Asked] = []
        self.failures: list[Any] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def wait_for_more(self, count: int) -> None:
        """Wait for so many further answers."""
        wanted = len(self.answers) + count
        wait_for(lambda: len(self.answers) >= wanted)

    async def _all(self) -> None:
        policy = self._connect()
        await asyncio.gather(*(self._one(policy) for _ in range(self._in_flight)))

    async def _one(self, policy: Policy) -> None:
        while not self._stop.is_set():
            sent = time.monotonic()
            try:
                answer = await policy.complete(REQUEST)
            except Exception as error:
                self.failures.append(error)
                continue
            if "error" in answer:
                self.failures.append(answer)
            else:
                version = answer.get("model_version", "")
                self.answers.append(Asked(sent, time.monotonic(), version))


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> float:
    """Wait until it holds; how many seconds that took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, "not in time"
        time.sleep(0.05)
    return time.monotonic() - start

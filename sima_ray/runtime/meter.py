"""Counts what a policy is asked, over all workers, so that a stage can say how far it is."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from sima_ray.ports import Completion, CompletionRequest, Policy
from sima_ray.runtime.progress import Stage

_FLUSH_EVERY = 16  # requests
_POLL_S = 2.0


@dataclass(slots=True)
class Usage:
    """What was asked and answered so far."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0

    def count(self, completion: Completion) -> None:
        """Add one answer."""
        self.requests += 1
        self.failed += "error" in completion
        self.prompt_tokens += completion.get("prompt_tokens", 0)
        self.cached_tokens += completion.get("cached_tokens", 0)
        self.tokens += completion.get("tokens", 0)


class _Total:
    def __init__(self) -> None:
        self.usage = Usage()

    def add(self, part: dict[str, int]) -> None:
        for name, value in part.items():
            setattr(self.usage, name, getattr(self.usage, name) + value)

    def read(self) -> dict[str, int]:
        return asdict(self.usage)


class MeteredPolicy(Policy):
    """A policy that reports its use to a `Meter`; answers are passed on as they are."""

    def __init__(self, policy: Policy, total: Any) -> None:
        self._policy = policy
        self._total = total
        self._usage = Usage()
        self._open = 0

    async def complete(self, request: CompletionRequest) -> Completion:
        """As the policy's own; see `Policy`."""
        (completion,) = await self.complete_all([request])
        return completion

    async def complete_all(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        """As the policy's own; see `Policy`."""
        self._open += 1
        try:
            completions = await self._policy.complete_all(requests)
            for completion in completions:
                self._usage.count(completion)
        finally:
            self._open -= 1
        # The last answer of a burst is always reported, so that no count is left behind.
        if self._usage.requests >= _FLUSH_EVERY or not self._open:
            part, self._usage = self._usage, Usage()
            with contextlib.suppress(RayError):  # a lost count must never cost a row
                await asyncio.wrap_future(self._total.add.remote(asdict(part)).future())
        return completions


class Meter:
    """The total over all policies that were connected through it."""

    def __init__(self) -> None:
        actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Total)
        self._total: Any = actor.remote()
        self._last = Usage()

    def on(self, connect: Callable[[], Policy]) -> Callable[[], Policy]:
        """The same factory, its policies metered."""
        total = self._total
        return lambda: MeteredPolicy(connect(), total)

    def read(self) -> Usage:
        """The total so far; the last one known while the counter is away."""
        with contextlib.suppress(RayError):
            counts: dict[str, int] = ray.get(self._total.read.remote())
            self._last = Usage(**counts)
        return self._last

    @contextmanager
    def shown(self, stage: Stage) -> Iterator[None]:
        """Show the total in a stage's updates while the block runs."""
        ended = threading.Event()

        def poll() -> None:
            while not ended.wait(_POLL_S):
                usage = self.read()
                if not usage.requests:
                    stage.update("workers are starting")
                    continue
                stage.update(
                    f"{usage.requests:,} answers · {usage.tokens:,} tokens"
                    f" · {usage.tokens / stage.seconds:,.0f} tokens/s"
                    + (f" · {usage.failed} failed" if usage.failed else "")
                )

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

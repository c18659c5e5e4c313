"""The client for asyncio. All decisions are in `retry` and `answers`."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import httpx

from sima_ray.client import answers
from sima_ray.client.case import MAX_BODY_BYTES, Case, ImageSource, batch_body, request_body
from sima_ray.client.common import (
    READY_S,
    TIMEOUT_S,
    BaseClient,
    Call,
    PathLike,
    arguments,
    check_concurrency,
    no_reply,
    reply,
)
from sima_ray.client.errors import CriticError
from sima_ray.client.results import CritiqueResult
from sima_ray.client.retry import Ended, NoReply, Reply, Retry, Send, Steps
from sima_ray.client.settings import ROUTE, find_in_cluster


class AsyncCriticClient(BaseClient):
    """`CriticClient` for asyncio: the same arguments, results and errors."""

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        token_file: PathLike | None = None,
        timeout: float = TIMEOUT_S,
        retry: Retry | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(
            url,
            token,
            token_file=token_file,
            timeout=timeout,
            retry=retry,
            max_body_bytes=max_body_bytes,
        )
        self._http = httpx.AsyncClient(**self._options(transport))

    @classmethod
    async def from_cluster(cls, address: str | None = None, **options: Any) -> Self:
        """As `CriticClient.from_cluster`."""
        return cls(await asyncio.to_thread(find_in_cluster, address), **options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def critique(
        self,
        image: ImageSource,
        question: str,
        responses: Sequence[str],
        ground_truth: str | None = None,
        *,
        timeout: float | None = None,
    ) -> CritiqueResult:
        """As `CriticClient.critique`."""
        return await self._judge(Case(question, responses, image, ground_truth), timeout)

    async def critique_many(
        self, cases: Iterable[Case], concurrency: int = 8, *, timeout: float | None = None
    ) -> list[CritiqueResult | CriticError]:
        """As `CriticClient.critique_many`."""
        return [
            result async for result in self.critique_stream(cases, concurrency, timeout=timeout)
        ]

    async def critique_stream(
        self, cases: Iterable[Case], concurrency: int = 8, *, timeout: float | None = None
    ) -> AsyncIterator[CritiqueResult | CriticError]:
        """As `CriticClient.critique_stream`."""
        check_concurrency(concurrency)
        gate = asyncio.Semaphore(concurrency)
        waiting: deque[asyncio.Task[CritiqueResult | CriticError]] = deque()

        async def one(case: Case) -> CritiqueResult | CriticError:
            async with gate:
                try:
                    return await self._judge(case, timeout)
                except CriticError as error:
                    return error

        try:
            for case in cases:
                waiting.append(asyncio.create_task(one(case)))
                if len(waiting) >= 2 * concurrency:
                    yield await waiting[0]
                    waiting.popleft()
            while waiting:
                yield await waiting[0]
                waiting.popleft()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def critique_batch(
        self, cases: Sequence[Case], *, timeout: float | None = None
    ) -> list[CritiqueResult | CriticError]:
        """As `CriticClient.critique_batch`."""
        body = await asyncio.to_thread(batch_body, cases, self._max_bytes)
        ended = await self._drive(self._tries(timeout), Call("POST", f"{ROUTE}/batch", body))
        return answers.results_of(ended, self._endpoint, len(cases))

    async def ready(self, timeout: float = READY_S) -> bool:
        """As `CriticClient.ready`."""
        return self._is_ready(await self._drive(self._readiness(timeout), Call("GET", "/readyz")))

    async def _judge(self, case: Case, timeout: float | None) -> CritiqueResult:
        # In a thread: it reads a file, and encodes megabytes.
        body = await asyncio.to_thread(request_body, case, self._max_bytes)
        ended = await self._drive(self._tries(timeout), Call("POST", ROUTE, body))
        return answers.result_of(ended, self._endpoint)

    async def _drive(self, steps: Steps, call: Call) -> Ended:
        return await drive(steps, partial(self._send, call))

    async def _send(self, call: Call, left_s: float) -> Reply | NoReply:
        try:
            async with asyncio.timeout(left_s):
                response = await self._http.request(**arguments(call, left_s))
                return reply(response, response.content)
        except TimeoutError:
            return NoReply("timeout")
        except httpx.RequestError as error:
            return no_reply(error)


async def drive(steps: Steps, send: Callable[[float], Awaitable[Reply | NoReply]]) -> Ended:
    """Do what an exchange says until it ends; `send` is one try, given the seconds that are left."""
    told: Reply | NoReply | None = None
    while True:
        try:
            step = steps.send(told)
        except StopIteration as end:
            return end.value
        if isinstance(step, Send):
            told = await send(step.left_s)
        else:
            told = await asyncio.sleep(step.seconds)

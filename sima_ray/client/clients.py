"""The two clients: what each does with the network. All decisions are in `retry` and `answers`."""

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from sima_ray.client import answers
from sima_ray.client.case import MAX_BODY_BYTES, Case, ImageSource, batch_body, request_body
from sima_ray.client.errors import CriticError
from sima_ray.client.results import CritiqueResult
from sima_ray.client.retry import BUSY, Clock, Ended, NoReply, Reply, Retry, Send, Steps, exchange
from sima_ray.client.settings import ROUTE, find_endpoint, find_in_cluster

TIMEOUT_S = 600.0
"""Of a critique, all tries together: as long as the service itself takes by default."""

CONNECT_S = 10.0
READY_S = 15.0

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class _Call:
    """One request, as it is sent at each try."""

    method: str
    path: str
    body: bytes = b""


class _Settings:
    """What both clients have."""

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        token_file: PathLike | None = None,
        timeout: float = TIMEOUT_S,
        retry: Retry | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self._endpoint = find_endpoint(url, token, token_file)
        self._timeout, self._retry, self._max_bytes = timeout, retry or Retry(), max_body_bytes

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @property
    def url(self) -> str:
        """The service's base URL."""
        return self._endpoint.url

    def _options(self, transport: Any) -> dict[str, Any]:
        return {
            "base_url": self._endpoint.url,
            "headers": self._endpoint.headers,
            "transport": transport,
            "trust_env": not self._endpoint.is_local,
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=64),
        }

    def _tries(self, timeout: float | None) -> Steps:
        return exchange(self._retry, self._timeout if timeout is None else timeout, Clock())

    def _readiness(self, timeout: float) -> Steps:
        retry = Retry(min(3, self._retry.attempts), self._retry.first_wait_s)
        return exchange(retry, timeout, Clock(), busy=BUSY - {503})

    def _is_ready(self, ended: Ended) -> bool:
        if isinstance(ended.outcome, Reply) and ended.outcome.status == 503:
            return False
        answers.json_of(ended, self._endpoint)
        return True


class CriticClient(_Settings):
    """Asks a critic; safe to share between threads.

    >>> with CriticClient() as critic:
    ...     result = critic.critique("cat.png", "What is it?", ["A cat.", "A dog."])
    ...     result.winner, result.consistent

    Args:
        url: Default: $SIMA_CRITIC_URL, or http://127.0.0.1:8000.
        token: Default: `token_file`, $SIMA_CRITIC_TOKEN, or the file that `sima serve` wrote.
        token_file: Its first line is the token.
        timeout: Seconds for one critique, all tries and waits together.
        retry: How often to try, and the waits (see `sima_ray.client.retry`).
        max_body_bytes: The service's limit; a larger request is not sent.
        transport: In place of the network.

    Raises:
        ConfigError: A URL that is none.
        TokenRefused: A token file that cannot be read.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        token_file: PathLike | None = None,
        timeout: float = TIMEOUT_S,
        retry: Retry | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(
            url,
            token,
            token_file=token_file,
            timeout=timeout,
            retry=retry,
            max_body_bytes=max_body_bytes,
        )
        self._http = httpx.Client(**self._options(transport))

    @classmethod
    def from_cluster(cls, address: str | None = None, **options: Any) -> Self:
        """The critic that a Ray cluster serves, on whichever port (see `find_in_cluster`)."""
        return cls(find_in_cluster(address), **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def critique(
        self,
        image: ImageSource,
        question: str,
        responses: Sequence[str],
        ground_truth: str | None = None,
        *,
        timeout: float | None = None,
    ) -> CritiqueResult:
        """Judge responses to one question about one image (see `Case`).

        Raises:
            CaseRefused: The case cannot be judged as it is.
            TokenRefused: The token is missing or wrong.
            CriticUnavailable: Nobody there, overloaded, or no verdict in time.
            CriticFailed: The service failed.
        """
        return self._judge(Case(question, responses, image, ground_truth), timeout, time.sleep)

    def critique_many(
        self, cases: Iterable[Case], concurrency: int = 8, *, timeout: float | None = None
    ) -> list[CritiqueResult | CriticError]:
        """Judge many cases, one request each; a case that fails has its error in its place."""
        return list(self.critique_stream(cases, concurrency, timeout=timeout))

    def critique_stream(
        self, cases: Iterable[Case], concurrency: int = 8, *, timeout: float | None = None
    ) -> Iterator[CritiqueResult | CriticError]:
        """As `critique_many`, but one by one: neither the cases nor the results are all held at once."""
        _check_concurrency(concurrency)
        stop = threading.Event()
        pool = ThreadPoolExecutor(concurrency, thread_name_prefix="critic-client")
        waiting: deque[Future[CritiqueResult | CriticError]] = deque()

        def pause(seconds: float) -> None:
            if stop.wait(seconds):
                raise CriticError("stopped", code="stopped")

        def one(case: Case) -> CritiqueResult | CriticError:
            try:
                return self._judge(case, timeout, pause)
            except CriticError as error:
                return error

        try:
            for case in cases:
                waiting.append(pool.submit(one, case))
                if len(waiting) >= 2 * concurrency:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)

    def critique_batch(
        self, cases: Sequence[Case], *, timeout: float | None = None
    ) -> list[CritiqueResult | CriticError]:
        """Judge cases in one request, where the service has `/v1/critique/batch`.

        Raises:
            CriticError: The batch as a whole failed (see `critique`).
        """
        call = _Call("POST", f"{ROUTE}/batch", batch_body(cases, self._max_bytes))
        ended = self._drive(self._tries(timeout), call, time.sleep)
        return answers.results_of(ended, self._endpoint, len(cases))

    def ready(self, timeout: float = READY_S) -> bool:
        """Whether the policy behind the critic answers.

        Raises:
            CriticUnavailable: The critic itself cannot be reached.
            CriticFailed: What answers is no critic.
        """
        return self._is_ready(
            self._drive(self._readiness(timeout), _Call("GET", "/readyz"), time.sleep)
        )

    def _judge(
        self, case: Case, timeout: float | None, pause: Callable[[float], None]
    ) -> CritiqueResult:
        call = _Call("POST", ROUTE, request_body(case, self._max_bytes))
        return answers.result_of(self._drive(self._tries(timeout), call, pause), self._endpoint)

    def _drive(self, steps: Steps, call: _Call, pause: Callable[[float], None]) -> Ended:
        told: Reply | NoReply | None = None
        while True:
            try:
                step = steps.send(told)
            except StopIteration as end:
                return end.value
            told = self._send(call, step.left_s) if isinstance(step, Send) else pause(step.seconds)

    def _send(self, call: _Call, left_s: float) -> Reply | NoReply:
        end = time.monotonic() + left_s
        try:
            with self._http.stream(**_arguments(call, left_s)) as response:
                body = bytearray()
                for chunk in response.iter_bytes():
                    body += chunk
                    if time.monotonic() > end:  # the library's limit is one read's
                        return NoReply("timeout")
                return _reply(response, bytes(body))
        except httpx.RequestError as error:
            return _no_reply(error)


class AsyncCriticClient(_Settings):
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
        _check_concurrency(concurrency)
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
        ended = await self._drive(self._tries(timeout), _Call("POST", f"{ROUTE}/batch", body))
        return answers.results_of(ended, self._endpoint, len(cases))

    async def ready(self, timeout: float = READY_S) -> bool:
        """As `CriticClient.ready`."""
        return self._is_ready(await self._drive(self._readiness(timeout), _Call("GET", "/readyz")))

    async def _judge(self, case: Case, timeout: float | None) -> CritiqueResult:
        # In a thread: it reads a file, and encodes megabytes.
        body = await asyncio.to_thread(request_body, case, self._max_bytes)
        ended = await self._drive(self._tries(timeout), _Call("POST", ROUTE, body))
        return answers.result_of(ended, self._endpoint)

    async def _drive(self, steps: Steps, call: _Call) -> Ended:
        told: Reply | NoReply | None = None
        while True:
            try:
                step = steps.send(told)
            except StopIteration as end:
                return end.value
            if isinstance(step, Send):
                told = await self._send(call, step.left_s)
            else:
                told = await asyncio.sleep(step.seconds)

    async def _send(self, call: _Call, left_s: float) -> Reply | NoReply:
        try:
            async with asyncio.timeout(left_s):
                response = await self._http.request(**_arguments(call, left_s))
                return _reply(response, response.content)
        except TimeoutError:
            return NoReply("timeout")
        except httpx.RequestError as error:
            return _no_reply(error)


def _check_concurrency(concurrency: int) -> None:
    if concurrency < 1:
        raise ValueError(f"concurrency={concurrency}: at least 1")


def _arguments(call: _Call, left_s: float) -> dict[str, Any]:
    """Of one try, for either of the library's clients."""
    left_s = max(left_s, 0.001)
    return {
        "method": call.method,
        "url": call.path,
        "content": call.body or None,
        "headers": {"Content-Type": "application/json"} if call.body else {},
        "timeout": httpx.Timeout(left_s, connect=min(CONNECT_S, left_s)),
    }


def _reply(response: httpx.Response, body: bytes) -> Reply:
    return Reply(
        response.status_code,
        {key.lower(): value for key, value in response.headers.items()},
        body,
    )


def _no_reply(error: httpx.RequestError) -> NoReply:
    """What kind of silence it was."""
    match error:
        case httpx.ConnectError() | httpx.ConnectTimeout():
            kind = "refused"
        case httpx.TimeoutException():
            kind = "timeout"
        case _:
            kind = "broken"
    cause: BaseException | None = error
    while cause is not None:  # the async library has its own words for it
        if isinstance(cause, ConnectionRefusedError) or "onnection refused" in str(cause):
            return NoReply(kind, "connection refused")
        cause = cause.__cause__ or cause.__context__
    return NoReply(kind, " ".join(str(error).split()) or type(error).__name__)

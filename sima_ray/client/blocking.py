"""The client for programs without asyncio. All decisions are in `retry` and `answers`."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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


class CriticClient(BaseClient):
    """Asks a critic; safe to share between threads.

    >>> with CriticClient() as critic:
    ...     result = critic.critique("cat.png", "What is it?", ["A cat.", "A dog."])
    ...     result.winner, result.consistent

    Args:
        url: Default: $SIMA_CRITIC_URL, or http://127.0.0.1:8000.
        token: Default: `token_file`, $SIMA_CRITIC_TOKEN, or the file that `sima serve` wrote.
        token_file: One token a line, `#` comments; the first is taken.
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
        check_concurrency(concurrency)
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
        call = Call("POST", f"{ROUTE}/batch", batch_body(cases, self._max_bytes))
        ended = self._drive(self._tries(timeout), call, time.sleep)
        return answers.results_of(ended, self._endpoint, len(cases))

    def ready(self, timeout: float = READY_S) -> bool:
        """Whether the policy behind the critic answers.

        Raises:
            CriticUnavailable: The critic itself cannot be reached.
            CriticFailed: What answers is no critic.
        """
        return self._is_ready(
            self._drive(self._readiness(timeout), Call("GET", "/readyz"), time.sleep)
        )

    def _judge(
        self, case: Case, timeout: float | None, pause: Callable[[float], None]
    ) -> CritiqueResult:
        call = Call("POST", ROUTE, request_body(case, self._max_bytes))
        return answers.result_of(self._drive(self._tries(timeout), call, pause), self._endpoint)

    def _drive(self, steps: Steps, call: Call, pause: Callable[[float], None]) -> Ended:
        told: Reply | NoReply | None = None
        while True:
            try:
                step = steps.send(told)
            except StopIteration as end:
                return end.value
            told = self._send(call, step.left_s) if isinstance(step, Send) else pause(step.seconds)

    def _send(self, call: Call, left_s: float) -> Reply | NoReply:
        end = time.monotonic() + left_s
        try:
            with self._http.stream(**arguments(call, left_s)) as response:
                body = bytearray()
                for chunk in response.iter_bytes():
                    body += chunk
                    if time.monotonic() > end:  # the library's limit is one read's
                        return NoReply("timeout")
                return reply(response, bytes(body))
        except httpx.RequestError as error:
            return no_reply(error)

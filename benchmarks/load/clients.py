"""Clients of the critic over HTTP, in a process of their own: threads with one kept connection each.

They use the standard library, which costs a request a fraction of a millisecond: what is measured is the service.
"""

import http.client
import itertools
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from benchmarks.hostile.run import Findings

ROUTE = "/v1/critique"
TIMEOUT_S = 120.0
NONE = 0
"""In place of a status: no answer came."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request got, and after how long."""

    status: int
    text: str
    retry_after: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Door:
    """Where to ask, and with which token."""

    url: str
    token: str


class Connection:
    """Asks one request at a time."""

    def __init__(self, door: Door) -> None:
        parts = urlsplit(door.url)
        assert parts.hostname is not None
        self._http = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S)
        self._prefix = parts.path
        self._headers = {
            "Authorization": f"Bearer {door.token}",
            "Content-Type": "application/json",
        }

    def post(self, body: bytes) -> Answer:
        """Ask for a critique."""
        return self._ask("POST", ROUTE, body)

    def get(self, path: str) -> Answer:
        """Ask for anything else."""
        return self._ask("GET", path, None)

    def close(self) -> None:
        self._http.close()

    def _ask(self, method: str, path: str, body: bytes | None) -> Answer:
        start = time.perf_counter()
        kept = self._http.sock is not None
        # The server ends a connection that nobody used for seconds; that is found out by using it.
        for _ in range(1 + kept):
            try:
                self._http.request(method, self._prefix + path, body, self._headers)
                reply = self._http.getresponse()
                text = reply.read().decode()
                return Answer(
                    reply.status,
                    text,
                    reply.getheader("Retry-After"),
                    time.perf_counter() - start,
                )
            except (OSError, http.client.HTTPException):
                self._http.close()
        return Answer(NONE, "", None, time.perf_counter() - start)


@dataclass
class Load:
    """What so many requests got.

    Attributes:
        statuses: How often each status came.
        problems: Answers that must not have come (see `benchmarks.hostile.run.Findings`), the first of them.
        seconds: From the first request to the last answer.
        ended: When the load stopped, on the machine's monotonic clock; the last answers come after it.
        late: Requests of an even load that were sent over a second after their time.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    problem_count: int = 0
    seconds: float = 0.0
    ended: float = 0.0
    late: int = 0

    @property
    def per_s(self) -> float:
        """Answers a second."""
        return self.statuses.total() / self.seconds

    def only_200(self) -> "Load":
        """Itself, or an error where anything else came."""
        if set(self.statuses) != {200}:
            raise RuntimeError(f"not all critiques were answered: {dict(self.statuses)}")
        return self


class Tickets:
    """Which body is next and when it is due: at once, or evenly."""

    def __init__(self, bodies: Sequence[bytes], seconds: float, rate: float | None) -> None:
        self._bodies, self._rate = itertools.cycle(bodies), rate
        self.start = time.monotonic()
        self.end = self.start + seconds
        self._count, self._lock = 0, threading.Lock()

    def draw(self) -> tuple[float, bytes] | None:
        with self._lock:
            now = time.monotonic()
            due = now if self._rate is None else self.start + self._count / self._rate
            if max(due, now) >= self.end:
                return None
            self._count += 1
            return due, next(self._bodies)


def ask_all(
    door: Door,
    bodies: Sequence[bytes],
    connections: int,
    seconds: float,
    rate: float | None = None,
) -> Load:
    """Ask for so long, on every connection again as soon as it was answered.

    Args:
        door: Of the service.
        bodies: Asked in turn, again and again.
        connections: As many requests are in flight.
        seconds: After which no request is sent any more.
        rate: Requests a second, evenly, instead of at once; the connections are the most in flight.
    """
    load, findings, lock = Load(), Findings(), threading.Lock()
    tickets = Tickets(bodies, seconds, rate)

    def worker() -> None:
        connection = Connection(door)
        while (ticket := tickets.draw()) is not None:
            due, body = ticket
            delay = due - time.monotonic()
            if delay > 0:
                time.sleep(delay)
            answer = connection.post(body)
            with lock:
                load.late += delay < -1
                findings.see("load", answer.status, answer.text)
                if answer.status in (429, 503) and answer.retry_after is None:
                    findings.problems.append(f"{answer.status} without Retry-After: {answer.text}")
        connection.close()

    threads = [threading.Thread(target=worker) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.statuses, load.problems = findings.statuses, findings.problems[:20]
    load.problem_count = len(findings.problems)
    load.seconds, load.ended = time.monotonic() - tickets.start, tickets.end
    return load


class Clients:
    """Runs `ask_all` in another process."""

    def __init__(self, pool: ProcessPoolExecutor, door: Door) -> None:
        self._pool, self._door = pool, door

    def start(
        self, bodies: Sequence[bytes], connections: int, seconds: float, rate: float | None = None
    ) -> Future[Load]:
        return self._pool.submit(ask_all, self._door, bodies, connections, seconds, rate)


@contextmanager
def other_process(door: Door) -> Iterator[Clients]:
    """A process for the clients, so that they share no interpreter with what they are compared with."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        pool.submit(time.monotonic).result()  # its start is not measured
        yield Clients(pool, door)

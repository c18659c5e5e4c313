"""When to try again, and how long to wait: one generator that the sync and the async client both drive.

It sends nothing and sleeps never: it says what to do next (`Send`, `Wait`) and is told what came of it.

A critique only reads, so trying again is always safe. What is worth another try:

- no connection, or one that broke: yes;
- 429 and 503: yes, after the time that `Retry-After` names;
- 500 and 502: once. A replica that dies in mid-answer is Serve's 500; the next 500 is the service's own;
- 504: no. The service has spent its whole time limit on this case, and would spend it again;
- anything else: no.
"""

import random
import re
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime

BUSY = frozenset({429, 503})
DIED = frozenset({500, 502})


@dataclass(frozen=True, slots=True)
class Retry:
    """How often to try, and the waits between: doubling, capped, with jitter so that callers spread out."""

    attempts: int = 6
    first_wait_s: float = 0.5
    longest_wait_s: float = 15.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.first_wait_s < 0 or self.longest_wait_s < 0:
            raise ValueError(f"{self}: at least one attempt, and no negative waits")


@dataclass(frozen=True, slots=True)
class Clock:
    """The time that passes, the time of day in epoch seconds, and jitter between two numbers."""

    now: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    spread: Callable[[float, float], float] = random.uniform


@dataclass(frozen=True, slots=True)
class Send:
    """Send the request; `left_s` remain of the whole."""

    left_s: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Send nothing for so long."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer over HTTP; the names of `headers` are in lower case."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class NoReply:
    """No answer: "refused", "timeout" or "broken", and the words of the library below."""

    kind: str
    words: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """The last try's outcome, after how many of them and how long."""

    outcome: Reply | NoReply
    tries: int
    seconds: float


Steps = Generator[Send | Wait, Reply | NoReply | None, Ended]


def exchange(retry: Retry, timeout_s: float, clock: Clock, busy: frozenset[int] = BUSY) -> Steps:
    """Try until there is an answer to keep, the tries are used up, or the time would be.

    Args:
        retry: Tries and waits.
        timeout_s: For everything: all tries and the waits between. A wait that would go beyond it ends
            the exchange at once.
        clock: The real one, or a test's.
        busy: Statuses that are tried again until the end.
    """
    start, died = clock.now(), 0
    for tries in range(1, retry.attempts + 1):
        outcome = yield Send(timeout_s - (clock.now() - start))
        assert outcome is not None, "a Send is answered with its outcome"
        spent = clock.now() - start
        ended = Ended(outcome, tries, spent)
        if isinstance(outcome, Reply):
            died += outcome.status in DIED
            if outcome.status not in busy and not (outcome.status in DIED and died == 1):
                return ended
        wait = _wait_s(retry, tries, outcome, clock)
        if tries == retry.attempts or spent + wait >= timeout_s:
            return ended
        yield Wait(wait)
    raise AssertionError("unreachable")


def _wait_s(retry: Retry, tries: int, outcome: Reply | NoReply, clock: Clock) -> float:
    """Before the next try: our own wait, or the service's where that is longer."""
    longest = min(retry.longest_wait_s, retry.first_wait_s * 2 ** (tries - 1))
    ours = longest * clock.spread(0.5, 1.0)
    if isinstance(outcome, NoReply):
        return ours
    asked = retry_after_s(outcome.headers, clock.wall())
    return ours if asked is None else max(ours, asked + clock.spread(0.0, retry.first_wait_s))


def retry_after_s(headers: Mapping[str, str], wall: float) -> float | None:
    """What `Retry-After` asks for: seconds, or a date, which is held against the answer's own `Date`.

    None without one, and for one that cannot be read.
    """
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    then = _epoch(value)
    if then is None:
        return None
    now = _epoch(headers.get("date", ""))
    return max(0.0, then - (wall if now is None else now))


def _epoch(date: str) -> float | None:
    """An HTTP date in epoch seconds."""
    try:
        parsed = parsedate_to_datetime(date)
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None

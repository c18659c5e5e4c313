"""When the critic's client tries again, by a clock of the tests."""

from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sima_ray.client.retry import (
    Clock,
    Ended,
    NoReply,
    Reply,
    Retry,
    Send,
    Wait,
    exchange,
    retry_after_s,
)

NOW = 1_700_000_000.0
REFUSED = NoReply("refused")
BY_SECONDS = Retry(first_wait_s=1, longest_wait_s=5)


class Time:
    """A clock that moves only when it is told to; its jitter is always the higher end."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.clock = Clock(lambda: self.spent, lambda: NOW + self.spent, lambda low, high: high)


def play(
    *script: Reply | NoReply,
    retry: Retry = BY_SECONDS,
    timeout_s: float = 600.0,
    a_try_s: float = 0.0,
) -> tuple[Ended, list[float], list[float]]:
    """How it ended, the waits, and the time that was left at each try; the last answer repeats."""
    time, waits, left = Time(), list[float](), list[float]()
    steps = exchange(retry, timeout_s, time.clock)
    answers, told = list(script), None
    while True:
        try:
            step = steps.send(told)
        except StopIteration as end:
            return end.value, waits, left
        if isinstance(step, Wait):
            waits.append(step.seconds)
            time.spent, told = time.spent + step.seconds, None
        else:
            assert isinstance(step, Send)
            left.append(step.left_s)
            time.spent += a_try_s
            told = answers.pop(0) if len(answers) > 1 else answers[0]


@pytest.mark.parametrize("status", [200, 302, 400, 401, 404, 408, 413, 422, 504])
def test_an_answer_to_keep_ends_it(status: int) -> None:
    ended, waits, _ = play(Reply(status))
    assert (ended.outcome, ended.tries, waits) == (Reply(status), 1, [])


def test_waits_double_up_to_the_longest() -> None:
    ended, waits, _ = play(REFUSED)
    assert (ended.outcome, ended.tries) == (REFUSED, 6)
    assert waits == [1, 2, 4, 5, 5]


@pytest.mark.parametrize(
    "passing", [REFUSED, NoReply("broken"), Reply(429), Reply(503), Reply(500), Reply(502)]
)
def test_what_passes_is_tried_again(passing: Reply | NoReply) -> None:
    ended, waits, _ = play(passing, Reply(200))
    assert (ended.outcome, ended.tries, waits) == (Reply(200), 2, [1])


def test_a_dead_replica_is_tried_once_more_and_not_again() -> None:
    assert play(Reply(500))[0].tries == 2
    assert play(Reply(500), Reply(503), Reply(502))[0].tries == 3


def test_the_service_says_how_long_to_wait() -> None:
    busy = Reply(503, {"retry-after": "7"})
    assert play(busy, Reply(200))[1] == [8]  # and up to the first wait more, to spread out
    assert play(Reply(503, {"retry-after": "0"}), Reply(200))[1] == [1]
    date = Reply(429, {"retry-after": formatdate(NOW + 3, usegmt=True)})
    assert play(date, Reply(200))[1] == [4]


def test_a_wait_beyond_the_deadline_ends_it_at_once() -> None:
    ended, waits, _ = play(Reply(503, {"retry-after": "3600"}))
    assert (ended.tries, ended.seconds, waits) == (1, 0, [])


def test_the_deadline_is_of_everything() -> None:
    ended, waits, left = play(NoReply("broken"), timeout_s=10, a_try_s=3)
    assert (ended.tries, waits, left) == (3, [1, 2], [10, 6, 1])
    assert play(NoReply("broken"), timeout_s=9, a_try_s=3)[0].tries == 2


@given(
    st.lists(
        st.one_of(
            st.just(REFUSED),
            st.builds(
                Reply,
                st.sampled_from([200, 404, 429, 500, 502, 503, 504]),
                st.fixed_dictionaries({}, optional={"retry-after": st.text(max_size=12)}),
            ),
        ),
        min_size=1,
    ),
    st.builds(Retry, st.integers(1, 8), st.floats(0, 9), st.floats(0, 9)),
    st.floats(0.1, 100),
)
def test_bounds_hold_whatever_is_answered(
    script: list[Reply | NoReply], retry: Retry, timeout_s: float
) -> None:
    ended, waits, left = play(*script, retry=retry, timeout_s=timeout_s)
    assert 1 <= ended.tries <= retry.attempts
    assert len(left) == ended.tries == len(waits) + 1
    assert sum(waits) < timeout_s or not waits
    assert min(left) > 0 and min(waits, default=0) >= 0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "12"}, 12),
        ({"retry-after": " 12 "}, 12),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "1.5"}, None),
        ({"retry-after": "9" * 400}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "²"}, None),
        ({"retry-after": formatdate(NOW + 60, usegmt=True)}, 60),
        ({"retry-after": formatdate(NOW - 60, usegmt=True)}, 0),
        # A clock that goes wrong there, or here: the answer's own date is what counts.
        (
            {
                "retry-after": formatdate(NOW + 960, usegmt=True),
                "date": formatdate(NOW + 900, usegmt=True),
            },
            60,
        ),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers, NOW) == seconds


def test_settings_that_make_no_sense() -> None:
    for wrong in ({"attempts": 0}, {"first_wait_s": -1}, {"longest_wait_s": -1}):
        with pytest.raises(ValueError, match="at least one attempt"):
            Retry(**wrong)

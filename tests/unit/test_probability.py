"""How sure a critic is: values by hand, and exact mirrors."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sima_ray.critic.probability import mean_probability, probability_of
from sima_ray.critic.prompt import load_examples
from sima_ray.critic.verdict import VERDICTS, parse_verdict
from sima_ray.records import Order

logprobs = st.floats(max_value=0, allow_nan=False, width=32)
pairs = st.tuples(logprobs, logprobs)


def test_by_hand() -> None:
    """Softmax of log 0.6 and log 0.2 is 0.75 for the response that was shown first."""
    said = [math.log(0.6), math.log(0.2)]
    assert probability_of("12", "A reason.\nChoice: [[1]]", said) == pytest.approx(0.75)
    assert probability_of("21", "A reason.\nChoice: [[1]]", said) == pytest.approx(0.25)
    assert probability_of("12", "[[2]]", [-7.0, -7.0]) == 0.5
    assert probability_of("12", "[[1]]", [0.0, -math.inf]) == 1.0
    assert probability_of("21", "[[1]]", [0.0, -1e30]) == 0.0


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("[[1]]", None),
        ("[[1]]", [-math.inf, -math.inf]),
        ("No verdict: 1 or 2.", [-1.0, -2.0]),
        ("[[tie]]", [-1.0, -2.0]),
        ("[[1]] because 2 is wrong", [-1.0, -2.0]),  # what the model last wrote was no verdict
        ("[[2]] (not 1)", [-1.0, -2.0]),
    ],
)
def test_not_known(raw: str, said: list[float] | None) -> None:
    assert probability_of("12", raw, said) is None


def test_words_after_the_verdict_do_no_harm() -> None:
    assert probability_of("12", "In all 2 against 1. [[1]] That is all.", [-0.5, -0.5]) == 0.5


@given(pairs, pairs)
def test_swapped_responses_give_exactly_the_complement(
    a: tuple[float, float], b: tuple[float, float]
) -> None:
    """What is read in order "12" is what is read in "21" once the responses are swapped."""

    def asked(order: Order, said: tuple[float, float]) -> float | None:
        return probability_of(order, "[[1]]", said)

    there = mean_probability([asked("12", a), asked("21", b)])
    back = mean_probability([asked("12", b), asked("21", a)])
    assert (there is None) == (back is None)
    if there is not None and back is not None:
        assert there + back == 1 and 0 <= there <= 1
        assert there == mean_probability([asked("21", b), asked("12", a)])


def test_the_mean_needs_both_orders() -> None:
    assert mean_probability([0.25, 0.75]) == 0.5
    assert mean_probability([0.5, 1.0]) == 0.75
    for known in ([], [0.5], [0.5, None], [None, None]):
        assert mean_probability(known) is None


def test_the_verdicts_are_spelt_as_the_examples_spell_them() -> None:
    assert [parse_verdict(text)[1] for text in VERDICTS] == [1, 2]
    assert {f"Choice: [[{example.choice}]]" for example in load_examples()} == set(VERDICTS)

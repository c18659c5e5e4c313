"""The rule that ends rounds: gains, bounds, and a verdict that later rounds do not change."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sima_ray.config import EarlyStoppingConfig
from sima_ray.metrics.stopping import Verdict, judge

RULE = EarlyStoppingConfig()

shares = st.floats(0, 1)
figures = st.fixed_dictionaries(
    {"chair_s": shares, "recall": shares, "length": st.floats(0, 200), "errors": shares}
)
rules = st.builds(
    EarlyStoppingConfig,
    monitor=st.sampled_from(["chair_s", "errors"]),
    min_delta=st.floats(0, 0.5),
    patience=st.integers(1, 3),
    max_recall_drop=shares,
    max_length_drift=st.floats(0, 2),
)


def rounds(*chair: float, recall: float = 0.7, length: float = 40.0) -> list[dict[str, float]]:
    """Rounds with these CHAIR_s; recall and length are those of the last, the others stay."""
    all_ = [{"chair_s": value, "recall": 0.7, "length": 40.0} for value in chair]
    all_[-1] |= {"recall": recall, "length": length}
    return all_


def test_rounds_go_on_while_they_gain() -> None:
    assert judge(rounds(0.5), RULE) == Verdict(0, 0, False, "the base model is evaluated")
    assert judge(rounds(0.5, 0.4, 0.3), RULE) == Verdict(
        2, 2, False, "round 2: chair_s 0.400 of round 1 → 0.300, a gain"
    )


def test_no_gain_ends_them_and_the_best_is_kept() -> None:
    assert judge(rounds(0.5, 0.4, 0.4), RULE) == Verdict(
        2, 1, True, "round 2: chair_s 0.400 of round 1 → 0.400, no gain"
    )
    assert judge(rounds(0.5, 0.6), RULE) == Verdict(
        1, 0, True, "round 1: chair_s 0.500 of the base model → 0.600, no gain"
    )


def test_patience_bridges_rounds_without_a_gain() -> None:
    rule = EarlyStoppingConfig(patience=2)
    found = judge(rounds(0.5, 0.4, 0.45, 0.3, 0.35), rule)
    assert (found.last, found.best, found.stopped) == (4, 3, False)
    found = judge(rounds(0.5, 0.4, 0.45, 0.42, 0.1), rule)
    assert (found.last, found.best, found.stopped) == (3, 1, True)


def test_a_gain_may_have_to_be_of_some_size() -> None:
    rule = EarlyStoppingConfig(min_delta=0.05)
    assert judge(rounds(0.30, 0.25), rule).best == 1  # 0.30 - 0.25 < 0.05 in binary
    assert judge(rounds(0.30, 0.251), rule).best == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"recall": 0.67}, "round 2: recall fell from 0.700 to 0.670, by more than 0.02"),
        ({"length": 51.0}, "round 2: words a caption went from 40.0 to 51.0, by more than 25%"),
        ({"length": 29.0}, "round 2: words a caption went from 40.0 to 29.0, by more than 25%"),
    ],
)
def test_a_round_out_of_bounds_ends_them_whatever_it_gained(
    changes: dict[str, float], reason: str
) -> None:
    assert judge(rounds(0.5, 0.4, 0.1, **changes), RULE) == Verdict(2, 1, True, reason)


def test_the_bounds_themselves_are_within() -> None:
    assert not judge(rounds(0.5, 0.4, recall=0.68, length=50.0), RULE).stopped
    assert not judge(rounds(0.5, 0.4, recall=0.9, length=30.0), RULE).stopped


@given(st.lists(figures, min_size=1, max_size=6), rules)
def test_the_verdict_holds_however_many_rounds_follow(
    found: list[dict[str, float]], rule: EarlyStoppingConfig
) -> None:
    verdict = judge(found, rule)
    assert 0 <= verdict.best <= verdict.last < len(found)
    assert verdict.stopped or verdict.last == len(found) - 1
    if verdict.stopped:
        assert judge(found[: verdict.last + 1], rule) == verdict
        # A run that is taken up after any earlier round goes on to the same end.
        assert not any(judge(found[:k], rule).stopped for k in range(1, verdict.last + 1))
    best = found[verdict.best]
    assert best[rule.monitor] <= found[0][rule.monitor]
    assert best["recall"] >= found[0]["recall"] - rule.max_recall_drop - 1e-8

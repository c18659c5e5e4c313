"""Bootstrap intervals: coverage, pairing, reproducibility; and the summaries made of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sima_ray.errors import DataError
from sima_ray.metrics import bootstrap
from sima_ray.metrics.bootstrap import Estimate, Ratio, difference, interval
from sima_ray.metrics.chair import CaptionScore, chair
from sima_ray.metrics.summary import compare, ratios, summarise

counts = st.integers(0, 5)
QUICK = {"samples": 200, "confidence": 0.95}


def width(estimate: Estimate) -> float:
    return estimate.high - estimate.low


def test_value_and_reproducibility() -> None:
    ratio = Ratio.of([1, 0, 2, 5] * 9, [2, 0, 2, 6] * 9)
    estimate = interval(ratio, **QUICK, seed=3)
    assert estimate.value == 8 / 10
    assert estimate.low <= estimate.value <= estimate.high
    assert estimate == interval(ratio, **QUICK, seed=3)
    assert estimate != interval(ratio, **QUICK, seed=4)
    assert estimate.to_json() == {
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
    }


def test_equals_a_resampling_loop() -> None:
    # The same rows drawn one resample at a time, without weights.
    rng = np.random.default_rng(7)
    numerators, denominators = rng.integers(0, 4, 30), rng.integers(1, 5, 30)
    rng = np.random.default_rng(11)
    drawn = [rng.integers(0, 30, 30) for _ in range(200)]
    values = [numerators[rows].sum() / denominators[rows].sum() for rows in drawn]
    estimate = interval(Ratio.of(list(numerators), list(denominators)), **QUICK, seed=11)
    expected = np.quantile(values, [0.025, 0.975])
    assert [estimate.low, estimate.high] == pytest.approx(list(expected), abs=1e-12)


def test_blocks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    ratio = Ratio.mean(list(range(50)))
    whole = interval(ratio, **QUICK, seed=1)
    monkeypatch.setattr(bootstrap, "_BLOCK", 700)
    assert interval(ratio, **QUICK, seed=1) == whole


def test_coverage() -> None:
    # A ratio whose truth is known: mentions are Poisson(3), each hallucinated with probability 0.2.
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        mentions = rng.poisson(3, 150)
        wrong = rng.binomial(mentions, 0.2)
        estimate = interval(Ratio.of(list(wrong), list(mentions)), **QUICK, seed=trial)
        covered += estimate.low <= 0.2 <= estimate.high
    assert 180 <= covered <= 199  # 190 expected; the spread of 200 draws is 3


def test_pairing_narrows_the_interval() -> None:
    # Rows differ far more from each other than before differs from after.
    rng = np.random.default_rng(0)
    rows = rng.normal(10, 5, 300)
    before, after = Ratio.mean(list(rows)), Ratio.mean(list(rows - 0.3 + rng.normal(0, 0.1, 300)))
    paired = difference(before, after, **QUICK, seed=0)
    unpaired = difference(
        before, Ratio(after.numerator_R[::-1], after.denominator_R), **QUICK, seed=0
    )
    assert paired.value == pytest.approx(unpaired.value)
    assert paired.high < 0
    assert unpaired.low < 0 < unpaired.high
    assert width(paired) < width(unpaired) / 10


def test_no_difference_is_exactly_0() -> None:
    ratio = Ratio.of([1, 0, 2], [2, 1, 3])
    assert difference(ratio, ratio, **QUICK, seed=0) == Estimate(0.0, 0.0, 0.0)


@given(st.lists(st.tuples(counts, counts), min_size=1, max_size=20), st.integers(0, 3))
def test_swapping_sides_mirrors_the_difference(rows: list[tuple[int, int]], seed: int) -> None:
    before, after = (Ratio.mean(list(side)) for side in zip(*rows, strict=True))
    there = difference(before, after, **QUICK, seed=seed)
    back = difference(after, before, **QUICK, seed=seed)
    assert [back.value, back.low, back.high] == pytest.approx(
        [-there.value, -there.high, -there.low], abs=1e-12
    )


def test_nothing_below_the_line_is_0() -> None:
    assert interval(Ratio.of([0, 0], [0, 0]), **QUICK, seed=0) == Estimate(0.0, 0.0, 0.0)


def test_bad_rows_are_refused() -> None:
    with pytest.raises(DataError, match="no rows"):
        interval(Ratio.mean([]), **QUICK, seed=0)
    with pytest.raises(DataError, match="1 before, 2 after"):
        difference(Ratio.mean([1]), Ratio.mean([1, 2]), **QUICK, seed=0)


scores = st.builds(
    lambda named, wrong, recalled, words: CaptionScore(
        ("dog",) * (named + wrong), ("dog",) * wrong, recalled, recalled + 1, words
    ),
    *[counts] * 4,
)


@given(st.lists(scores, min_size=1, max_size=10))
def test_summary_has_chairs_own_values(scores: list[CaptionScore]) -> None:
    errors = [score.words for score in scores]
    summary = summarise(scores, errors, **QUICK, seed=0)
    values = {name: estimate.value for name, estimate in summary.items()}
    assert values.pop("errors") == values["length"]
    assert values == chair(scores).to_json()
    assert all(estimate.low <= estimate.high for estimate in summary.values())
    assert list(summarise(scores, **QUICK, seed=0)) == list(values)


def test_compare() -> None:
    before = [CaptionScore(("dog", "cat"), ("cat",), 1, 2, 9), CaptionScore((), (), 0, 1, 4)]
    after = [CaptionScore(("dog",), (), 1, 2, 5), CaptionScore(("man",), (), 1, 1, 4)]
    changes = compare(ratios(before, [1, 0]), ratios(after, [0, 0]), **QUICK, seed=0)
    assert {name: change.value for name, change in changes.items()} == pytest.approx(
        {
            "chair_s": -0.5,
            "chair_i": -0.5,
            "recall": 1 / 3,
            "objects": 0,
            "length": -2,
            "errors": -0.5,
        }
    )
    assert "errors" not in compare(ratios(before), ratios(after, [0, 0]), **QUICK, seed=0)


def test_errors_need_a_caption_each() -> None:
    with pytest.raises(DataError, match="1 captions were scored but the errors of 2 counted"):
        ratios([CaptionScore((), (), 0, 0, 0)], [1, 2])

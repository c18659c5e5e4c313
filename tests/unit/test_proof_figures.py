"""The proof's figures over seeds, the share of the oracle's gain, the choice and the gate."""

from typing import Any

import numpy as np
import pytest

from benchmarks.proof.choice import choose
from benchmarks.proof.figures import Bootstrap, aligned, gate, pooled, share_of_oracle
from benchmarks.proof.settings import FIGURES
from sima_ray.metrics.bootstrap import Ratio
from sima_ray.metrics.chair import score_caption
from sima_ray.runtime.evaluation import Caption

BOOTSTRAP = Bootstrap(samples=200, confidence=0.95)


def caption(row_id: str, text: str, errors: int) -> Caption:
    score = score_caption(text, frozenset({"dog", "cat"}))
    return Caption(row_id, f"{row_id}.png", "Describe.", text, score, errors)


def estimate(value: float, low: float | None = None, high: float | None = None) -> dict[str, float]:
    return {
        "value": value,
        "low": value if low is None else low,
        "high": value if high is None else high,
    }


def test_images_that_any_run_lacks_are_left_out_everywhere() -> None:
    arms = aligned(
        {
            "base": [
                [caption("b", "a dog", 1), caption("a", "a cat", 2), caption("c", "a bus", 3)]
            ],
            "critic": [[caption("a", "a cat", 0), caption("b", "a dog and a cat", 5)]],
        }
    )
    assert arms["base"][0]["errors"].numerator_R.tolist() == [2, 1]
    assert arms["critic"][0]["errors"].numerator_R.tolist() == [0, 5]


def test_seeds_are_pooled_image_by_image() -> None:
    seeds = [
        {"chair_i": Ratio.of([1, 0], [2, 3])},
        {"chair_i": Ratio.of([0, 2], [1, 4])},
        {"chair_i": Ratio.of([1, 1], [1, 1])},
    ]
    found = pooled(seeds)["chair_i"]
    assert found.numerator_R.tolist() == [2, 3]
    assert found.denominator_R.tolist() == [4, 8]
    assert found.value == 5 / 12
    assert seeds[0]["chair_i"].numerator_R.tolist() == [1, 0]  # the parts stay as they were


def test_three_equal_seeds_have_the_figures_of_one() -> None:
    captions = [caption("a", "a dog and a bus", 2), caption("b", "a cat", 1)]
    one = aligned({"arm": [captions]})["arm"]
    three = aligned({"arm": [captions] * 3})["arm"]
    assert BOOTSTRAP.figures(pooled(one)) == BOOTSTRAP.figures(pooled(three))
    assert set(BOOTSTRAP.figures(pooled(one))) == set(FIGURES)
    differences = BOOTSTRAP.difference(pooled(one), pooled(three))
    assert all(figure == estimate(0.0) for figure in differences.values())


def test_share_of_oracle_is_the_ratio_of_the_gains() -> None:
    rng = np.random.default_rng(0)
    base, critic, oracle = (rng.integers(0, 6, 50) + shift for shift in (4, 1, 0))
    # The arms have three seeds, the base one: what is compared is the mean over the seeds.
    columns = [
        {"errors": Ratio.mean(base.tolist())},
        {"errors": Ratio.of((3 * critic).tolist(), [3.0] * 50)},
        {"errors": Ratio.of((3 * oracle).tolist(), [3.0] * 50)},
    ]
    expected = (base.mean() - critic.mean()) / (base.mean() - oracle.mean())
    share = share_of_oracle(*columns)
    assert share.value == pytest.approx(expected)
    found = BOOTSTRAP.interval(share)
    assert found.low < expected < found.high


def settings(*figures: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"recall": estimate(recall), "errors": estimate(errors)} for recall, errors in figures]


def test_the_choice_is_the_fewest_errors_among_those_that_keep_recall() -> None:
    (base,) = settings((0.80, 2.0))
    assert choose(base, settings((0.85, 1.5), (0.795, 1.2), (0.78, 0.9))) == 1
    assert choose(base, settings((0.85, 1.2), (0.81, 1.2))) == 0  # the first of equals
    assert choose(base, settings((0.70, 0.5), (0.78, 1.9))) == 1  # none keeps it: highest recall


def critic(**changes: Any) -> dict[str, Any]:
    good = estimate(0.9)
    kinds = {key: [good, good] for key in ("accuracy", "equal_length", "longer_better")}
    found = {**kinds, "consistent": good, "unparseable": estimate(0.001)}
    return {"intervals": {**found, **changes}}


def measured() -> dict[str, Any]:
    """What the test measured, all of it good."""
    good = {"errors": estimate(0.5, 0.4, 0.6), "recall": estimate(-0.01, -0.03, 0.01)}
    arms = {
        "base": {"chair_s": estimate(0.40)},
        "critic": {"chair_s": estimate(0.28)},
    }
    differences = dict.fromkeys(("base", "random", "shorter", "greedy"), good)
    return {"arms": arms, "differences": differences, "share_of_oracle": estimate(0.85)}


POPE = {"random": 0.95, "popular": 0.9, "adversarial": 0.8}


def fails(lines: list[dict[str, Any]]) -> list[str]:
    return [line["what"] for line in lines if not line["holds"]]


def test_a_good_result_passes_every_line_of_the_gate() -> None:
    lines = gate(critic(), POPE, measured())
    assert fails(lines) == []
    assert len(lines) == 20
    assert all({"what", "must", "measured", "holds"} <= line.keys() for line in lines)


def test_each_demand_can_fail_by_itself() -> None:
    bad = [estimate(0.9), estimate(0.7)]
    assert fails(gate(critic(longer_better=bad), POPE, measured())) == [
        "critic, the better has more objects, order 21"
    ]
    found = critic(unparseable=estimate(0.01))
    assert fails(gate(found, POPE, measured())) == ["critic, unparseable"]
    assert fails(gate(critic(), POPE | {"popular": 0.79}, measured())) == ["POPE, popular"]


def test_a_control_must_be_worse_in_errors_and_not_better_in_recall() -> None:
    result = measured()
    result["differences"]["greedy"] = {
        "errors": estimate(0.1, -0.05, 0.2),  # the interval holds 0
        "recall": estimate(0.03, 0.01, 0.05),  # the control's recall is higher
    }
    lines = gate(critic(), POPE, result)
    assert fails(lines) == ["errors, critic − greedy", "recall, critic − greedy"]
    (line,) = (line for line in lines if line["what"] == "recall, critic − greedy")
    assert (line["measured"], line["low"], line["high"]) == (-0.03, -0.05, -0.01)


def test_against_the_base_chair_falls_by_a_quarter_and_recall_stays() -> None:
    result = measured()
    result["arms"]["critic"]["chair_s"] = estimate(0.31)
    result["differences"]["base"] = {"recall": estimate(0.011), "errors": estimate(0.5)}
    assert fails(gate(critic(), POPE, result)) == [
        "CHAIR_s, critic / base − 1",
        "recall, critic − base",
    ]


def test_what_was_left_out_does_not_hold() -> None:
    result = measured()
    del result["share_of_oracle"], result["differences"]["shorter"]
    lines = [line for line in gate(critic(), POPE, result) if not line["holds"]]
    assert len(lines) == 3
    assert all(line["measured"] is None for line in lines)

"""The proof's figures over seeds, their intervals, the share of the oracle's gain, and the choice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.proof.choice import choose
from benchmarks.proof.figures import aligned, compared
from benchmarks.proof.intervals import Columns, Resamples, Sampled
from benchmarks.proof.settings import FIGURES
from sima_ray.config import RunConfig
from sima_ray.metrics.bootstrap import Ratio, interval
from sima_ray.metrics.chair import score_caption
from sima_ray.runtime.evaluation import Caption

DEMO = RunConfig.load(Path(__file__).parents[2] / "configs" / "demo.yaml")
assert DEMO.evaluation is not None
SETTINGS = DEMO.evaluation
IMAGES = 60


def caption(row_id: str, text: str, errors: int) -> Caption:
    score = score_caption(text, frozenset({"dog", "cat"}))
    return Caption(row_id, f"{row_id}.png", "Describe.", text, score, errors)


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value, "high": value}


def arm(*means: float, spread: float = 1.0) -> list[Columns]:
    """Seeds whose figures vary over the images about these means."""
    rng = np.random.default_rng(len(means))
    return [
        {name: Ratio.mean(rng.normal(mean, spread, IMAGES).tolist()) for name in FIGURES}
        for mean in means
    ]


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


def test_the_figure_of_several_seeds_is_that_of_all_their_captions() -> None:
    seeds = [{name: Ratio.of([1, 0], [2, 3]) for name in FIGURES}]
    seeds += [{name: Ratio.of([0, 2], [1, 4]) for name in FIGURES}]
    seeds += [{name: Ratio.of([1, 1], [1, 1]) for name in FIGURES}]
    assert Resamples(2, SETTINGS).arm("critic", seeds)["chair_i"].value == 5 / 12


def test_three_equal_seeds_have_the_figures_of_one() -> None:
    captions = [caption("a", "a dog and a bus", 2), caption("b", "a cat", 1)]
    seeds = aligned({"one": [captions], "three": [captions] * 3})
    resamples = Resamples(2, SETTINGS)
    one, three = (resamples.arm(name, seeds[name]) for name in ("one", "three"))
    assert set(one) == set(three) == set(FIGURES)
    for name in FIGURES:
        np.testing.assert_allclose(one[name].values_S, three[name].values_S)
        difference = (one[name] - three[name]).interval(0.95)
        assert list(difference.values()) == pytest.approx([0.0, 0.0, 0.0])


def test_with_one_seed_it_is_the_interval_over_images() -> None:
    (seed,) = arm(1.0)
    found = Resamples(IMAGES, SETTINGS).arm("base", [seed])["errors"].interval(0.95)
    other = interval(seed["errors"], samples=2000, confidence=0.95, seed=5)
    assert found["value"] == other.value
    assert found["low"] == pytest.approx(other.low, abs=0.03)
    assert found["high"] == pytest.approx(other.high, abs=0.03)


def test_seeds_that_differ_widen_the_interval() -> None:
    def width(*means: float) -> float:
        found = Resamples(IMAGES, SETTINGS).arm("critic", arm(*means, spread=0.01))
        ends = found["errors"].interval(0.95)
        return ends["high"] - ends["low"]

    # By hand: all three draws are one seed's in a ninth of the resamples, so the ends are the seeds themselves.
    assert width(1.0, 2.0, 3.0) == pytest.approx(2.0, abs=0.02)
    assert width(2.0, 2.0, 2.0) < 0.01


def test_arms_share_their_images_but_not_their_draws_of_seeds() -> None:
    resamples, seeds = Resamples(IMAGES, SETTINGS), arm(1.0, 2.0, 3.0)
    one, other = (resamples.arm(name, seeds)["errors"] for name in ("critic", "random"))
    apart = (one - other).interval(0.95)
    assert apart["value"] == 0.0 and apart["high"] - apart["low"] > 1
    one, other = (resamples.arm(name, arm(1.0))["errors"] for name in ("critic", "random"))
    np.testing.assert_array_equal(one.values_S, other.values_S)  # one seed: only images are drawn


def test_a_quotient_by_nothing_is_0() -> None:
    found = Sampled(1.0, np.array([1.0, 2.0])) / Sampled(0.0, np.array([0.0, 4.0]))
    assert (found.value, found.values_S.tolist()) == (0.0, [0.0, 0.5])


def test_the_critic_is_compared_with_every_other_arm() -> None:
    arms = {
        "base": arm(4.0),
        "critic": arm(2.0, 2.1),
        "greedy": arm(3.0, 3.2),
        "oracle": arm(1.5, 1.6),
    }
    found = compared(arms, SETTINGS)
    value = {name: figures["errors"]["value"] for name, figures in found["arms"].items()}
    assert found["images"] == IMAGES
    assert found["differences"].keys() == {"base", "greedy", "oracle"}
    greedy = found["differences"]["greedy"]["errors"]
    assert greedy["value"] == pytest.approx(value["critic"] - value["greedy"])
    assert greedy["low"] < greedy["value"] < greedy["high"] < 0
    share, change = found["share_of_oracle"], found["chair_s_change"]
    expected = (value["base"] - value["critic"]) / (value["base"] - value["oracle"])
    assert share["value"] == pytest.approx(expected)
    assert share["low"] < expected < share["high"]
    chair = {name: figures["chair_s"]["value"] for name, figures in found["arms"].items()}
    assert change["value"] == pytest.approx(chair["critic"] / chair["base"] - 1)
    assert len(found["arms"]["critic"]["by_seed"]["errors"]) == 2


def settings(*figures: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"recall": estimate(recall), "errors": estimate(errors)} for recall, errors in figures]


def test_the_choice_is_the_fewest_errors_among_those_that_keep_recall() -> None:
    (base,) = settings((0.80, 2.0))
    assert choose(base, settings((0.85, 1.5), (0.795, 1.2), (0.78, 0.9))) == 1
    assert choose(base, settings((0.85, 1.2), (0.81, 1.2))) == 0  # the first of equals
    assert choose(base, settings((0.70, 0.5), (0.78, 1.9))) == 1  # none keeps it: highest recall

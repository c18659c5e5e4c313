"""Figures of arms over seeds: pooled by image, compared image by image; and what the gate demands of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.proof.settings import CONTROLS, CRITIC, FIGURES, POPE_KINDS
from sima_ray.config import EvaluationConfig
from sima_ray.metrics.bootstrap import Estimate, Ratio, interval
from sima_ray.metrics.summary import compare
from sima_ray.ports import JsonDict
from sima_ray.runtime.evaluation import Caption, columns

Columns = Mapping[str, Ratio]
"""The columns of every figure, a row an image."""

SEED = 0
"""Of every bootstrap."""


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How intervals are drawn."""

    samples: int
    confidence: float

    @classmethod
    def of(cls, settings: EvaluationConfig) -> "Bootstrap":
        """As the config says."""
        return cls(settings.bootstrap_samples, settings.confidence)

    def figures(self, arm: Columns) -> dict[str, JsonDict]:
        """Every figure with its interval."""
        return {name: self.interval(arm[name]).to_json() for name in FIGURES}

    def interval(self, ratio: Ratio) -> Estimate:
        """One figure with its interval."""
        return interval(ratio, samples=self.samples, confidence=self.confidence, seed=SEED)

    def difference(self, before: Columns, after: Columns) -> dict[str, JsonDict]:
        """after − before of every figure, paired by image."""
        found = compare(before, after, samples=self.samples, confidence=self.confidence, seed=SEED)
        return {name: found[name].to_json() for name in FIGURES}


def aligned(arms: Mapping[str, Sequence[list[Caption]]]) -> dict[str, list[dict[str, Ratio]]]:
    """The columns of every arm and seed, over the images that all of them have a caption of, in one order.

    Args:
        arms: For each arm the captions of each seed.
    """
    runs = [captions for seeds in arms.values() for captions in seeds]
    common = set.intersection(*({c.row_id for c in captions} for captions in runs))
    return {
        name: [columns(_ordered(captions, common)) for captions in seeds]
        for name, seeds in arms.items()
    }


def _ordered(captions: list[Caption], kept: set[str]) -> list[Caption]:
    return sorted((c for c in captions if c.row_id in kept), key=lambda c: c.row_id)


def pooled(seeds: Sequence[Columns]) -> dict[str, Ratio]:
    """The columns of several seeds as one: each image's numerators added up, and its denominators."""
    return {
        name: Ratio(
            sum((seed[name].numerator_R for seed in seeds[1:]), ratio.numerator_R),
            sum((seed[name].denominator_R for seed in seeds[1:]), ratio.denominator_R),
        )
        for name, ratio in seeds[0].items()
    }


def share_of_oracle(base: Columns, critic: Columns, oracle: Columns) -> Ratio:
    """How much of the errors that the oracle's preferences take away the critic's take away too.

    (base − critic) / (base − oracle) in errors a caption. Every image counts the same, so that it is the ratio
    of two sums over images, and is resampled as any other figure.
    """
    base_R, critic_R, oracle_R = (
        arm["errors"].numerator_R / arm["errors"].denominator_R for arm in (base, critic, oracle)
    )
    return Ratio(base_R - critic_R, base_R - oracle_R)


def gate(critic: JsonDict, pope: Mapping[str, float], test: JsonDict) -> list[JsonDict]:
    """What must hold, line by line: {what, must, measured, holds} and, where there is one, the interval.

    Args:
        critic: From `critic.figures`, of the config's layout.
        pope: Accuracy of the base by kind.
        test: `arms`, `differences` and `share_of_oracle`; a line of an arm that was left out does not hold.
    """
    return [
        *_critic_lines(critic),
        *(_at_least(f"POPE, {kind}", pope.get(kind), 0.80) for kind in POPE_KINDS),
        *(line for control in CONTROLS for line in _control_lines(control.name, test)),
        *_base_lines(test),
        _at_least("share of the oracle's gain", test.get("share_of_oracle"), 0.80),
    ]


def _critic_lines(critic: JsonDict) -> list[JsonDict]:
    kinds = {
        "accuracy": ("critic's accuracy", 0.80),
        "equal_length": ("critic, equally many objects", 0.75),
        "longer_better": ("critic, the better has more objects", 0.75),
    }
    lines = [
        _at_least(f"{what}, order {order}", critic["intervals"][key][at], least)
        for key, (what, least) in kinds.items()
        for at, order in enumerate(("12", "21"))
    ]
    lines.append(_at_least("critic, both orders agree", critic["intervals"]["consistent"], 0.80))
    answer = critic["intervals"]["unparseable"]
    return [*lines, _line("critic, unparseable", "< 0.01", answer, answer["value"] < 0.01)]


def _control_lines(control: str, test: JsonDict) -> list[JsonDict]:
    """The critic minus a control, after one round."""
    difference = test["differences"].get(control)
    errors, recall = (
        _negative(difference[key]) if difference else None for key in ("errors", "recall")
    )
    return [
        _line(
            f"errors, critic − {control}",
            "interval below 0",
            errors,
            errors is not None and errors["high"] < 0,
        ),
        _line(
            f"recall, critic − {control}",
            "interval not below 0",
            recall,
            recall is not None and recall["high"] >= 0,
        ),
    ]


def _base_lines(test: JsonDict) -> list[JsonDict]:
    base, critic = test["arms"]["base"], test["arms"][CRITIC.name]
    before, after = base["chair_s"]["value"], critic["chair_s"]["value"]
    change = after / before - 1 if before else 0.0
    recall = _negative(test["differences"]["base"]["recall"])
    return [
        _line("CHAIR_s, critic / base − 1", "≤ -0.25", {"value": change}, change <= -0.25),
        _line("recall, critic − base", "≥ -0.01", recall, recall["value"] >= -0.01),
    ]


def _at_least(what: str, figure: JsonDict | float | None, least: float) -> JsonDict:
    found = {"value": figure} if isinstance(figure, float | int) else figure
    holds = found is not None and found["value"] >= least
    return _line(what, f"≥ {least:.2f}", found, holds)


def _line(what: str, must: str, figure: JsonDict | None, holds: bool) -> JsonDict:
    found = figure or {"value": None}
    ends = {key: found[key] for key in ("low", "high") if key in found}
    return {"what": what, "must": must, "measured": found["value"], **ends, "holds": holds}


def _negative(figure: JsonDict) -> JsonDict:
    """A difference seen from the other side."""
    return {"value": -figure["value"], "low": -figure["high"], "high": -figure["low"]}

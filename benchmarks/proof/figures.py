"""Figures of arms over seeds, the critic's arm against each other one, and the share of the oracle's gain."""

from collections.abc import Mapping, Sequence

from benchmarks.proof.intervals import Columns, Resamples
from benchmarks.proof.settings import BASE, CRITIC, FIGURES, ORACLE
from sima_ray.config import EvaluationConfig
from sima_ray.metrics.bootstrap import Ratio
from sima_ray.ports import JsonDict
from sima_ray.runtime.evaluation import Caption, columns

DIFFERENCES_ARE = "the critic's arm minus the named one, paired by image, after one round"


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


def compared(arms: Mapping[str, Sequence[Columns]], settings: EvaluationConfig) -> JsonDict:
    """All arms with intervals over test images and seeds, and the critic's against the others.

    Args:
        arms: From `aligned`; the base's and the critic's are among them.

    Returns:
        `images`, `arms`, `differences` (and `differences_are`, their sign), `chair_s_change` (critic / base − 1)
        and, where there is the oracle's arm, `share_of_oracle`: how much of the errors that the oracle's
        preferences take away the critic's take away too, (base − critic) / (base − oracle).
    """
    images, confidence = arms[BASE][0]["errors"].rows, settings.confidence
    resamples = Resamples(images, settings)
    sampled = {name: resamples.arm(name, seeds) for name, seeds in arms.items()}
    base, critic = sampled[BASE], sampled[CRITIC.name]
    found: JsonDict = {"images": images, "arms": {}, "differences_are": DIFFERENCES_ARE}
    found["differences"] = {}
    for name, arm in sampled.items():
        found["arms"][name] = {
            **{key: arm[key].interval(confidence) for key in FIGURES},
            "by_seed": {key: [seed[key].value for seed in arms[name]] for key in FIGURES},
        }
        if name != CRITIC.name:
            found["differences"][name] = {
                key: (critic[key] - arm[key]).interval(confidence) for key in FIGURES
            }
    change = (critic["chair_s"] - base["chair_s"]) / base["chair_s"]
    found["chair_s_change"] = change.interval(confidence)
    if ORACLE.name in sampled:
        gain = base["errors"] - sampled[ORACLE.name]["errors"]
        share = (base["errors"] - critic["errors"]) / gain
        found["share_of_oracle"] = share.interval(confidence)
    return found

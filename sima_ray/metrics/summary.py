"""The figures of an evaluation with their intervals, and what changed between two evaluations."""

from collections.abc import Mapping, Sequence

from sima_ray.errors import DataError
from sima_ray.metrics.bootstrap import Estimate, Ratio, difference, interval
from sima_ray.metrics.chair import CaptionScore, chair_ratios


def ratios(scores: Sequence[CaptionScore], errors: Sequence[int] | None = None) -> dict[str, Ratio]:
    """The columns of every figure: chair_s, chair_i, recall, objects, length and, where counted,
    errors.

    Args:
        scores: One a caption.
        errors: Errors of each caption against its ground truth, in the same order.

    Raises:
        DataError: Not one count of errors a caption.
    """
    columns = chair_ratios(scores)
    if errors is None:
        return columns
    if len(errors) != len(scores):
        raise DataError(
            f"{len(scores)} captions were scored but the errors of {len(errors)} counted"
        )
    return {**columns, "errors": Ratio.mean(errors)}


def summarise(
    scores: Sequence[CaptionScore],
    errors: Sequence[int] | None = None,
    *,
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, Estimate]:
    """Every figure of one evaluation, by name, with its interval.

    Args, raises: see `ratios` and `bootstrap.interval`.
    """
    return {
        name: interval(ratio, samples=samples, confidence=confidence, seed=seed)
        for name, ratio in ratios(scores, errors).items()
    }


def compare(
    before: Mapping[str, Ratio],
    after: Mapping[str, Ratio],
    *,
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, Estimate]:
    """after − before of every figure that both have, paired by row.

    Args:
        before, after: From `ratios`, over captions of the same images in the same order.

    Raises:
        DataError: The two have different numbers of rows, or none.
    """
    return {
        name: difference(ratio, after[name], samples=samples, confidence=confidence, seed=seed)
        for name, ratio in before.items()
        if name in after
    }

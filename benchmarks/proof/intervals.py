"""Intervals: Wilson's of a share; of arms, from test images and seeds drawn anew.

Dimensions: S resamples, R images, K seeds of an arm.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from benchmarks.proof.settings import FIGURES
from sima_ray.config import EvaluationConfig
from sima_ray.metrics.bootstrap import Ratio
from sima_ray.ports import JsonDict

FloatArray = NDArray[np.float64]
Columns = Mapping[str, Ratio]
"""The columns of every figure, a row an image."""

SEED = 0
"""Of every draw."""


def wilson(hits: int, of: int, confidence: float) -> JsonDict:
    """A share with Wilson's interval: value, low, high, hits, of. Of nothing, 0 in [0, 1]."""
    if of == 0:
        return {"value": 0.0, "low": 0.0, "high": 1.0, "hits": 0, "of": 0}
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, spread = hits / of, z * z / of
    middle = (p + spread / 2) / (1 + spread)
    half = z * math.sqrt(p * (1 - p) / of + spread / (4 * of)) / (1 + spread)
    # At the ends the interval reaches exactly 0 or 1, which rounding would miss.
    low, high = (middle - half if hits else 0.0), (middle + half if hits < of else 1.0)
    return {"value": p, "low": low, "high": high, "hits": hits, "of": of}


@dataclass(frozen=True, eq=False)
class Sampled:
    """A figure, and what it is in every resample; what is calculated from several is so in each resample.

    Attributes:
        value: From all images and seeds.
        values_S: From each resample.
    """

    value: float
    values_S: FloatArray

    def __sub__(self, other: "Sampled") -> "Sampled":
        return Sampled(self.value - other.value, self.values_S - other.values_S)

    def __truediv__(self, other: "Sampled") -> "Sampled":
        """The quotient; 0 where it is by 0."""
        quotients_S = np.zeros_like(self.values_S)
        np.divide(self.values_S, other.values_S, out=quotients_S, where=other.values_S != 0)
        return Sampled(self.value / other.value if other.value else 0.0, quotients_S)

    def interval(self, confidence: float) -> JsonDict:
        """The value with its percentile interval: value, low, high."""
        tail = (1 - confidence) / 2
        low, high = np.quantile(self.values_S, [tail, 1 - tail])
        return {"value": self.value, "low": float(low), "high": float(high)}


class Resamples:
    """Draws with replacement on two levels: test images, the same ones for all arms; and each arm's seeds.

    So arms are compared image by image, while what training itself varies by is not taken to be alike in two arms.
    An arm of one seed, as the base is, has that one in every resample.
    """

    def __init__(self, images: int, settings: EvaluationConfig) -> None:
        self._samples = settings.bootstrap_samples
        self._images_SR = _drawn(np.random.default_rng(SEED), images, self._samples)

    def arm(self, name: str, seeds: Sequence[Columns]) -> dict[str, Sampled]:
        """Every figure of an arm over its seeds, from sums over the images and seeds of each resample.

        Args:
            name: The arm's: its draws of seeds depend on no other arm.
            seeds: The columns of each seed, over the same images in the same order.
        """
        rng = np.random.default_rng([SEED, *name.encode()])
        seeds_SK = _drawn(rng, len(seeds), self._samples)
        weights_SKR = seeds_SK[:, :, None] * self._images_SR[:, None, :]
        weights_SP = weights_SKR.reshape(self._samples, -1)  # P: pairs of a seed and an image
        found: dict[str, Sampled] = {}
        for figure in FIGURES:
            ratio = _joined([seed[figure] for seed in seeds])
            found[figure] = Sampled(ratio.value, ratio.resampled(weights_SP))
        return found


def _drawn(rng: np.random.Generator, of: int, samples: int) -> FloatArray:
    """How often each of so many things is drawn in each resample, shape (S, of)."""
    return rng.multinomial(of, np.full(of, 1 / of), size=samples).astype(np.float64)


def _joined(seeds: Sequence[Ratio]) -> Ratio:
    return Ratio(
        np.concatenate([seed.numerator_R for seed in seeds]),
        np.concatenate([seed.denominator_R for seed in seeds]),
    )

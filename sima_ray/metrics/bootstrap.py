"""Seeded bootstrap intervals over rows, paired where two runs answered the same rows.

Every figure here is a ratio of two sums over rows: a mean is one whose denominators are all 1. The
rows are drawn, never the mentions inside them, since mentions of one caption are not independent.

Dimensions: R rows, S resamples.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from sima_ray.errors import DataError

FloatArray = NDArray[np.float64]

_BLOCK = 2_000_000  # resampled row numbers held at once


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its bootstrap interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """The estimate as plain values."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Ratio:
    """Σ numerator / Σ denominator over rows; 0 where there is nothing below the line.

    Attributes:
        numerator_R, denominator_R: One value a row.
    """

    numerator_R: FloatArray
    denominator_R: FloatArray

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Self:
        """A ratio of two columns of equal length."""
        assert len(numerators) == len(denominators), "one numerator and one denominator a row"
        return cls(np.asarray(numerators, np.float64), np.asarray(denominators, np.float64))

    @classmethod
    def mean(cls, values: Sequence[float]) -> Self:
        """The mean of a column."""
        return cls.of(values, [1.0] * len(values))

    @property
    def rows(self) -> int:
        """R."""
        return len(self.numerator_R)

    @property
    def value(self) -> float:
        """The ratio over the rows as they are."""
        return float(_divide(self.numerator_R.sum(), self.denominator_R.sum()))

    def resampled(self, weights_SR: FloatArray) -> FloatArray:
        """The ratio of each resample, shape (S,); weights_SR says how often it drew each row."""
        return _divide(weights_SR @ self.numerator_R, weights_SR @ self.denominator_R)


def interval(ratio: Ratio, *, samples: int, confidence: float, seed: int) -> Estimate:
    """A figure with its percentile interval.

    Args:
        ratio: The figure's columns.
        samples: Resamples to draw.
        confidence: Share of the resamples inside the interval, such as 0.95.
        seed: Equal seeds draw equal rows.

    Raises:
        DataError: There are no rows.
    """
    return _estimate(ratio.value, ratio.rows, ratio.resampled, samples, confidence, seed)


def difference(
    before: Ratio, after: Ratio, *, samples: int, confidence: float, seed: int
) -> Estimate:
    """after − before, row by row the same rows: each resample draws a row for both at once.

    Args, raises: as `interval`; also DataError when the two have different numbers of rows.
    """
    if before.rows != after.rows:
        raise DataError(
            f"a paired comparison needs the same rows on both sides: {before.rows} before, "
            f"{after.rows} after"
        )

    def statistic(weights_SR: FloatArray) -> FloatArray:
        return after.resampled(weights_SR) - before.resampled(weights_SR)

    value = after.value - before.value
    return _estimate(value, before.rows, statistic, samples, confidence, seed)


def _estimate(
    value: float,
    rows: int,
    statistic: Callable[[FloatArray], FloatArray],
    samples: int,
    confidence: float,
    seed: int,
) -> Estimate:
    if rows == 0:
        raise DataError("there are no rows to estimate a figure from")
    values_S = np.concatenate([statistic(block) for block in _weights(rows, samples, seed)])
    tail = (1 - confidence) / 2
    low, high = np.quantile(values_S, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def _weights(rows: int, samples: int, seed: int) -> Iterator[FloatArray]:
    """How often each resample drew each row, in blocks of resamples, shape (block, R)."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // rows)
    for start in range(0, samples, block):
        size = min(block, samples - start)
        drawn = rng.integers(0, rows, size=(size, rows)) + rows * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * rows)
        yield counts.reshape(size, rows).astype(np.float64)


def _divide(numerators: FloatArray, denominators: FloatArray) -> FloatArray:
    return np.divide(
        numerators, denominators, out=np.zeros_like(numerators), where=np.not_equal(denominators, 0)
    )

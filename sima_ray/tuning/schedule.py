"""Which pairs a step trains on, in which micro batches, on which worker.

A step's pairs are a function of seed, epoch and step alone. How they are cut into micro batches may depend on the
number of workers, and changes a step by no more than rounding.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sima_ray.records import PreferencePair

MicroRows = Sequence[int | None]
"""The rows of one micro batch; None is a filler of weight 0."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which pairs each step trains on, whatever the number of workers.

    A step's batch is `batch_size` rows, and what is left for the last of an epoch, so that every pair is seen
    exactly once an epoch.

    Attributes:
        pairs: How many.
        batch_size: Pairs a step.
        epochs: How often each pair is seen.
        seed: Of the order.
        window: Steps whose pairs are sorted by length before they are cut into batches; 1 sorts nothing.
        lengths: Of each pair, for the sorting alone.
    """

    pairs: int
    batch_size: int
    epochs: int
    seed: int
    window: int = 1
    lengths: tuple[int, ...] = ()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return -(-self.pairs // self.batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def batch(self, step: int) -> tuple[int, ...]:
        """The rows of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return _epoch(self, epoch)[place]

    def ends_epoch(self, step: int) -> bool:
        """Whether a step, counted from 0, is the last of its epoch."""
        return (step + 1) % self.steps_per_epoch == 0


def order(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits `count` pairs: a function of its arguments alone."""
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()


@lru_cache(maxsize=4)
def _epoch(schedule: Schedule, epoch: int) -> list[tuple[int, ...]]:
    """The batches of an epoch, in order."""
    rows = order(schedule.pairs, schedule.seed, epoch)
    size = schedule.batch_size
    if schedule.window == 1:
        return _cut(rows, size)
    batches: list[tuple[int, ...]] = []
    for number, window in enumerate(_cut(rows, size * schedule.window)):
        # Sorting keeps the drawn order of equals, so that no two epochs pair the same rows up.
        by_length = _cut(sorted(window, key=lambda row: schedule.lengths[row]), size)
        places = np.random.default_rng([schedule.seed, epoch, number]).permutation(len(by_length))
        batches += [by_length[place] for place in places]
    return batches


def hold_out(
    pairs: Sequence[PreferencePair], share: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Split pairs into those to train on and those to evaluate on, by row id and seed alone.

    A row keeps its side when other rows come or go. About `share` of the rows are held out.
    """

    def held(pair: PreferencePair) -> bool:
        digest = hashlib.blake2b(f"{seed}:{pair.row_id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < share * 2**64

    return [p for p in pairs if not held(p)], [p for p in pairs if held(p)]


def micro_batches(
    rows: Sequence[int], widths: Sequence[int], *, size: int, budget: int | None = None
) -> list[list[int]]:
    """Cut a batch into micro batches.

    Args:
        rows: Of the batch.
        widths: Of every pair that there is: tokens of its longer row.
        size: Pairs a micro batch, in the order of `rows`, where there is no budget.
        budget: Padded tokens a forward pass may have, two rows a pair. The batch is sorted by width first, so
            that little is padding. A pair that alone is over the budget stays alone.
    """
    if budget is None:
        return [list(part) for part in _cut(rows, size)]
    micros: list[list[int]] = []
    for row in sorted(
        rows, key=lambda row: -widths[row]
    ):  # the first of a micro batch is its widest
        if micros and padded(micros[-1], widths, extra=1) <= budget:
            micros[-1].append(row)
        else:
            micros.append([row])
    return micros


def padded(micro: Sequence[int], widths: Sequence[int], extra: int = 0) -> int:
    """Padded tokens of a forward pass over these pairs, and `extra` more that are no wider."""
    return 2 * (len(micro) + extra) * max(widths[row] for row in micro)


def share(
    micros: Sequence[list[int]], widths: Sequence[int], rank: int, world: int
) -> list[MicroRows]:
    """One worker's micro batches of a step; all workers get equally many.

    The costliest micro batches are halved until there is one for every worker, and fillers make up what is
    missing where there is nothing to halve. Each round of micro batches is of about one cost.
    """
    parts = [list(micro) for micro in micros]
    while len(parts) % world:
        costliest = max(parts, key=lambda micro: (len(micro) > 1) * padded(micro, widths))
        if len(costliest) == 1:
            break
        parts.remove(costliest)
        half = -(-len(costliest) // 2)
        parts += [costliest[:half], costliest[half:]]
    if world > 1:
        parts.sort(key=lambda micro: -padded(micro, widths))
    return deal(parts, rank, world)


def deal(micros: Sequence[list[int]], rank: int, world: int) -> list[MicroRows]:
    """One worker's micro batches, as they are; fillers make up what is missing for all to get equally many."""
    rows: list[MicroRows] = [*micros]
    rows += [[None] for _ in range(-len(rows) % world)]
    return rows[rank::world]


def _cut(rows: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(rows[start : start + size]) for start in range(0, len(rows), size)]

"""Micro batches made ready: pairs read and encoded, beside their references, before anything is computed.

What is wrong with a pair comes to light here, where all workers can still stop together: one that left alone
would leave the others waiting in a collective.

Dimensions: B pairs of a micro batch.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from sima_ray.errors import TrainingError
from sima_ray.records import PreferencePair
from sima_ray.tuning.dataset import EncodedPair, PairEncoder, SetAside, UnusablePair
from sima_ray.tuning.engine import gather_lists
from sima_ray.tuning.reference import Reference
from sima_ray.tuning.schedule import MicroRows


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward and backward pass takes.

    Attributes:
        pairs: B of them; fillers that make up a batch's number repeat another pair, with weight 0.
        weights_B: float32.
        reference_chosen_B, reference_rejected_B: Reference log-probabilities, float64.
    """

    pairs: Sequence[EncodedPair]
    weights_B: Tensor
    reference_chosen_B: Tensor
    reference_rejected_B: Tensor


@dataclass(frozen=True, slots=True)
class Read:
    """Micro batches that were read and encoded, and what is wrong with pairs that cannot be."""

    micro_batches: list[MicroBatch]
    problems: list[str]

    def agreed(self) -> list[MicroBatch]:
        """The micro batches; every worker must call this.

        Raises:
            TrainingError: On all workers alike, where a pair of any of them is no longer what the reference saw.
        """
        if problems := sorted(gather_lists(self.problems)):
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise TrainingError(
                f"{problems[0]}; it has changed since the run began{more}. Put back what the run "
                "began with, or begin anew in another output folder"
            )
        return self.micro_batches


class Pairs:
    """The pairs of a run, or of its evaluation, ready to be made into micro batches."""

    def __init__(
        self,
        pairs: Sequence[PreferencePair],
        references: Mapping[str, Reference],
        encoder: PairEncoder,
    ) -> None:
        """Args:
        pairs: All usable.
        references: Of these and maybe others, by row id.
        encoder: The one that the references were computed with.
        """
        self._pairs = pairs
        self._references = [references[pair.row_id] for pair in pairs]
        self._encoder = encoder
        self.widths = tuple(reference.width or 0 for reference in self._references)

    def __len__(self) -> int:
        return len(self._pairs)

    def weight(self, rows: Sequence[int]) -> float:
        """Of these rows together."""
        return sum(self._pairs[row].weight for row in rows)

    def read(self, micros: Sequence[MicroRows]) -> "Read":
        """This worker's micro batches, as far as it can tell; for any thread."""
        narrowest = min(range(len(self._pairs)), key=self.widths.__getitem__)
        found: list[MicroBatch] = []
        problems: list[str] = []
        for micro in micros:
            try:
                found.append(self._micro_batch(micro, narrowest))
            except UnusablePair as problem:
                problems.append(str(problem))
        return Read(found, problems)

    def _micro_batch(self, micro: MicroRows, filler: int) -> MicroBatch:
        rows = [filler if row is None else row for row in micro]
        references = [self._references[row] for row in rows]
        pairs = [self._encoded(row) for row in rows]
        weights = [0.0 if row is None else self._pairs[row].weight for row in micro]
        return MicroBatch(
            pairs=pairs,
            weights_B=torch.tensor(weights),
            reference_chosen_B=_column([r.chosen_logp for r in references]),
            reference_rejected_B=_column([r.rejected_logp for r in references]),
        )

    def _encoded(self, row: int) -> EncodedPair:
        pair, reference = self._pairs[row], self._references[row]
        encoded = self._encoder.encode(pair)
        if encoded.image_digest != reference.image_digest:
            raise UnusablePair(
                pair.row_id, SetAside.CHANGED_IMAGE, f"image {pair.image} is another"
            )
        return encoded


class Ahead:
    """Reads the next step's pairs in a thread while this step is computed."""

    def __init__(self, read: Callable[[int], Read]) -> None:
        """Args:
        read: What a step takes, whatever was read before.
        """
        self._read = read
        self._reader = ThreadPoolExecutor(1, "next-step")
        self._next: tuple[int, Future[Read]] | None = None

    def __call__(self, step: int, steps: int) -> Read:
        """What a step takes; the one after it is begun, if it is below `steps`."""
        ahead, self._next = self._next, None
        found = ahead[1].result() if ahead and ahead[0] == step else self._read(step)
        if step + 1 < steps:
            self._next = step + 1, self._reader.submit(self._read, step + 1)
        return found


def _column(values: list[float | None]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)

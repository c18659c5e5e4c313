"""Packs sequences that begin alike into one row, so that what they share is computed once.

A row is the shared beginning and then each sequence's rest; every rest sees the beginning and
itself only, and positions restart at the end of the beginning: the numbers are those of the plain
sequences.

Dimensions: B rows, T tokens of the longest row, N images, P tokens of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence of tokens.

    Attributes:
        ids: The tokens, with one image token for each token of the image.
        start: The first token that the loss counts (the response's first).
        image: Which image stands at the image tokens; None for text alone.
        weight: Of its tokens in the loss.
    """

    ids: tuple[int, ...]
    start: int
    image: int | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows as tensors.

    Attributes:
        name: What the batch teaches, for the log.
        ids_BT, positions_BT: Tokens and their positions.
        mask_B1TT: Whether the token (third) may look at the token (fourth).
        images: Image indices in the order of their tokens, row by row.
        rows, columns, targets, weights: For each token of the loss, where the hidden state that
            predicts it stands, the token, and its weight.
    """

    name: str
    ids_BT: torch.Tensor
    positions_BT: torch.Tensor
    mask_B1TT: torch.Tensor
    images: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


def shared_length(samples: Sequence[Sample], image_token: int) -> int:
    """How many first tokens the samples share, none of them in a loss or of a different image."""
    limit = min(sample.start - 1 for sample in samples)
    first = samples[0]
    if len({sample.image for sample in samples}) > 1 and image_token in first.ids[:limit]:
        limit = min(limit, first.ids.index(image_token))
    for at in range(limit):
        if any(sample.ids[at] != first.ids[at] for sample in samples):
            return at
    return limit


def pack(name: str, groups: Sequence[Sequence[Sample]], image_token: int, pad_token: int) -> Batch:
    """One row for each group of samples."""
    rows = [_pack_row(group, image_token) for group in groups]
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_token)
    positions = torch.zeros((len(rows), longest), dtype=torch.long)
    # Padding has a segment of its own, in which each token sees at least itself.
    segments = torch.full((len(rows), longest), -1)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = torch.tensor(row.ids)
        positions[at, : len(row.ids)] = torch.tensor(row.positions)
        segments[at, : len(row.ids)] = torch.tensor(row.segments)
    same = segments[:, :, None] == segments[:, None, :]
    seen = same | (segments == 0)[:, None, :]
    mask = (seen & torch.ones(longest, longest, dtype=torch.bool).tril())[:, None]
    losses = [(at, *loss) for at, row in enumerate(rows) for loss in row.losses]
    return Batch(
        name=name,
        ids_BT=ids,
        positions_BT=positions,
        mask_B1TT=mask,
        images=torch.tensor([image for row in rows for image in row.images], dtype=torch.long),
        rows=torch.tensor([loss[0] for loss in losses]),
        columns=torch.tensor([loss[1] for loss in losses]),
        targets=torch.tensor([loss[2] for loss in losses]),
        weights=torch.tensor([loss[3] for loss in losses]),
    )


@dataclass(frozen=True, slots=True)
class _Row:
    ids: list[int]
    positions: list[int]
    segments: list[int]
    images: list[int]
    losses: list[tuple[int, int, float]]  # column, target, weight


def _pack_row(samples: Sequence[Sample], image_token: int) -> _Row:
    shared = shared_length(samples, image_token)
    head = samples[0].ids[:shared]
    row = _Row(list(head), list(range(shared)), [0] * shared, [], [])
    if image_token in head:
        row.images.append(samples[0].image or 0)
    for segment, sample in enumerate(samples, 1):
        offset = len(row.ids) - shared
        rest = sample.ids[shared:]
        row.ids.extend(rest)
        row.positions.extend(range(shared, len(sample.ids)))
        row.segments.extend([segment] * len(rest))
        if sample.image is not None and image_token in rest:
            row.images.append(sample.image)
        row.losses.extend(
            (offset + at - 1, sample.ids[at], sample.weight)
            for at in range(sample.start, len(sample.ids))
        )
    return row

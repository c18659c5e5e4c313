"""Reference log-probabilities: once per pair, with the adapters off, kept beside the pairs.

The pass that finds them sees every pair, image included, before the first step is taken; so it is also where
unusable pairs are found and set aside.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow.fs import FileType

from sima_ray.data.locations import open_location
from sima_ray.records import PreferencePair
from sima_ray.tuning.dataset import EncodedPair, PairEncoder, SetAside, UnusablePair
from sima_ray.tuning.forward import PairForward, PairLogps, base_of

SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("chosen_logp", pa.float64()),
        pa.field("rejected_logp", pa.float64()),
        pa.field("tokens", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("image_digest", pa.string()),
        pa.field("set_aside", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("generated", pa.bool_()),
    ]
)
CHUNK = 128
"""Pairs between two writes of the file: what an interruption costs at most."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What the reference pass found out about one pair.

    Attributes:
        row_id: Of the pair.
        chosen_logp, rejected_logp: Sums over the response's tokens; None where the pair is set aside.
        tokens: Of both rows together.
        width: Tokens of the longer row.
        image_digest: Names the image file's bytes that were scored.
        set_aside, detail: Why it is not trained on; None where it is.
        generated: Whether the log-probabilities came with the pair, and were not computed.
    """

    row_id: str
    chosen_logp: float | None = None
    rejected_logp: float | None = None
    tokens: int | None = None
    width: int | None = None
    image_digest: str | None = None
    set_aside: str | None = None
    detail: str | None = None
    generated: bool = False


Scores = Callable[[Any, PairForward, Iterator[list[EncodedPair]]], Iterable[Reference]]
"""Scores batches with a model that is the reference: `each_alone`, or all workers together."""

Given = Callable[[EncodedPair], tuple[float, float] | None]
"""The log-probabilities of a pair's chosen and rejected response, where they need not be computed."""


class ReferenceFile:
    """The Parquet file of references; it knows which model and settings it is for."""

    def __init__(self, location: str, key: str) -> None:
        """Args:
        location: Path or URI of the file.
        key: Names all that the numbers depend on; a file with another key is not used.
        """
        self._location = location
        self._key = key.encode()

    def read(self) -> dict[str, Reference]:
        """The references by row id; none where there is no file, or one with another key."""
        filesystem, path = open_location(self._location)
        if filesystem.get_file_info(path).type == FileType.NotFound:
            return {}
        table = pq.read_table(path, filesystem=filesystem)
        fits = (table.schema.metadata or {}).get(b"reference_of") == self._key
        if not fits or table.column_names != SCHEMA.names:
            return {}
        return {row["row_id"]: Reference(**row) for row in table.to_pylist()}

    def write(self, references: dict[str, Reference]) -> None:
        """Replace the file, never leaving half of one."""
        filesystem, path = open_location(self._location)
        rows = [
            {name: getattr(reference, name) for name in SCHEMA.names}
            for _, reference in sorted(references.items())
        ]
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        table = table.replace_schema_metadata({"reference_of": self._key})
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        pq.write_table(table, f"{path}.part", filesystem=filesystem)
        filesystem.move(f"{path}.part", path)


def each_alone(
    model: Any, forward: PairForward, batches: Iterable[list[EncodedPair]]
) -> Iterator[Reference]:
    """Score batches; a pair that spoils one is set aside, and the others are scored without it."""
    for batch in batches:
        yield from _score(model, forward, batch)


def scored(batch: Sequence[EncodedPair], logps: PairLogps) -> Iterator[Reference]:
    """The references of pairs of which these are the log-probabilities."""
    scores = zip(batch, logps.chosen_B.tolist(), logps.rejected_B.tolist(), strict=True)
    for pair, chosen, rejected in scores:
        yield _scored(pair, chosen, rejected)


def aside(problem: UnusablePair) -> Reference:
    """The reference of a pair that is set aside."""
    return Reference(problem.row_id, set_aside=problem.reason, detail=problem.detail)


def reference_pass(
    model: Any,
    forward: PairForward,
    encoder: PairEncoder,
    pairs: Sequence[PreferencePair],
    file: ReferenceFile,
    *,
    batch_size: int,
    budget: int | None = None,
    rank: int = 0,
    world: int = 1,
    gather: Callable[[list[Any]], list[Any]] = list,
    on_progress: Callable[[int, int], None] | None = None,
    given: Given | None = None,
    scores: Scores = each_alone,
) -> dict[str, Reference]:
    """References of all pairs: those in the file, and the rest computed, each worker its share.

    Args:
        model: With or without adapters; they are switched off here.
        forward: How pairs are scored.
        encoder: Turns pairs into tokens.
        pairs: All of them, in the same order on every worker.
        file: Read first, written by rank 0 after every chunk.
        batch_size: Pairs a forward pass, where there is no budget.
        budget: Padded tokens a forward pass may have, two rows a pair.
        rank, world: This worker, and how many there are.
        gather: The lists of all workers, joined.
        on_progress: Told how many pairs are done, of how many.
        given: What is taken before a pair is scored; without it the file's are taken where they were computed.
        scores: How batches are scored.
    """
    stored = file.read()
    if given is None:
        stored = {row_id: found for row_id, found in stored.items() if not found.generated}
    known, todo = _split(pairs, stored)
    with reference_of(model) as bare:
        for start in range(0, len(todo), CHUNK):
            share = todo[start : start + CHUNK][rank::world]
            found: list[Reference] = []
            batches = _batches(_encoded(encoder, share), batch_size, budget, given, found)
            computed = list(scores(bare, forward, batches))
            known |= {reference.row_id: reference for reference in gather(found + computed)}
            if rank == 0:
                file.write(known)
            if on_progress:
                on_progress(len(known), len(pairs))
    return known


@contextmanager
def reference_of(model: Any) -> Iterator[Any]:
    """The bare model as the reference: its adapters off, if it has any, and no gradients."""
    adapters_off = getattr(model, "disable_adapter", nullcontext)
    with torch.no_grad(), adapters_off():
        yield base_of(model)


def usable(
    pairs: Sequence[PreferencePair], references: dict[str, Reference]
) -> list[PreferencePair]:
    """The pairs to train on, in order; of several with one id the first."""
    first = {pair.row_id: pair for pair in reversed(pairs)}
    return [pair for row_id, pair in sorted(first.items()) if references[row_id].set_aside is None]


def set_aside(pairs: Sequence[PreferencePair], references: dict[str, Reference]) -> list[Reference]:
    """The pairs that are not trained on, one entry each, in the order of the pairs."""
    listed: list[Reference] = []
    seen: set[str] = set()
    for pair in pairs:
        reference = references[pair.row_id]
        if pair.row_id in seen:
            detail = "an earlier pair has this id"
            listed.append(Reference(pair.row_id, set_aside=SetAside.DUPLICATE_ID, detail=detail))
        elif reference.set_aside is not None:
            listed.append(reference)
        seen.add(pair.row_id)
    return listed


def _split(
    pairs: Sequence[PreferencePair], stored: dict[str, Reference]
) -> tuple[dict[str, Reference], list[PreferencePair]]:
    """What is known of these pairs, and the pairs of which nothing is, each id once."""
    known: dict[str, Reference] = {}
    todo: dict[str, PreferencePair] = {}
    for pair in pairs:
        if pair.row_id in stored:
            known[pair.row_id] = stored[pair.row_id]
        else:
            todo.setdefault(pair.row_id, pair)
    return known, list(todo.values())


def _encoded(
    encoder: PairEncoder, pairs: Sequence[PreferencePair]
) -> Iterator[EncodedPair | Reference]:
    """The pairs as tokens; what is told of one that cannot be used."""
    for pair in pairs:
        try:
            yield encoder.encode(pair)
        except UnusablePair as problem:
            yield aside(problem)


def _score(model: Any, forward: PairForward, batch: list[EncodedPair]) -> Iterator[Reference]:
    try:
        logps = forward(model, batch)
    except UnusablePair as problem:
        yield aside(problem)
        rest = [pair for pair in batch if pair.pair.row_id != problem.row_id]
        if rest:
            yield from _score(model, forward, rest)
        return
    yield from scored(batch, logps)


def _batches(
    pairs: Iterable[EncodedPair | Reference],
    batch_size: int,
    budget: int | None,
    given: Given | None,
    found: list[Reference],
) -> Iterator[list[EncodedPair]]:
    """The pairs to be scored, as many at a time as may be; the references of the others go to `found`."""
    batch: list[EncodedPair] = []
    for pair in pairs:
        if isinstance(pair, Reference):
            found.append(pair)
        elif given and (logps := given(pair)):
            found.append(_scored(pair, *logps, generated=True))
        else:
            if batch and not _fits([*batch, pair], batch_size, budget):
                yield batch
                batch = []
            batch.append(pair)
    if batch:
        yield batch


def _fits(batch: Sequence[EncodedPair], batch_size: int, budget: int | None) -> bool:
    """Whether so many pairs may share a forward pass."""
    if budget is None:
        return len(batch) <= batch_size
    return 2 * len(batch) * max(pair.width for pair in batch) <= budget


def _scored(
    pair: EncodedPair, chosen: float, rejected: float, *, generated: bool = False
) -> Reference:
    for side, logp in (("chosen", chosen), ("rejected", rejected)):
        if not math.isfinite(logp):
            detail = f"the reference's log-probability of the {side} response is {logp}"
            return aside(UnusablePair(pair.pair.row_id, SetAside.BAD_REFERENCE, detail))
    return Reference(
        pair.pair.row_id,
        chosen,
        rejected,
        tokens=pair.tokens,
        width=pair.width,
        image_digest=pair.image_digest,
        generated=generated,
    )

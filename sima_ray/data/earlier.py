"""What a later round takes over: prompts that the round before left unsettled, and its pairs."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from sima_ray.data.blocks import committed_files
from sima_ray.data.locations import open_location
from sima_ray.data.sinks import PAIR_SCHEMA, PAIRS_A_GROUP, read_pairs
from sima_ray.errors import LedgerError
from sima_ray.pairs import draw_earlier
from sima_ray.ports import JsonDict
from sima_ray.records import Outcome, PreferencePair

UNSETTLED = (Outcome.INCONSISTENT, Outcome.UNPARSEABLE)
"""Outcomes whose rows are asked again; others are, too, where the verdict is known to be wrong."""

_COLUMNS = ["row_id", "outcome", "ground_truth", "candidates", "critiques"]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The prompts of a round: `before` = `rows` + all of `settled`.

    Attributes:
        before: Rows of the round before.
        rows: Those that are asked again.
        asked: These, by the outcome that they had.
        settled: The others, by theirs.
    """

    before: int
    rows: int
    asked: Mapping[Outcome, int]
    settled: Mapping[Outcome, int]

    def to_json(self) -> JsonDict:
        """The counts as plain values."""
        return {
            "before": self.before,
            "rows": self.rows,
            "asked": {outcome.value: n for outcome, n in self.asked.items()},
            "settled": {outcome.value: n for outcome, n in self.settled.items()},
        }


def choose_unsettled(
    index: str,
    preferences: str,
    destination: str,
    is_wrong: Callable[[JsonDict], bool] | None = None,
) -> Chosen:
    """Write the index of a round from that of the round before: its unsettled rows, in its order.

    Args:
        index: The prompts of the round before.
        preferences: Its decided rows.
        destination: The Parquet file to write; it appears when it is whole.
        is_wrong: Whether a preferred response is known not to be the better one; gets
            `ground_truth`, `outcome`, `candidates` and `critiques`.

    Raises:
        LedgerError: A row of the index without an outcome, or the reverse.
    """
    asked, settled = Counter[Outcome](), Counter[Outcome]()
    ids: set[str] = set()
    for row in _decided(preferences):
        outcome = Outcome(row["outcome"])
        wrong = outcome.is_preference and is_wrong is not None and is_wrong(row)
        if wrong or outcome in UNSETTLED:
            ids.add(row["row_id"])
            asked[outcome] += 1
        else:
            settled[outcome] += 1
    filesystem, path = open_location(index)
    _, target = open_location(destination)
    filesystem.create_dir(target.rpartition("/")[0], recursive=True)
    partial = f"{target}.partial"
    before = rows = 0
    with (
        pq.ParquetFile(path, filesystem=filesystem) as file,
        pq.ParquetWriter(partial, file.schema_arrow, filesystem=filesystem) as writer,
    ):
        for batch in file.iter_batches():
            names = batch.column("row_id").to_pylist()
            kept = batch.filter(pa.array([name in ids for name in names], pa.bool_()))
            writer.write_batch(kept)
            before, rows = before + batch.num_rows, rows + kept.num_rows
    if (before, rows) != (asked.total() + settled.total(), asked.total()):
        raise LedgerError(
            f"{index}: has {before} rows, of which {rows} are unsettled, but {preferences} has "
            f"{asked.total() + settled.total()}, of which {asked.total()} are"
        )
    filesystem.move(partial, target)
    return Chosen(before, rows, asked, settled)


def mix_pairs(
    own: str, earlier: Mapping[int, str], destination: str, *, share: float, seed: int, number: int
) -> JsonDict:
    """Write a round's pairs and a share of those of earlier rounds, as one file to train on.

    An earlier pair keeps its weight and gets an id of its own, ID@round-K; its log-probabilities
    are not carried over, for they are those of a policy that is no longer the reference. Where the
    same two responses were judged again in a later round, the later verdict alone counts.

    Args:
        own: The round's pairs.parquet.
        earlier: Those of the rounds before, by their numbers.
        destination: The file to write; it appears when it is whole.
        share, seed, number: See `draw_earlier`.

    Returns:
        For each earlier round `pairs` = `drawn` + `not_drawn` + `judged_again`.
    """
    filesystem, path = open_location(destination)
    seen = {_case(pair) for pair in read_pairs(own)}
    counts: JsonDict = {}
    with pq.ParquetWriter(f"{path}.partial", PAIR_SCHEMA, filesystem=filesystem) as writer:
        _write(writer, read_pairs(own))
        for before in sorted(earlier, reverse=True):
            cases = {pair.row_id: _case(pair) for pair in read_pairs(earlier[before])}
            new = [row_id for row_id, case in cases.items() if case not in seen]
            drawn = draw_earlier(new, share, seed, before, number)
            _write(
                writer,
                (_again(p, before) for p in read_pairs(earlier[before]) if p.row_id in drawn),
            )
            # Those not drawn, too: an older verdict on them must not stand in for this one.
            seen |= set(cases.values())
            counts[str(before)] = {
                "pairs": len(cases),
                "drawn": len(drawn),
                "not_drawn": len(new) - len(drawn),
                "judged_again": len(cases) - len(new),
            }
    filesystem.move(f"{path}.partial", path)
    return counts


def _again(pair: PreferencePair, before: int) -> PreferencePair:
    return replace(
        pair,
        row_id=f"{pair.row_id}@round-{before}",
        chosen_logp=None,
        rejected_logp=None,
        chosen_tokens=None,
        rejected_tokens=None,
    )


def _case(pair: PreferencePair) -> bytes:
    """What was judged, whichever response was preferred."""
    content = json.dumps([pair.image, pair.prompt, *sorted((pair.chosen, pair.rejected))])
    return hashlib.sha256(content.encode()).digest()


def _write(writer: pq.ParquetWriter, pairs: Iterable[PreferencePair]) -> None:
    pairs = iter(pairs)
    while group := [asdict(pair) for pair in islice(pairs, PAIRS_A_GROUP)]:
        writer.write_table(pa.Table.from_pylist(group, PAIR_SCHEMA))


def _decided(preferences: str) -> Iterator[JsonDict]:
    filesystem, _ = open_location(preferences)
    for path in committed_files(preferences):
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            for batch in file.iter_batches(PAIRS_A_GROUP, columns=_COLUMNS):
                yield from batch.to_pylist()

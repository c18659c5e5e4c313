"""Where rows end: the preferences folder, and the pairs, the quarantine and the ledger made from
it."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
from ray.data import Dataset
from ray.exceptions import RayError

from sima_ray import errors
from sima_ray.config import PairsConfig
from sima_ray.data.blocks import committed_files, discard_incomplete
from sima_ray.data.locations import open_location
from sima_ray.data.stages import CPUS, TASKS
from sima_ray.errors import DataError, LedgerError, SimaError
from sima_ray.ledger import Ledger
from sima_ray.pairs import PairLengths, apply_length_policy, believed_preference, to_pair
from sima_ray.ports import JsonDict
from sima_ray.records import (
    PAIR_SCHEMA,
    ROW_SCHEMA,
    Candidate,
    Critique,
    Outcome,
    PreferencePair,
    Prompt,
    Quarantine,
)

PAIRS_FILE = "pairs.parquet"
QUARANTINE_FILE = "quarantine.jsonl"
PAIRS_A_GROUP = 4096

_OWN_ERROR = re.compile(r"^sima_ray\.errors\.(?P<kind>\w+): (?P<message>.+)$", re.MULTILINE)


def write_preferences(ds: Dataset, folder: str) -> None:
    """Run a dataset of ROW_SCHEMA and commit it to a folder, a Parquet file a block.

    After a crash the same call goes on, when the dataset was read with `done=folder`: what is
    committed is not asked for again, and the block that was being written is thrown away.

    Raises:
        SimaError: What stopped the run, as the stage said it.
    """
    discard_incomplete(folder)
    filesystem, path = open_location(folder)
    try:
        ds.write_parquet(
            path, filesystem=filesystem, ray_remote_args={"num_cpus": CPUS}, concurrency=TASKS
        )
    except RayError as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise reason from None


def write_pairs(
    preferences: str, destination: str, config: PairsConfig, seed: int, *, rows: int | None = None
) -> Ledger:
    """Write a folder's pairs.parquet and quarantine.jsonl, and count every row.

    Both files are in the order of the row ids (the quarantine's in that of its sources), so that
    the same rows give the same files whichever worker finished first. Texts stream through; ids and
    lengths are held. The preferences stay what the critic said, so that pairs can be made of them
    anew by another policy.

    Args:
        preferences: The folder that `write_preferences` wrote.
        destination: The folder to write to.
        config: What becomes of inconsistent rows, and the length policy.
        seed: Chooses the order that is believed where the two disagree, and among the pairs that
            the length policy may leave out.
        rows: Rows of the index, which the ledger is held against; None where it is not known.

    Raises:
        DataError: No preferences there, or rows without an outcome.
        LedgerError: A row is missing or there twice.
    """
    filesystem, base = open_location(destination)
    filesystem.create_dir(base, recursive=True)
    survey = _survey(preferences)
    if config.inconsistent_weight:
        for pair in _kept_pairs(preferences, config, seed):
            survey.keep(pair)
    left_out = apply_length_policy(survey.lengths, config, seed)
    ledger = survey.ledger(left_out, rows)
    ledger.check()
    bad = sorted(survey.quarantine, key=lambda row: (_place(row["source"]), row["row_id"]))
    with filesystem.open_output_stream(f"{base}/{QUARANTINE_FILE}.partial") as stream:
        stream.writelines(f"{json.dumps(row, ensure_ascii=False)}\n".encode() for row in bad)
    kept = sorted({pair.row_id for pair in survey.lengths} - left_out)
    with pq.ParquetWriter(
        f"{base}/{PAIRS_FILE}.partial", PAIR_SCHEMA, filesystem=filesystem
    ) as writer:
        for table in _pairs(preferences, survey.by_id, kept, config, seed):
            writer.write_table(table)
    for name in (QUARANTINE_FILE, PAIRS_FILE):
        filesystem.move(f"{base}/{name}.partial", f"{base}/{name}")
    return ledger


def read_pairs(path: str) -> Iterator[PreferencePair]:
    """The pairs of a pairs.parquet, streamed; an older version's has fewer columns."""
    filesystem, path = open_location(path)
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        for batch in file.iter_batches(PAIRS_A_GROUP, columns=PAIR_SCHEMA.names):
            yield from (PreferencePair(**row) for row in batch.to_pylist())


@dataclass(slots=True)
class _Survey:
    """What one pass over the preferences found, texts aside."""

    outcomes: Counter[Outcome] = field(default_factory=Counter[Outcome])
    by_id: dict[str, Outcome] = field(default_factory=dict[str, Outcome])
    lengths: list[PairLengths] = field(default_factory=list[PairLengths])
    quarantine: list[JsonDict] = field(default_factory=list[JsonDict])

    def add(self, row: JsonDict) -> None:
        row_id = row["row_id"]
        if row_id in self.by_id:
            raise LedgerError(f"row {row_id} ({row['source']}) is in the preferences twice")
        if row["outcome"] is None:
            raise DataError(f"row {row_id} ({row['source']}) has no outcome: run the stages first")
        outcome = Outcome(row["outcome"])
        self.by_id[row_id] = outcome
        self.outcomes[outcome] += 1
        if outcome.is_preference:
            self.lengths.append(PairLengths.of(row_id, row["chosen"], row["rejected"]))
        if outcome is Outcome.QUARANTINED:
            self.quarantine.append(
                {
                    "source": row["source"],
                    "row_id": row_id,
                    "reason": row["quarantine"],
                    "error": row["error"],
                }
            )

    def keep(self, pair: PreferencePair) -> None:
        """Count an inconsistent row as the pair that it is kept as."""
        self.outcomes[self.by_id[pair.row_id]] -= 1
        self.outcomes[Outcome.INCONSISTENT_KEPT] += 1
        self.by_id[pair.row_id] = Outcome.INCONSISTENT_KEPT
        self.lengths.append(PairLengths.of(pair.row_id, pair.chosen, pair.rejected, pair.weight))

    def ledger(self, left_out: Iterable[str], rows: int | None) -> Ledger:
        """The counts, with the pairs that the length policy left out under its name."""
        outcomes = Counter(self.outcomes)
        for row_id in left_out:
            outcomes[self.by_id[row_id]] -= 1
            outcomes[Outcome.LENGTH_POLICY] += 1
        reasons = Counter(Quarantine(row["reason"]) for row in self.quarantine)
        return Ledger(len(self.by_id) if rows is None else rows, outcomes, reasons)


def _survey(preferences: str) -> _Survey:
    columns = ["row_id", "source", "quarantine", "error", "outcome", "chosen", "rejected"]
    filesystem, _ = open_location(preferences)
    files = committed_files(preferences)
    if not files:
        raise DataError(f"{preferences}: holds no preferences")
    survey = _Survey()
    for path in files:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            for batch in file.iter_batches(PAIRS_A_GROUP, columns=columns):
                for row in batch.to_pylist():
                    survey.add(row)
    return survey


def _pairs(
    preferences: str,
    outcomes: Mapping[str, Outcome],
    kept: list[str],
    config: PairsConfig,
    seed: int,
) -> Iterator[pa.Table]:
    """The kept pairs in the order of their ids: a pass over the files for each piece of that order,
    and another where the piece has inconsistent rows."""
    rows = _dataset(preferences)
    columns = {name: pc.field("text" if name == "prompt" else name) for name in PAIR_SCHEMA.names}
    ids = iter(kept)
    while piece := list(islice(ids, PAIRS_A_GROUP)):
        preferred = [row_id for row_id in piece if outcomes[row_id].is_preference]
        wanted = pc.field("row_id").isin(pa.array(preferred, pa.string()))
        table = rows.to_table(columns=columns, filter=wanted)
        if len(preferred) < len(piece):
            pairs = [asdict(pair) for pair in _kept_pairs(preferences, config, seed, piece)]
            table = pa.concat_tables(
                [table.cast(PAIR_SCHEMA), pa.Table.from_pylist(pairs, PAIR_SCHEMA)]
            )
        yield table.sort_by("row_id").cast(PAIR_SCHEMA)


def _kept_pairs(
    preferences: str, config: PairsConfig, seed: int, row_ids: list[str] | None = None
) -> Iterator[PreferencePair]:
    """The pairs that the inconsistent rows, all or those among `row_ids`, are kept as; streamed."""
    wanted = pc.field("outcome") == Outcome.INCONSISTENT.value
    if row_ids is not None:
        wanted &= pc.field("row_id").isin(row_ids)
    columns = ["row_id", "image", "text", "ground_truth", "candidates", "critiques"]
    rows = _dataset(preferences)
    for batch in rows.to_batches(columns=columns, filter=wanted, batch_size=PAIRS_A_GROUP):
        for row in batch.to_pylist():
            prompt = Prompt(row["row_id"], row["image"], row["text"], row["ground_truth"])
            candidates = [Candidate(**candidate) for candidate in row["candidates"]]
            critiques = [Critique(**critique) for critique in row["critiques"]]
            believed = believed_preference(prompt.row_id, critiques, seed)
            yield to_pair(prompt, candidates, believed, config.inconsistent_weight)


def _dataset(preferences: str) -> Any:
    filesystem, _ = open_location(preferences)
    files = committed_files(preferences)
    return pyarrow.dataset.dataset(files, schema=ROW_SCHEMA, filesystem=filesystem)


def _place(source: str | None) -> tuple[str, int]:
    """FILE:LINE as a key that sorts lines as numbers."""
    file, _, line = (source or "").rpartition(":")
    return file, int(line) if line.isdigit() else 0


def _reason(error: RayError) -> SimaError | None:
    """The stage's own error inside of what Ray made of it.

    Ray carries an error of a worker's code to the driver as the text of its stack trace alone.
    """
    found = _OWN_ERROR.search(str(error))
    if found is None:
        return None
    kind = getattr(errors, found["kind"], SimaError)
    return kind(found["message"])

"""Pairs that a run begins with in place of prompts: every row checked, counted, and kept in the run."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sima_ray.config import DataConfig, PairsConfig
from sima_ray.data.locations import open_location
from sima_ray.data.prompts import MAX_NAME_CHARS, BadLine, checked_text
from sima_ray.errors import DataError, one_line, why
from sima_ray.ledger import Ledger
from sima_ray.pairs import PairLengths, apply_length_policy
from sima_ray.ports import JsonDict
from sima_ray.records import PAIR_SCHEMA, Outcome, Quarantine

_GROUP = 1024
_FIELDS = ("image", "prompt", "chosen", "rejected")
_NEEDED = ("row_id", *_FIELDS)
_KEPT = (*_NEEDED, "chosen_from", "rejected_from", "weight")
"""Log-probabilities are not taken over: they are those of whichever policy answered."""


@dataclass(slots=True)
class _Survey:
    """How each row ended, texts aside."""

    outcomes: list[Outcome] = field(default_factory=list[Outcome])
    lengths: list[PairLengths] = field(default_factory=list[PairLengths])
    problems: list[JsonDict] = field(default_factory=list[JsonDict])
    ids: set[str] = field(default_factory=set[str])


def take_given(
    data: DataConfig, pairs: PairsConfig, seed: int, pairs_file: str, quarantine: str
) -> Ledger:
    """Write the usable pairs of `data.pairs` and the quarantined rows, and count every row.

    Images are not looked at: `check_rows` does, and training sets aside a pair whose image cannot be used.

    Args:
        data: The pairs, the limit on their texts, and how many of them.
        pairs: The length policy.
        seed: Chooses among the pairs that the length policy may leave out.
        pairs_file: The Parquet file to write.
        quarantine: The JSON lines to write.

    Raises:
        DataError: It cannot be read, is no pairs file, or holds no pair that can be used.
    """
    assert data.pairs is not None
    survey = _Survey()
    for number, row in enumerate(_rows(data)):
        _look(row, f"{data.pairs}:{number + 1}", data.max_text_chars, survey)
    if not any(outcome.is_pair for outcome in survey.outcomes):
        first = f": {survey.problems[0]['error']}" if survey.problems else ""
        raise DataError(
            f"{data.pairs}: none of its {len(survey.outcomes)} pairs can be used{first}"
        )
    left_out = apply_length_policy(survey.lengths, pairs, seed)
    outcomes = Counter(survey.outcomes)
    outcomes[Outcome.GIVEN] -= len(left_out)
    outcomes[Outcome.LENGTH_POLICY] += len(left_out)
    reasons = Counter(Quarantine(row["reason"]) for row in survey.problems)
    ledger = Ledger(len(survey.outcomes), outcomes, reasons)
    ledger.check()
    kept = {lengths.row_id for lengths in survey.lengths} - left_out
    _write(quarantine, survey.problems)
    _write_pairs(pairs_file, data, survey, kept)
    return ledger


def given_rows(pairs: str) -> Iterator[JsonDict]:
    """The rows of a pairs file, each with its place as `source`; streamed.

    Raises:
        DataError: It cannot be read, or is no pairs file.
    """
    filesystem, path = open_location(pairs)
    try:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            names = file.schema_arrow.names
            if missing := [name for name in _NEEDED if name not in names]:
                raise DataError(
                    f"{pairs}: not a pairs file, it has no column {', '.join(missing)}: make one of it with "
                    f"`sima data pairs {pairs} --output pairs.parquet`"
                )
            columns = [name for name in _KEPT if name in names]
            number = 0
            for batch in file.iter_batches(_GROUP, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield row | {"source": f"{pairs}:{number}"}
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{pairs}: cannot be read as Parquet: {why(error)}; make a pairs file of other formats with "
            "`sima data pairs`"
        ) from error


def _rows(data: DataConfig) -> Iterator[JsonDict]:
    assert data.pairs is not None
    return islice(given_rows(data.pairs), data.limit)


def _look(row: JsonDict, source: str, max_chars: int, survey: _Survey) -> None:
    """Decide what becomes of a row."""
    row_id = str(row["row_id"])
    try:
        _check(row, max_chars)
        if row_id in survey.ids:
            raise BadLine(Quarantine.DUPLICATE_ID, "an earlier pair has this id")
    except BadLine as bad:
        survey.outcomes.append(Outcome.QUARANTINED)
        problem = {"source": source, "row_id": row_id, "reason": bad.reason.value}
        survey.problems.append(problem | {"error": one_line(bad)})
        return
    survey.ids.add(row_id)
    if row["chosen"].strip() == row["rejected"].strip():
        survey.outcomes.append(Outcome.IDENTICAL)
        return
    survey.outcomes.append(Outcome.GIVEN)
    weight = row.get("weight")
    weight = 1.0 if weight is None else float(weight)
    survey.lengths.append(PairLengths.of(row_id, row["chosen"], row["rejected"], weight))


def _check(row: JsonDict, max_chars: int) -> None:
    """Raise BadLine for a row that cannot be used."""
    for name in _NEEDED:
        value = row[name]
        if value is None:
            raise BadLine(Quarantine.MISSING_FIELD, f"'{name}' is missing")
        if not isinstance(value, str):
            raise BadLine(Quarantine.MALFORMED_LINE, f"'{name}' must be a string")
        checked_text(name, value, MAX_NAME_CHARS if name in ("row_id", "image") else max_chars)
    weight = row.get("weight")
    if weight is None:
        return
    if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise BadLine(Quarantine.MALFORMED_LINE, f"'weight' is {weight!r}: must be 0 or more")


def _write(path: str, rows: list[JsonDict]) -> None:
    filesystem, path = open_location(path)
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    with filesystem.open_output_stream(f"{path}.partial") as stream:
        stream.writelines(f"{json.dumps(row, ensure_ascii=False)}\n".encode() for row in rows)
    filesystem.move(f"{path}.partial", path)


def _write_pairs(path: str, data: DataConfig, survey: _Survey, kept: set[str]) -> None:
    filesystem, path = open_location(path)
    rows = (
        _pair(row)
        for row, outcome in zip(_rows(data), survey.outcomes, strict=True)
        if outcome is Outcome.GIVEN and row["row_id"] in kept
    )
    with pq.ParquetWriter(f"{path}.partial", PAIR_SCHEMA, filesystem=filesystem) as writer:
        while group := list(islice(rows, _GROUP)):
            writer.write_table(pa.Table.from_pylist(group, PAIR_SCHEMA))
    filesystem.move(f"{path}.partial", path)


def _pair(row: Mapping[str, Any]) -> JsonDict:
    defaults = {"chosen_from": "", "rejected_from": "", "weight": 1.0}
    pair = dict.fromkeys(PAIR_SCHEMA.names) | {name: row.get(name) for name in _KEPT}
    return pair | {name: value for name, value in defaults.items() if pair[name] is None}

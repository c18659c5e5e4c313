"""Pairs for the arms: a finished source run's own preferences, or the same candidates preferred by a rule."""

import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.proof.settings import Arm
from sima_ray.config import RunConfig
from sima_ray.data.sinks import PAIR_SCHEMA, PAIRS_FILE, write_pairs
from sima_ray.ledger import Ledger
from sima_ray.pairs import count_words, to_pair
from sima_ray.records import Candidate, Outcome, Prompt

Row = dict[str, Any]
Count = Callable[[str, str], int]
"""Errors of a response against its ground truth."""
Rule = Callable[[Row, int, Count], int | None]
"""The number of the preferred candidate of a row, or None for no preference; takes the arm's seed."""


def _random(row: Row, seed: int, count: Count) -> int:
    return random.Random(f"{seed}/{row['row_id']}").randrange(2)


def _shorter(row: Row, seed: int, count: Count) -> int | None:
    return _lower(*(count_words(c["text"]) for c in row["candidates"]))


def _greedy(row: Row, seed: int, count: Count) -> int:
    return next(k for k, c in enumerate(row["candidates"]) if c["kind"] == "greedy")


def _oracle(row: Row, seed: int, count: Count) -> int | None:
    return _lower(*(count(c["text"], row["ground_truth"]) for c in row["candidates"]))


def _lower(first: int, second: int) -> int | None:
    return None if first == second else int(second < first)


RULES: dict[str, Rule] = {
    "random": _random,
    "shorter": _shorter,
    "greedy": _greedy,
    "oracle": _oracle,
}


def judged_rows(preferences: Path) -> list[Row]:
    """The rows of a preferences folder that the critic was asked about, in the order of their ids."""
    rows = pq.read_table(preferences).to_pylist()
    return sorted((row for row in rows if row["critiques"]), key=lambda row: row["row_id"])


def ruled_pair(row: Row, outcome: Outcome) -> Row:
    """The pair of a row for which a rule has that preference."""
    prompt = Prompt(row["row_id"], row["image"], row["text"], row["ground_truth"], row["source"])
    candidates = [Candidate(**candidate) for candidate in row["candidates"]]
    return asdict(to_pair(prompt, candidates, outcome))


def derive(source: Path, config: RunConfig, arm: Arm, count: Count) -> Path:
    """Make an arm's run folder: the source up to its preferences, and the arm's own pairs.

    With fewer prompts in `config.data.limit` than the source has, the folder holds the first of them alone, as a
    run with that limit would. A folder that is there is left as it is.
    """
    folder = Path(config.runs) / config.name
    if folder.exists():
        return folder
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source / "round-0", part / "round-0")
    index = pq.read_table(source / "prompts.parquet").slice(0, config.data.limit)
    pq.write_table(index, part / "prompts.parquet")
    preferences = part / "round-1" / "preferences"
    kept = index.column("row_id").to_pylist()
    _copy_rows(source / "round-1" / "preferences", preferences, kept)
    ledger = write_pairs(
        str(preferences), str(preferences.parent), config.pairs, config.seed, rows=index.num_rows
    )
    if arm.rule is not None:
        ledger = _write_ruled(preferences, RULES[arm.rule], config.seed, count)
    _write_json(preferences.parent / "ledger.json", ledger.to_json())
    prepared = {"rows": index.num_rows, "good": index.column("quarantine").null_count}
    _copy_markers(source, part, prepared, ledger.to_json())
    (part / "run.yaml").write_text(config.dump(), encoding="utf-8")
    part.rename(folder)  # last, so that half a folder is never taken for an arm
    return folder


def pairs_of(folder: Path) -> int:
    """Pairs that a run's first round was trained on."""
    return pq.read_metadata(folder / "round-1" / PAIRS_FILE).num_rows


def _copy_rows(source: Path, destination: Path, kept: list[str]) -> None:
    destination.mkdir(parents=True)
    for file in sorted(source.glob("*.parquet")):
        rows = pq.read_table(file).filter(pc.field("row_id").isin(kept))
        if rows.num_rows:
            pq.write_table(rows, destination / file.name)


def _write_ruled(preferences: Path, rule: Rule, seed: int, count: Count) -> Ledger:
    """Write a rule's pairs in the place of the critic's, and count every row.

    A row for which the rule has no preference is a tie, and counted under the outcome that stands for one:
    `inconsistent`. Rows that were not judged keep their own outcome.
    """
    pairs: list[Row] = []
    outcomes: list[Outcome] = []
    reasons: list[str] = []
    for row in sorted(pq.read_table(preferences).to_pylist(), key=lambda row: row["row_id"]):
        if not row["critiques"]:
            outcomes.append(Outcome(row["outcome"]))
            reasons += [row["quarantine"]] if row["quarantine"] else []
        elif (chosen := rule(row, seed, count)) is None:
            outcomes.append(Outcome.INCONSISTENT)
        else:
            outcomes.append((Outcome.PREFERRED_FIRST, Outcome.PREFERRED_SECOND)[chosen])
            pairs.append(ruled_pair(row, outcomes[-1]))
    table = pa.Table.from_pylist(pairs, PAIR_SCHEMA)
    pq.write_table(table, preferences.parent / PAIRS_FILE)
    ledger = Ledger.count(outcomes, reasons)
    ledger.check()
    return ledger


def _copy_markers(
    source: Path,
    part: Path,
    prompts: Mapping[str, int],
    ledger: Mapping[str, Any],
) -> None:
    prepared = _marker(source, "prepare")
    prepared["result"] = dict(prompts)
    base = _marker(source, "round-0-evaluate")
    preferred = _marker(source, "round-1-preferences")
    preferred["result"]["ledger"] = ledger
    (part / "stages").mkdir()
    for name, marker in (
        ("prepare", prepared),
        ("round-0-evaluate", base),
        ("round-1-preferences", preferred),
    ):
        _write_json(part / "stages" / f"{name}.json", marker)


def _marker(run: Path, key: str) -> dict[str, Any]:
    return json.loads((run / "stages" / f"{key}.json").read_text(encoding="utf-8"))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

"""Pairs, quarantine and ledger from hand-made preferences, under each policy; no Ray runs."""

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sima_ray.config import PairsConfig
from sima_ray.critic.vote import preferred_candidate
from sima_ray.data import sinks
from sima_ray.data.blocks import RowSource
from sima_ray.data.sinks import PAIR_SCHEMA, read_pairs, write_pairs
from sima_ray.data.work import decide_row
from sima_ray.ledger import Ledger
from sima_ray.pairs import believed_preference
from sima_ray.records import ROW_SCHEMA, Candidate, Critique, Outcome, PreferencePair
from sima_ray.runtime.tables import ledger_line
from sima_ray.tuning import dataset

CHOICES: dict[str, tuple[Any, Any]] = {
    "first": (1, 2),
    "second": (2, 1),
    "place 1": (1, 1),
    "place 2": (2, 2),
    "mumbled": (1, None),
}
TIES = ("place 1", "place 2")
LATER = ["chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens"]
"""Columns that older folders lack."""


def row(number: int, way: str, first: str, second: str) -> dict[str, Any]:
    """A row as `write_preferences` leaves it: the critic's choices are those of its way."""
    texts = {"greedy": first, "sampled": first if way == "same" else second}
    candidates = [
        Candidate(text, kind, 0.0, 1.0, None, 3, -1.5, "stop", "base")
        for kind, text in texts.items()
    ]
    straight, swapped = CHOICES.get(way, (None, None))
    critiques = [
        Critique("12", "raw", "", straight, probability=0.75),
        Critique("21", "raw", "", swapped),
    ]
    judged: dict[str, Any] = {
        "row_id": f"r{number:03d}",
        "image": f"{number}.jpg",
        "text": f"What is in image {number}?",
        "ground_truth": "It is.",
        "source": f"prompts.jsonl:{number + 1}",
        "quarantine": "broken_image" if way == "bad" else None,
        "error": "cut short" if way == "bad" else None,
        "candidates": [asdict(candidate) for candidate in candidates],
        "critiques": [] if way == "same" else [asdict(critique) for critique in critiques],
    }
    return {**judged, **decide_row(judged)}


def write(folder: Path, rows: list[dict[str, Any]], files: int = 3) -> str:
    """The rows as a preferences folder, dealt out to files."""
    (folder / "preferences").mkdir(parents=True)
    for number in range(files):
        table = pa.Table.from_pylist(rows[number::files], ROW_SCHEMA)
        pq.write_table(table, folder / "preferences" / f"{number}.parquet")
    return str(folder / "preferences")


def pairs_under(
    preferences: str, seed: int = 7, **policy: Any
) -> tuple[Ledger, dict[str, PreferencePair]]:
    """The ledger, and the pairs by id, which are in that order."""
    out = f"{preferences}-out"
    ledger = write_pairs(preferences, out, PairsConfig(**policy), seed)
    pairs = list(read_pairs(f"{out}/pairs.parquet"))
    assert [pair.row_id for pair in pairs] == sorted(pair.row_id for pair in pairs)
    assert ledger.pairs == len(pairs) and ledger.rows == sum(ledger.outcomes.values())
    return ledger, {pair.row_id: pair for pair in pairs}


WAYS = ["first", "second", "place 1", "place 2", "mumbled", "same", "bad"]


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Ten of each way; greedy and sampled responses take turns in being the longer."""
    texts = [("a dog", "a big dog"), ("a cat and a dog", "a cat")]
    return [row(n, way, *texts[n % 2]) for n, way in enumerate(WAYS * 10)]


def test_by_default_an_inconsistent_row_is_a_tie(rows: list[Any], tmp_path: Path) -> None:
    preferences = write(tmp_path, rows)
    ledger, pairs = pairs_under(preferences)
    assert ledger.outcomes == {
        **dict.fromkeys(Outcome, 0),
        Outcome.PREFERRED_FIRST: 10,
        Outcome.PREFERRED_SECOND: 10,
        Outcome.INCONSISTENT: 20,
        Outcome.UNPARSEABLE: 10,
        Outcome.IDENTICAL: 10,
        Outcome.QUARANTINED: 10,
    }
    # The file is, byte for byte, the one of the rows with a preference alone.
    decided = [r for r in rows if r["outcome"].startswith("preferred")]
    alone = write(tmp_path / "alone", decided)
    assert pairs_under(alone)[1] == pairs
    plain = [{name: r.get(name, r["text"]) for name in PAIR_SCHEMA.names} for r in decided]
    pq.write_table(pa.Table.from_pylist(plain, PAIR_SCHEMA), tmp_path / "plain.parquet")
    written = Path(f"{preferences}-out", "pairs.parquet").read_bytes()
    assert written == Path(f"{alone}-out", "pairs.parquet").read_bytes()
    assert written == (tmp_path / "plain.parquet").read_bytes()


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_a_kept_inconsistent_row_has_the_verdict_of_one_order(
    rows: list[Any], tmp_path: Path, weight: float
) -> None:
    preferences = write(tmp_path, rows)
    dropped, agreed = pairs_under(preferences)
    before = {file.name: file.read_bytes() for file in Path(preferences).iterdir()}
    kept, pairs = pairs_under(preferences, inconsistent_weight=weight)
    assert kept.outcomes == {
        **dropped.outcomes,
        Outcome.INCONSISTENT: 0,
        Outcome.INCONSISTENT_KEPT: 20,
    }
    assert {i: pair for i, pair in pairs.items() if i in agreed} == agreed
    assert {pair.weight for pair in agreed.values()} == {1.0}
    for r in rows:
        if r["outcome"] == "inconsistent":
            critiques = [Critique(**critique) for critique in r["critiques"]]
            first = believed_preference(r["row_id"], critiques, 7) is Outcome.PREFERRED_FIRST
            best, other = r["candidates"] if first else r["candidates"][::-1]
            assert pairs[r["row_id"]] == PreferencePair(
                row_id=r["row_id"],
                image=r["image"],
                prompt=r["text"],
                chosen=best["text"],
                rejected=other["text"],
                chosen_from=best["kind"],
                rejected_from=other["kind"],
                weight=weight,
                chosen_logp=-1.5,
                rejected_logp=-1.5,
                chosen_tokens=3,
                rejected_tokens=3,
            )
            assert int(not first) in {preferred_candidate(critique) for critique in critiques}
    # The critic's own words are as they were: the same folder gives other policies' pairs.
    assert before == {file.name: file.read_bytes() for file in Path(preferences).iterdir()}
    assert pairs_under(preferences) == (dropped, agreed)


def test_training_reads_the_weight(rows: list[Any], tmp_path: Path) -> None:
    preferences = write(tmp_path, rows)
    _, pairs = pairs_under(preferences, inconsistent_weight=0.25)
    read = dataset.read_pairs(f"{preferences}-out/pairs.parquet")
    assert read == list(pairs.values())
    assert Counter(pair.weight for pair in read) == {1.0: 20, 0.25: 20}


def test_folders_of_a_version_without_log_probabilities(rows: list[Any], tmp_path: Path) -> None:
    """Their rows are as they were, beside new ones too; the pairs made of them have none."""
    preferences = write(tmp_path, rows)
    _, pairs = pairs_under(preferences, inconsistent_weight=0.5)
    new = set(pq.read_table(Path(preferences) / "2.parquet")["row_id"].to_pylist())
    for name in ("0.parquet", "1.parquet"):
        file = Path(preferences) / name
        pq.write_table(pq.read_table(file).drop_columns(LATER), file)
    unknown = dict.fromkeys(LATER)
    expected = {
        i: pair if i in new or pair.weight != 1.0 else replace(pair, **unknown)
        for i, pair in pairs.items()
    }
    assert pairs_under(preferences, inconsistent_weight=0.5)[1] == expected

    file = Path(f"{preferences}-out", "pairs.parquet")
    assert dataset.read_pairs(str(file)) == list(expected.values())
    pq.write_table(pq.read_table(file).drop_columns(LATER), file)
    old = [replace(pair, **unknown) for pair in expected.values()]
    assert dataset.read_pairs(str(file)) == list(read_pairs(str(file))) == old


def test_folders_of_a_version_without_probabilities(rows: list[Any], tmp_path: Path) -> None:
    """Their critiques are as they were, beside new ones too, wherever preferences are read."""
    preferences = write(tmp_path, rows)
    ledger, pairs = pairs_under(preferences, inconsistent_weight=0.5)
    critiques = ROW_SCHEMA.field("critiques").type.value_type
    fields = [critiques.field(n) for n in range(critiques.num_fields)]
    old = pa.list_(pa.struct([field for field in fields if field.name != "probability"]))
    for name in ("0.parquet", "2.parquet"):
        file = Path(preferences) / name
        table = pq.read_table(file)
        place = table.column_names.index("critiques")
        pq.write_table(table.set_column(place, "critiques", table["critiques"].cast(old)), file)
    assert pairs_under(preferences, inconsistent_weight=0.5) == (ledger, pairs)
    source = RowSource.plan(preferences, rows_per_block=1000, done=None)
    (read,) = [table for task in source.get_read_tasks(1) for table in task()]
    assert read.schema.equals(ROW_SCHEMA)
    found = {c["probability"] for row in read["critiques"].to_pylist() for c in row}
    assert found == {None, 0.75}


@given(kept=st.sets(st.integers(0, 69)), seed=st.integers(0, 3))
def test_no_row_has_a_say_in_another(
    tmp_path_factory: pytest.TempPathFactory, kept: set[int], seed: int
) -> None:
    rows = [row(n, TIES[n % 2], "a dog", "a big dog") for n in range(70)]
    folder = tmp_path_factory.mktemp("rows")
    _, whole = pairs_under(write(folder / "whole", rows), seed, inconsistent_weight=0.5)
    part = write(folder / "part", [rows[n] for n in kept], files=1)
    _, pairs = pairs_under(part, seed, inconsistent_weight=0.5)
    assert pairs == {i: pair for i, pair in whole.items() if int(i[1:]) in kept}
    assert {pair.chosen_from for pair in whole.values()} == {"greedy", "sampled"}


def test_the_length_policy_holds_for_kept_rows(tmp_path: Path) -> None:
    rows = [row(n, "first", "a dog", "a big dog") for n in range(4)]
    rows += [row(n, "first", "a very big dog", "a dog") for n in range(4, 7)]
    rows += [row(n, "place 1", "a dog", "a big dog") for n in range(7, 60)]
    rows += [row(n, "place 2", "a dog", "no " * 30) for n in range(60, 64)]
    preferences = write(tmp_path, rows)
    policy = {"length_policy": "balance", "max_length_ratio": 3.0}
    dropped, agreed = pairs_under(preferences, **policy)
    assert (dropped.pairs, dropped.outcomes[Outcome.LENGTH_POLICY]) == (6, 1)
    ledger, pairs = pairs_under(preferences, inconsistent_weight=0.5, **policy)
    kept = {i: pair for i, pair in pairs.items() if pair.weight == 0.5}
    assert {i: pair for i, pair in pairs.items() if i not in kept} == agreed
    shorter = sum(pair.chosen == "a dog" for pair in kept.values())
    assert 0 < shorter == len(kept) - shorter and not {"r060", "r061", "r062", "r063"} & set(kept)
    assert ledger.outcomes[Outcome.INCONSISTENT] == 0
    assert ledger.outcomes[Outcome.INCONSISTENT_KEPT] == len(kept)
    assert ledger.outcomes[Outcome.LENGTH_POLICY] == 1 + 57 - len(kept)


def test_pieces_with_and_without_kept_rows(
    rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordered = [r | {"row_id": f"{r['outcome'][0]}-{r['row_id']}"} for r in rows]
    preferences = write(tmp_path, ordered)
    whole = pairs_under(preferences, inconsistent_weight=0.5)
    monkeypatch.setattr(sinks, "PAIRS_A_GROUP", 6)  # "i-…" alone, "i-…" and "p-…", "p-…" alone
    assert pairs_under(preferences, inconsistent_weight=0.5) == whole


def test_the_ledgers_line_names_kept_rows_within_the_pairs(rows: list[Any], tmp_path: Path) -> None:
    preferences = write(tmp_path, rows)
    dropped, _ = pairs_under(preferences)
    rest = "10 unparseable + 10 identical + 10 quarantined"
    assert ledger_line(dropped.to_json()) == (
        f"ledger   70 prompts = 20 pairs + 20 inconsistent + {rest}"
    )
    kept, _ = pairs_under(preferences, inconsistent_weight=0.5)
    assert ledger_line(kept.to_json()) == (
        f"ledger   70 prompts = 40 pairs (20 of inconsistent verdicts) + {rest}"
    )

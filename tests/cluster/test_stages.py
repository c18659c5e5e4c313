"""The preferences stages on a local Ray, with a fake policy: what goes in comes out, counted."""

import asyncio
import json
import multiprocessing
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from fake_policy import SharedBook, ask, book_actor, fake
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sima_ray.config import CriticConfig, DataConfig, GenerationConfig, PairsConfig
from sima_ray.data.blocks import (
    RowSource,
    committed_files,
    committed_ids,
    committed_rows,
    reopen_failed,
)
from sima_ray.data.prompts import index_prompts
from sima_ray.data.sinks import read_pairs, write_pairs, write_preferences
from sima_ray.data.stages import critique, generate, outcome, read_prompts
from sima_ray.errors import DataError, LedgerError, ServiceError
from sima_ray.ports import Completion, CompletionRequest, Policy
from sima_ray.records import ROW_SCHEMA, Outcome, Quarantine

pytestmark = pytest.mark.usefixtures("ray_cluster")

GENERATION = GenerationConfig(concurrency=8, batch_size=10)


def prompts_of(data: DataConfig) -> str:
    assert data.prompts is not None
    return data.prompts


@pytest.fixture
def book() -> Any:
    return SharedBook()


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / f"{name}.jpg")
    return DataConfig(prompts=str(tmp_path / "prompts.jsonl"), images=str(tmp_path / "images"))


def indexed(data: DataConfig, ways: list[str]) -> str:
    """Index prompts that go these ways (see `FakePolicy`).

    "bad" is a line without ground truth, "lost" one whose image is not there.
    """
    with open(prompts_of(data), "w", encoding="utf-8") as file:
        for number, way in enumerate(ways):
            line = {
                "id": f"r{number}",
                "image": f"{'ab'[number % 2]}.jpg",
                "text": ask(number, way),
            }
            if way != "bad":
                line["ground_truth"] = "The truth."
            if way == "lost":
                line["image"] = "lost.jpg"
            file.write(json.dumps(line) + "\n")
    index = str(Path(prompts_of(data)).parent / "prompts.parquet")
    index_prompts(data, index)
    return index


def chain(
    data: DataConfig,
    index: str,
    folder: str,
    connect: Callable[[], Policy],
    generation: GenerationConfig = GENERATION,
) -> Any:
    rows = read_prompts(index, rows_per_block=generation.batch_size, done=folder)
    rows = generate(rows, data=data, generation=generation, seed=7, connect=connect)
    rows = critique(rows, data=data, critic=CriticConfig(), generation=generation, connect=connect)
    return outcome(rows)


def read(folder: str) -> dict[str, dict[str, Any]]:
    """The committed rows by id; every file has the one schema, no id is there twice."""
    rows: list[dict[str, Any]] = []
    for path in committed_files(folder):
        table = pq.read_table(path)
        assert table.schema.equals(ROW_SCHEMA)
        rows += table.to_pylist()
    assert len({row["row_id"] for row in rows}) == len(rows) == committed_rows(folder)
    return {row["row_id"]: row for row in rows}


WAYS = ["plain", "same", "tie", "mumble", "refused", "crash", "bad", "lost"]


def test_rows_in_are_rows_out_each_with_its_outcome(data: DataConfig, book: Any) -> None:
    index, folder = indexed(data, WAYS * 6), str(Path(prompts_of(data)).parent / "preferences")
    write_preferences(chain(data, index, folder, fake(book)), folder)
    rows = read(folder)
    assert len(rows) == 48
    expected = {
        "plain": ("preferred_first", None),
        "same": ("identical", None),
        "tie": ("inconsistent", None),
        "mumble": ("unparseable", None),
        "refused": ("quarantined", "request_failed"),
        "crash": ("quarantined", "request_failed"),
        "bad": ("quarantined", "missing_field"),
        "lost": ("quarantined", "missing_image"),
    }
    for row in rows.values():
        way = json.loads(row["text"][1:-1])["way"]
        assert (row["outcome"], row["quarantine"]) == expected[way]
    assert rows["r4"]["error"] == "prompt is too long"
    assert rows["r5"]["error"] == "RuntimeError: a bug"
    plain = rows["r8"]
    assert [c["kind"] for c in plain["candidates"]] == ["greedy", "sampled"]
    assert [c["order"] for c in plain["critiques"]] == ["12", "21"]
    assert [c["choice"] for c in plain["critiques"]] == [1, 2]
    assert plain["chosen"].startswith("greedy") and plain["rejected"].startswith("sampled")
    assert (plain["chosen_from"], plain["rejected_from"]) == ("greedy", "sampled")
    assert rows["r1"]["critiques"] == [] and rows["r1"]["candidates"][0]["logprob"] == -1.5

    asked = Counter((e["row"], e["kind"]) for e in book.entries)
    wanted = {"plain": 2, "same": 0, "tie": 2, "mumble": 2}
    for number, way in enumerate(WAYS * 6):
        assert asked[number, "critic"] == wanted.get(way, 0)
        assert asked[number, "greedy"] == (way not in ("bad", "lost"))
    assert all(e["images"] == 1 for e in book.entries)

    check_pairs(folder, rows)


def check_pairs(folder: str, rows: dict[str, dict[str, Any]]) -> None:
    """The pairs, the quarantine and the ledger of
    `test_rows_in_are_rows_out_each_with_its_outcome`."""
    destination = Path(folder).parent / "round-1"
    ledger = write_pairs(folder, str(destination), PairsConfig(), 7, rows=48)
    assert ledger.rows == 48 and ledger.pairs == 6
    assert ledger.quarantined[Quarantine.REQUEST_FAILED] == 12
    pairs = list(read_pairs(str(destination / "pairs.parquet")))
    assert [p.row_id for p in pairs] == sorted(i for i, r in rows.items() if r["chosen"])
    assert pairs[0].prompt == rows[pairs[0].row_id]["text"]
    lines = (destination / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    bad = [json.loads(line) for line in lines]
    assert len(bad) == 24
    assert [b["source"] for b in bad[:3]] == [
        f"{Path(folder).parent}/prompts.jsonl:{n}" for n in (5, 6, 7)
    ]
    assert {b["reason"] for b in bad} == {"request_failed", "missing_field", "missing_image"}
    first = (destination / "pairs.parquet").read_bytes()
    write_pairs(folder, str(destination), PairsConfig(), 7, rows=48)
    assert (destination / "pairs.parquet").read_bytes() == first
    with pytest.raises(LedgerError, match="49 rows read but 48"):
        write_pairs(folder, str(destination), PairsConfig(), 7, rows=49)
    close = write_pairs(folder, str(destination), PairsConfig(max_length_ratio=1.01), 7, rows=48)
    assert close.rows == 48 and close.outcomes[Outcome.LENGTH_POLICY] + close.pairs == 6


def test_small_batches_are_no_limit_to_the_rows_in_flight(data: DataConfig) -> None:
    class Crowd(Policy):  # nested, so that it travels by value
        """Gives no answer before the requests of twelve rows wait, and an error where there are more."""

        def __init__(self) -> None:
            self._waiting, self._full = 0, asyncio.Event()

        async def complete(self, request: CompletionRequest) -> Completion:
            self._waiting += 1
            if self._waiting == 24:
                self._full.set()
            assert self._waiting <= 24
            await asyncio.wait_for(self._full.wait(), 60)
            self._waiting -= 1
            return {
                "text": "So many.",
                "tokens": 2,
                "logprob": -1.0,
                "finish_reason": "stop",
                "model_version": "crowd",
            }

    rows = read_prompts(indexed(data, ["plain"] * 48), rows_per_block=4)
    twelve = GenerationConfig(concurrency=12, batch_size=4)
    assert twelve.open_batches == 4  # the twelve rows', and the next
    answered = generate(rows, data=data, generation=twelve, seed=7, connect=Crowd).take_all()
    assert len(answered) == 48 and {row["error"] for row in answered} == {None}


def test_one_in_a_hundred_is_bad_in_each_of_eight_ways(data: DataConfig, book: Any) -> None:
    images = Path(data.images)
    (images / "cut.jpg").write_bytes((images / "a.jpg").read_bytes()[:-20])
    Image.new("1", (200, 200)).save(images / "large.png")
    data = data.model_copy(update={"max_image_pixels": 10_000, "max_text_chars": 5_000})
    good = [
        {"id": f"r{n}", "image": "a.jpg", "text": ask(n % 7, "plain"), "ground_truth": "So it is."}
        for n in range(792)
    ]
    lines = [json.dumps(line) for line in good]
    bad = {
        "malformed_line": lines[0][:30],
        "missing_field": json.dumps({"id": "b1", "image": "a.jpg", "text": "What?"}),
        "empty_field": json.dumps(good[0] | {"id": "b2", "ground_truth": " "}),
        "field_too_long": json.dumps(good[0] | {"id": "b3", "text": "long " * 1001}),
        "duplicate_id": lines[0],
        "missing_image": json.dumps(good[0] | {"id": "b5", "image": "nowhere.jpg"}),
        "broken_image": json.dumps(good[0] | {"id": "b6", "image": "cut.jpg"}),
        "image_too_large": json.dumps(good[0] | {"id": "b7", "image": "large.png"}),
    }
    places = {reason: 50 + 100 * k for k, reason in enumerate(bad)}
    for reason, line in bad.items():
        lines.insert(places[reason] - 1, line)
    Path(prompts_of(data)).write_text("\n".join(lines) + "\n", encoding="utf-8")
    index, folder = str(Path(prompts_of(data)).parent / "prompts.parquet"), f"{data.images}-out"
    index_prompts(data, index)
    many = GenerationConfig(concurrency=32, batch_size=100)
    write_preferences(chain(data, index, f"{folder}/rows", fake(book), many), f"{folder}/rows")
    ledger = write_pairs(f"{folder}/rows", folder, PairsConfig(), 7, rows=800)
    assert ledger.rows == 800 and ledger.pairs == 792
    assert dict.fromkeys(bad, 1) == {k.value: n for k, n in ledger.quarantined.items() if n}
    file = Path(folder, "quarantine.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in file.splitlines()]
    assert [(row["reason"], row["source"]) for row in found] == [
        (reason, f"{data.prompts}:{place}") for reason, place in places.items()
    ]


def test_a_run_stops_when_the_policy_goes_down_and_goes_on_afterwards(
    data: DataConfig, book: Any
) -> None:
    index, folder = (
        indexed(data, ["plain"] * 120),
        str(Path(prompts_of(data)).parent / "preferences"),
    )
    with pytest.raises(ServiceError, match=r"of the last \d+ rows failed, .* no replica answers"):
        write_preferences(chain(data, index, folder, fake(book, down_after=30)), folder)
    before = read(folder)
    assert len(before) < 120
    reopen_failed(folder)
    before = read(folder)
    write_preferences(chain(data, index, folder, fake(SharedBook())), folder)
    rows = read(folder)
    assert len(rows) == 120 and not any(row["quarantine"] for row in rows.values())
    assert all(rows[i] == row for i, row in before.items())


def test_rows_that_the_service_failed_are_asked_again(data: DataConfig, book: Any) -> None:
    # Too few rows for the run to stop.
    index, folder = (
        indexed(data, ["plain"] * 38 + ["refused"] * 2),
        str(Path(prompts_of(data)).parent / "preferences"),
    )
    write_preferences(chain(data, index, folder, fake(book, down_after=25)), folder)
    before = read(folder)
    reasons = Counter(row["quarantine"] for row in before.values())
    failed = {i for i, row in before.items() if row["quarantine"] == "service_failed"}
    assert len(before) == 40 and len(failed) >= 13
    # What a crash left half replaced does not count.
    Path(f"{committed_files(folder)[0]}.partial").write_bytes(b"PAR1")
    assert reopen_failed(folder) == reasons["service_failed"]
    assert set(read(folder)) == set(before) - failed
    assert reopen_failed(folder) == 0
    write_preferences(chain(data, index, folder, fake(SharedBook())), folder)
    rows = read(folder)
    assert len(rows) == 40
    assert Counter(row["quarantine"] for row in rows.values()) == {None: 38, "request_failed": 2}
    assert all(rows[i] == row for i, row in before.items() if i not in failed)


def test_a_killed_run_goes_on_and_ends_like_one_whose_workers_died(data: DataConfig) -> None:
    """The driver is killed half way and the same command run again: no committed row is asked for
    again, and the result is that of another run, which loses workers instead."""
    index = indexed(data, ["plain", "bad", "plain", "tie"] * 25)
    folder, other = (str(Path(prompts_of(data)).parent / name) for name in ("killed", "other"))
    half_way(data, index, folder)
    # What a crash in the middle of a write leaves behind.
    Path(folder, "cut-0.parquet").write_bytes(Path(committed_files(folder)[0]).read_bytes()[:-9])
    before = committed_ids(folder)
    assert 20 <= len(before) < 100

    book = SharedBook()
    write_preferences(chain(data, index, folder, fake(book)), folder)
    assert not {f"r{entry['row']}" for entry in book.entries} & before
    assert RowSource.plan(index, 10, folder).blocks == ()
    write_preferences(chain(data, index, other, fake(SharedBook(), die_at=30)), other)
    assert read(folder) == read(other)
    ledgers = [write_pairs(f, f"{f}-out", PairsConfig(), 7, rows=100) for f in (folder, other)]
    assert ledgers[0] == ledgers[1]
    for file in ("pairs.parquet", "quarantine.jsonl"):
        assert Path(f"{folder}-out", file).read_bytes() == Path(f"{other}-out", file).read_bytes()


def half_way(data: DataConfig, index: str, folder: str) -> None:
    """Run in a process of its own whose critic stands still, and kill it when rows are committed."""
    name = f"book-{uuid.uuid4().hex}"
    book = SharedBook(book_actor(name=name, namespace="test"))
    address = ray.get_runtime_context().gcs_address
    driver = multiprocessing.get_context("spawn").Process(
        target=drive, args=(address, name, data.model_dump(), index, folder), daemon=True
    )
    driver.start()
    try:
        deadline = time.monotonic() + 240
        while committed_rows(folder) < 20:
            assert driver.is_alive() and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        driver.kill()
        driver.join()
    assert book.entries


def drive(address: str, book: str, data: dict[str, Any], index: str, folder: str) -> None:
    """The run of `half_way`: its critic stands still after 80 critiques."""
    ray.init(address, namespace="test", log_to_driver=False)
    policy = fake(SharedBook(ray.get_actor(book, namespace="test")), hold_after=80)
    write_preferences(chain(DataConfig(**data), index, folder, policy), folder)


def test_preferences_that_do_not_add_up_are_refused(data: DataConfig, tmp_path: Path) -> None:
    index, folder = indexed(data, ["plain", "bad"]), tmp_path / "preferences"
    folder.mkdir()
    with pytest.raises(DataError, match="holds no preferences"):
        write_pairs(str(folder), str(tmp_path / "out"), PairsConfig(), 7)
    shutil.copy(index, folder / "a.parquet")
    with pytest.raises(DataError, match=r"row r0 .* has no outcome"):
        write_pairs(str(folder), str(tmp_path / "out"), PairsConfig(), 7)
    rows = [{**row, "outcome": "quarantined"} for row in pq.read_table(index).to_pylist()]
    for name in "ab":
        pq.write_table(pa.Table.from_pylist(rows, ROW_SCHEMA), folder / f"{name}.parquet")
    with pytest.raises(LedgerError, match=r"r0 .* twice"):
        write_pairs(str(folder), str(tmp_path / "out"), PairsConfig(), 7)
    with pytest.raises(LedgerError, match="rows that another file"):
        read_prompts(index, done=str(folder))
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(str(tmp_path / "nowhere.parquet"))


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    done=st.sets(st.integers(0, 35)),
    rows_per_block=st.integers(1, 12),
)
@settings(max_examples=25, deadline=None)
def test_blocks_hold_each_row_that_is_left_once(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], done: set[int], rows_per_block: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "done").mkdir()
    ids = [f"r{number}" for number in range(sum(sizes))]
    left = iter(ids)
    for number, size in enumerate(sizes):
        lacks = LATER if number % 2 else []
        write_rows(folder / f"{number}.parquet", [next(left) for _ in range(size)], lacks)
    write_rows(folder / "done" / "0.parquet", [ids[n] for n in done if n < len(ids)])
    source = RowSource.plan(str(folder), rows_per_block, str(folder / "done"))
    blocks = [table for task in source.get_read_tasks(1) for table in task()]
    assert all(table.schema.equals(ROW_SCHEMA) for table in blocks)
    found = [row_id for table in blocks for row_id in table.column("row_id").to_pylist()]
    assert found == [row_id for n, row_id in enumerate(ids) if n not in done]
    assert all(len(table) == rows_per_block for table in blocks[:-1])


LATER = ["chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens"]
"""Columns that older folders lack."""


def write_rows(path: Path, ids: list[str], lacks: Sequence[str] = ()) -> None:
    rows = pa.Table.from_pylist([{"row_id": row_id} for row_id in ids], ROW_SCHEMA)
    rows = rows.drop_columns(list(lacks))
    pq.write_table(rows, path, row_group_size=3)

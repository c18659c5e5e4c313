"""What the stages do for each row, in one process and with a fake policy."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fake_policy import Book, FakePolicy, ask, fake
from PIL import Image

from sima_ray.config import CriticConfig, DataConfig, GenerationConfig
from sima_ray.critic.prompt import CriticPrompt, Layout, load_examples
from sima_ray.data.stages import RowWorker
from sima_ray.data.work import (
    REQUESTS,
    Critic,
    Generate,
    Health,
    candidate_seed,
    decide_row,
)
from sima_ray.errors import DataError, ServiceError
from sima_ray.ports import Completion, CompletionRequest
from sima_ray.records import ROW_SCHEMA


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.jpg")
    return DataConfig(prompts=str(tmp_path / "prompts.jsonl"), images=str(tmp_path))


def batch(ways: list[str], first: int = 0, **values: Any) -> pa.Table:
    rows = [
        {
            "row_id": f"r{n}",
            "image": "a.jpg",
            "text": ask(n, way),
            "ground_truth": "It is.",
            **values,
        }
        for n, way in enumerate(ways, first)
    ]
    return pa.Table.from_pylist(rows, ROW_SCHEMA)


def generator(data: DataConfig, book: Book, concurrency: int = 4, **how: int) -> RowWorker:
    work = Generate(data, GenerationConfig(), seed=7)
    return RowWorker(work, fake(book, **how), concurrency)


def critic(data: DataConfig) -> Critic:
    return Critic(data, CriticConfig(), CriticPrompt(Layout.IMAGE_FIRST, load_examples()))


def judge(data: DataConfig, book: Book) -> RowWorker:
    return RowWorker(critic(data), fake(book), 4)


class Calls(FakePolicy):
    """Keeps how many requests each call had, and different texts in them; and how many calls were open at once."""

    def __init__(self, book: Book) -> None:
        super().__init__(book)
        self.calls: list[tuple[int, int]] = []
        self.open: list[int] = []
        self._inside = 0

    async def complete_all(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        self._inside += 1
        self.open.append(self._inside)
        answers = await super().complete_all(requests)
        self._inside -= 1
        texts = {part["text"] for r in requests for part in r["content"] if part["type"] == "text"}
        self.calls.append((len(requests), len(texts)))
        return answers


async def test_a_rows_requests_are_one_call_and_many_rows_are_in_flight(data: DataConfig) -> None:
    """So the engine computes what they share once, however many rows it works on."""
    for stage, texts in ((Generate(data, GenerationConfig(), 7), 1), (critic(data), 2)):
        book = Book()
        policy = Calls(book)
        rows = await generator(data, Book())(batch(["plain"] * 24))
        done = await RowWorker(stage, lambda: policy, 6)(rows)  # noqa: B023
        assert done.schema.equals(ROW_SCHEMA)
        assert done.column("row_id").to_pylist() == [f"r{n}" for n in range(24)]
        assert policy.calls == [(REQUESTS, texts)] * 24
        assert 4 <= max(policy.open) <= 6
        assert Counter(entry["row"] for entry in book.entries) == dict.fromkeys(range(24), 2)
        assert all(entry["images"] == 1 for entry in book.entries)
        kinds = Counter(entry["kind"] for entry in book.entries)
        assert kinds == ({"greedy": 24, "sampled": 24} if texts == 1 else {"critic": 48})
        assert all(entry["logprob"] is (texts == 1) for entry in book.entries)
        starts = list(dict.fromkeys(entry["row"] for entry in book.entries))
        assert all(abs(row - place) < 6 for place, row in enumerate(starts))


async def test_batches_share_the_worker_s_slots(data: DataConfig) -> None:
    policy = Calls(Book())
    worker = RowWorker(Generate(data, GenerationConfig(), 7), lambda: policy, 3)
    await asyncio.gather(worker(batch(["plain"] * 6)), worker(batch(["plain"] * 6, first=6)))
    assert max(policy.open) == 3
    assert len(policy.calls) == 12


async def test_sampled_seeds_depend_on_run_and_row_alone(data: DataConfig) -> None:
    seeds: list[dict[str, int]] = []
    for concurrency in (1, 5):
        book = Book()
        rows = await generator(data, book, concurrency)(batch(["plain"] * 20))
        seeds.append({r["row_id"]: r["candidates"][1]["seed"] for r in rows.to_pylist()})
        for entry in book.entries:
            assert (entry["seed"] is None) == (entry["kind"] == "greedy")
    assert seeds[0] == seeds[1] == {f"r{n}": candidate_seed(7, f"r{n}", 1) for n in range(20)}
    assert len(set(seeds[0].values())) == 20
    assert candidate_seed(7, "r1", 1) != candidate_seed(8, "r1", 1)
    assert candidate_seed(7, "r1", 1) == 895_270_760  # a run can be resumed by a later version


async def test_a_row_that_fails_is_set_aside_and_costs_no_other(data: DataConfig) -> None:
    rows = await generator(data, Book())(batch(["plain", "refused", "crash", "plain"]))
    rows = (await judge(data, Book())(rows)).to_pylist()
    assert [row["quarantine"] for row in rows] == [None, "request_failed", "request_failed", None]
    assert [row["error"] for row in rows[1:3]] == ["prompt is too long", "RuntimeError: a bug"]
    assert rows[1]["candidates"] is None and rows[1]["critiques"] is None


async def test_a_row_set_aside_passes_untouched(data: DataConfig) -> None:
    book = Book()
    bad = batch(["plain"], quarantine="empty_field", error="'text' is empty", image=None)
    for stage in (generator, judge):
        assert (await stage(data, book)(bad)).equals(bad)
    assert book.entries == []
    assert decide_row(bad.to_pylist()[0]) == {"outcome": "quarantined"}


async def test_images_that_cannot_be_used(data: DataConfig) -> None:
    (Path(data.images) / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    book = Book()
    for image, reason in (
        ("no.jpg", "missing_image"),
        ("cut.jpg", "broken_image"),
        ("../a.jpg", "missing_image"),
    ):
        (row,) = (await generator(data, book)(batch(["plain"], image=image))).to_pylist()
        assert row["quarantine"] == reason and image in row["error"]
    small = data.model_copy(update={"max_image_pixels": 100})
    (row,) = (await generator(small, book)(batch(["plain"]))).to_pylist()
    assert row["quarantine"] == "image_too_large"
    assert book.entries == []
    nowhere = data.model_copy(update={"images": "ftp2://nowhere"})
    with pytest.raises(DataError, match="cannot be opened"):
        await generator(nowhere, book)(batch(["plain"]))


async def test_verdicts_become_outcomes(data: DataConfig) -> None:
    ways = ["plain", "same", "tie", "mumble"]
    book = Book()
    rows = (await judge(data, book)(await generator(data, Book())(batch(ways)))).to_pylist()
    decided = [{**row, **decide_row(row)} for row in rows]
    assert [row["outcome"] for row in decided] == [
        "preferred_first",
        "identical",
        "inconsistent",
        "unparseable",
    ]
    assert decided[0]["chosen_from"] == "greedy" and decided[0]["weight"] == 1.0
    assert (decided[0]["chosen_logp"], decided[0]["rejected_logp"]) == (-1.5, -1.5)
    assert (decided[0]["chosen_tokens"], decided[0]["rejected_tokens"]) == (2, 2)
    assert [c["choice"] for c in rows[0]["critiques"]] == [1, 2]
    assert [c["choice"] for c in rows[2]["critiques"]] == [1, 1]
    assert [c["choice"] for c in rows[3]["critiques"]] == [None, None]
    assert rows[1]["critiques"] == []
    probabilities = [[c["probability"] for c in row["critiques"]] for row in rows]
    assert probabilities[0] == pytest.approx([0.75, 0.75])  # of the greedy one, in either place
    assert probabilities[2] == pytest.approx([0.75, 0.25])
    assert probabilities[3] == [None, None]
    assert all(e["alternatives"] == ["Choice: [[1]]", "Choice: [[2]]"] for e in book.entries)
    assert len({row["prompt_version"] for row in rows}) == 1
    assert Counter(e["row"] for e in book.entries) == {0: 2, 2: 2, 3: 2}


async def test_a_worker_stops_when_the_policy_is_down(data: DataConfig) -> None:
    book = Book()
    worker = generator(data, book, down_after=20)
    with pytest.raises(ServiceError, match=r"of the last \d+ rows failed, .* no replica answers"):
        for first in range(0, 200, 10):
            await worker(batch(["plain"] * 10, first))
    assert len({entry["row"] for entry in book.entries}) < 60


def test_health_tells_a_bad_row_from_a_policy_that_is_down() -> None:
    health = Health()
    for _ in range(10_000):
        health.record(None)
        health.record("now and then")
    for _ in range(100):
        health.record(None)
    for _ in range(50):
        health.record("down")
    with pytest.raises(ServiceError, match="51 of the last 100 rows failed"):
        health.record("down")
    few = Health()
    for _ in range(49):
        few.record("always")
    with pytest.raises(ServiceError, match="50 of the last 50"):
        few.record("always")

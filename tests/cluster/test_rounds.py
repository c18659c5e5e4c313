"""Rounds on a local Ray with a fake policy: whose weights judge, what later rounds take over, when they end.

Training, merging and the figures of evaluations are markers in the run folder, as a run that is taken up again
finds them; preferences really run.
"""

import io
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray.cloudpickle
from fake_policy import FakePolicy, SharedBook, ask
from PIL import Image

from sima_ray.config import RunConfig
from sima_ray.errors import DataError
from sima_ray.metrics.chair import score_caption
from sima_ray.ports import Completion, CompletionRequest, Policy
from sima_ray.runtime import stages
from sima_ray.runtime.evaluation import Caption, Evaluation
from sima_ray.runtime.progress import Progress
from sima_ray.runtime.run import Run

# Ray's workers do not know where tests live.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.usefixtures("ray_cluster")

WAYS = ["plain", "tie", "same", "bad", "plain", "mumble"]


class Versioned(FakePolicy):
    """A fake policy that answers under the name of its weights."""

    def __init__(self, book: SharedBook, version: str) -> None:
        super().__init__(book)
        self._version = version

    async def complete(self, request: CompletionRequest) -> Completion:
        return await super().complete(request) | {"model_version": self._version}


class FakeService(stages.PolicyService):
    """Serves fake policies; keeps the versions that it was asked for.

    Args:
        run: The run.
        ends_at: The driver is interrupted when it is to serve the version of that round.
    """

    def __init__(self, run: Run, ends_at: int | None = None) -> None:
        super().__init__(run)
        self.run, self.book, self.ends_at = run, SharedBook(), ends_at
        self.versions: list[str] = []

    def ensure(self, number: int) -> None:
        if number == self.ends_at:
            raise KeyboardInterrupt
        if self.versions[-1:] != [self.run.version(number)]:
            self.versions.append(self.run.version(number))

    def connect(self) -> Callable[[], Policy]:
        return partial(Versioned, self.book, self.versions[-1])

    def release(self) -> None:
        pass


def opened(folder: Path, rounds: int, ways: list[str] = WAYS, **changes: Any) -> Run:
    """A run on prompts that go these ways, whose training of every round has been done."""
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (16, 16)).save(folder / "images" / "a.jpg")
    lines = [
        {"id": f"r{n}", "image": "a.jpg", "text": ask(n, way)}
        | ({} if way == "bad" else {"ground_truth": "The truth."})
        for n, way in enumerate(ways)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values: dict[str, Any] = {
        "name": "r",
        "runs": str(folder),
        "rounds": rounds,
        "data": {"prompts": str(folder / "prompts.jsonl"), "images": str(folder / "images")},
        "policy": {"model": "model", "engine": {"accelerator": "cpu"}},
        "training": {"accelerator": "cpu"},
        "generation": {"retries": 0},
    }
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value
    run = Run.open(RunConfig.parse(values), Progress(io.StringIO()))
    for number in range(1, rounds + 1):
        run.folder.write_text("", f"round-{number}", "train", "adapter", "adapter_config.json")
        for stage in ("train", "merge"):
            done(run, f"round-{number}-{stage}", {})
    return run


def done(run: Run, key: str, result: dict[str, Any]) -> None:
    run.folder.write_json({"result": result, "seconds": 1.0, "at": ""}, "stages", f"{key}.json")


def evaluated(run: Run, *chair: float, recall: float = 0.7) -> None:
    """Figures of each round; the recall is that of the last."""
    for number, value in enumerate(chair):
        caption = Caption("c", "a.jpg", "?", "A dog.", score_caption("A dog.", frozenset()), None)
        result = Evaluation([caption], {})
        figures = {"chair_s": value, "chair_i": value, "objects": 2.0, "length": 40.0}
        figures["recall"] = recall if number == len(chair) - 1 else 0.7
        estimates = {
            name: dict.fromkeys(("value", "low", "high"), v) for name, v in figures.items()
        }
        done(run, f"round-{number}-evaluate", result.figures() | estimates)
        run.folder.write_text(result.captions_jsonl(), f"round-{number}", "captions.jsonl")


def said(run: Run) -> str:
    out: Any = run.progress._out
    return out.getvalue()


def read(run: Run, number: int) -> dict[str, dict[str, Any]]:
    rows = pq.read_table(run.round_path(number, "preferences")).to_pylist()
    return {row["row_id"]: row for row in rows}


def versions(row: dict[str, Any], part: str) -> set[str]:
    return {made["model_version"] for made in row[part] or ()}


EVALUATION: dict[str, Any] = {"evaluation": {"prompts": "p", "images": "i", "instances": "j"}}


def test_the_best_round_is_the_result_and_a_resumed_run_says_the_same(tmp_path: Path) -> None:
    run = opened(tmp_path, 4, WAYS, early_stopping={}, **EVALUATION)
    evaluated(run, 0.5, 0.4, 0.1, recall=0.6)
    service = FakeService(run)
    stages.rounds(run, service)
    assert service.versions == ["base", "r-round-1"]  # no preferences for a third round
    lines = [line for line in said(run).splitlines() if "rounds  " in line]
    assert lines[0].endswith(
        "round 1: chair_s 0.500 of the base model → 0.400, a gain; the best is round 1"
    )
    end = (
        "end after 2: round 2: recall fell from 0.700 to 0.600, by more than 0.02; "
        "the best is round 1"
    )
    assert lines[1].endswith(end) and len(lines) == 2
    summary = stages.report(run)
    assert summary["final"] == {
        "round": 1,
        "policy": run.policy(1),
        "last_round": 2,
        "stopped_early": True,
        "reason": end,
    }
    assert summary["after"]["chair_s"]["value"] == 0.4 and len(summary["rounds"]) == 3
    assert end in (tmp_path / "r" / "report.html").read_text()
    assert summary["ledger"]["rows"] == 2 * len(WAYS)

    again = Run.open(run.config, Progress(io.StringIO()))
    service = FakeService(again)
    stages.rounds(again, service)
    assert service.versions == []
    assert [line for line in said(again).splitlines() if "rounds  " in line] == lines
    assert stages.report(again) == summary


def test_the_base_model_judges_what_later_policies_say(tmp_path: Path) -> None:
    """Killed while it judges, the run goes on without generating anything again."""
    run = opened(tmp_path, 2, critic={"policy": "base"})
    stages.preferences(run, 1, FakeService(run))
    assert not run.folder.exists("round-1", "candidates")
    killed = FakeService(run, ends_at=0)
    with pytest.raises(KeyboardInterrupt):
        stages.preferences(run, 2, killed)
    assert killed.versions == ["r-round-1"]
    service = FakeService(run)
    stages.preferences(run, 2, service)
    assert service.versions == ["base"]
    assert {entry["kind"] for entry in service.book.entries} == {"critic"}
    rows = read(run, 2)
    assert rows.keys() == read(run, 1).keys()
    assert versions(rows["r0"], "candidates") == {"r-round-1"}
    assert (
        versions(rows["r0"], "critiques") == {"base"} == versions(read(run, 1)["r0"], "critiques")
    )
    outcomes = {row_id: row["outcome"] for row_id, row in read(run, 1).items()}
    assert {row_id: row["outcome"] for row_id, row in rows.items()} == outcomes
    seconds = stages.summary.seconds(run)
    assert list(seconds)[-5:-2] == ["round-1-merge", "round-2-candidates", "round-2-preferences"]


def test_later_rounds_ask_what_is_unsettled_and_are_trained_on_earlier_pairs_too(
    tmp_path: Path,
) -> None:
    run = opened(
        tmp_path, 3, data={"prompts_after_first": "unsettled"}, pairs={"earlier_rounds": 0.5}
    )
    service = FakeService(run)
    with pytest.raises(DataError, match="run the stage `preferences` first"):
        stages.preferences(run, 2, service)
    stages.rounds(run, service)
    assert [sorted(read(run, k)) for k in (2, 3)] == [["r1", "r5"]] * 2
    assert "2 of 6 prompts are unsettled" in said(run)
    summary = stages.report(run)
    assert summary["ledger"]["rows"] == 6 + 2 + 2 == sum(summary["ledger"]["outcomes"].values())
    assert summary["prompts"]["2"]["settled"] == {
        "preferred_first": 2,
        "identical": 1,
        "quarantined": 1,
    }
    assert summary["earlier_pairs"] == {
        "2": {"1": {"pairs": 2, "drawn": 1, "not_drawn": 1, "judged_again": 0}},
        "3": {
            "2": {"pairs": 0, "drawn": 0, "not_drawn": 0, "judged_again": 0},
            "1": {"pairs": 2, "drawn": 1, "not_drawn": 1, "judged_again": 0},
        },
    }
    mixed = pq.read_table(run.round_path(2, "training_pairs.parquet"))
    assert mixed["row_id"].to_pylist() in (["r0@round-1"], ["r4@round-1"])


def test_rounds_end_where_no_prompt_is_left(tmp_path: Path) -> None:
    run = opened(tmp_path, 3, ["plain", "same"], data={"prompts_after_first": "unsettled"})
    service = FakeService(run)
    stages.rounds(run, service)
    assert service.versions == ["base"]
    end = "end after 1: no prompt is left to ask"
    assert end in said(run)
    summary = stages.report(run)
    assert (summary["final"]["round"], summary["final"]["reason"]) == (1, end)


def test_rounds_end_where_nothing_can_be_trained_on(tmp_path: Path) -> None:
    """The first round's pairs are settled, and the next has none; what it asked is in the ledger."""
    run = opened(tmp_path, 3, ["plain", "tie"], data={"prompts_after_first": "unsettled"})
    service = FakeService(run)
    stages.rounds(run, service)
    assert service.versions == ["base", "r-round-1"]
    summary = stages.report(run)
    assert summary["final"]["reason"] == "end after 1: round 2 has no pair to be trained on"
    assert summary["final"]["policy"] == run.policy(1)
    assert summary["ledger"]["rows"] == 3 and summary["ledger"]["inconsistent"] == 2


def test_a_plain_run_has_no_word_on_any_of_this(tmp_path: Path) -> None:
    run = opened(tmp_path, 1)
    stages.rounds(run, FakeService(run))
    assert not {"final", "prompts", "earlier_pairs"} & stages.report(run).keys()
    assert {path.name for path in (tmp_path / "r" / "round-1").iterdir()} == {
        *("ledger.json", "pairs.llava.json", "pairs.parquet", "pairs.trl.parquet"),
        *("preferences", "quarantine.jsonl", "train"),
    }

"""`sima evaluate` on a finished run: the very job, in this process, with a policy and a judge that are fakes."""

import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from benchmark_folder import AMBER_QUESTIONS, TableService, build
from fake_judge import KEY, FakeJudge
from typer.testing import CliRunner, Result

from jobs import entry
from sima_ray.cli import app
from sima_ray.ledger import Ledger
from sima_ray.records import ROW_SCHEMA
from sima_ray.runtime import stages, submission
from sima_ray.runtime.attempt import last_attempt
from sima_ray.runtime.evaluating import evaluate
from sima_ray.runtime.run import Run


class Service(TableService):
    """Says yes to everything, and lets go when it is told to."""

    released = 0

    def __init__(self) -> None:
        super().__init__(lambda number, text: "Yes, a dog." if number else "Yes.")

    def release(self) -> None:
        self.released += 1


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    """What jobs find in place of the policy's service; they run at once, here."""
    found = Service()

    def submit(stage: str, config: Any, target: Any, arguments: tuple[str, ...]) -> str:
        file = Path(config.runs) / "submitted.yaml"
        file.write_text(config.dump())
        monkeypatch.setattr(sys, "argv", [f"jobs.{stage}", str(file), *arguments])
        runpy.run_module(f"jobs.{stage}", run_name="__main__")
        return "job-1"

    monkeypatch.setattr(stages, "PolicyService", lambda run: found)
    monkeypatch.setattr(entry, "connect", lambda: None)
    monkeypatch.setattr(submission, "find_cluster", lambda _: submission.Target("http://head"))
    monkeypatch.setattr(submission, "submit", submit)
    return found


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A run of one round with its report; POPE alone was asked, of both policies."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with FakeJudge(lambda prompt: "Rating: 5") as judge:
        run = Run.open(build(tmp_path, judge.url))
        ledger = Ledger(0).to_json()
        for stage, result in (("preferences", {"ledger": ledger}), ("train", {}), ("merge", {})):
            run.once(f"round-1-{stage}", stage, lambda _, result=result: (result, ""))
        run.folder.write_json(ledger, "round-1", "ledger.json")
        (Path(run.round_path(1)) / "preferences").mkdir()
        pq.write_table(ROW_SCHEMA.empty_table(), run.round_path(1, "preferences", "a.parquet"))
        for number in (0, 1):
            evaluate(run, number, Service(), ["pope"])
        stages.report(run)
        yield run


Sima = Callable[..., Result]


@pytest.fixture
def sima(finished: Run, service: Service) -> Sima:
    """`sima evaluate` of the run, with further arguments."""

    def call(*arguments: str, config: str = "") -> Result:
        service.asked.clear()
        file = config or finished.folder.path("run.yaml")
        return CliRunner().invoke(app, ["evaluate", file, "--no-wait", *arguments])

    return call


def summary(run: Run) -> dict[str, Any]:
    return run.folder.read_json("summary.json")


def test_the_base_model_of_a_finished_run_is_scored_on_one_more_suite(
    finished: Run, service: Service, sima: Sima
) -> None:
    before = summary(finished)
    assert before["suites"].keys() == {"pope"}
    done = sima("--round", "0", "--suite", "amber", "--suite", "pope")
    assert done.exit_code == 0, done
    asked = sorted([*(text for *_, text in AMBER_QUESTIONS), "Describe this image."])
    assert sorted(service.asked) == [(0, text) for text in asked]  # of POPE nothing
    assert service.released == 1
    after = summary(finished)["suites"]
    assert after["pope"] == before["suites"]["pope"]
    assert after["amber"]["before"]["rows"] == 4 and after["amber"]["after"] is None
    assert "AMBER" in finished.folder.read_text("report.html")
    attempt = last_attempt(Path(finished.folder.root))
    assert attempt is not None and (attempt.stage, attempt.round) == ("evaluate", 0)
    assert attempt.arguments == ("--suites", "amber,pope") and attempt.state == "SUCCEEDED"

    assert sima("--round", "0", "--suite", "amber").exit_code == 0 and not service.asked
    # Without a round: the first that lacks it, and now there is a pair.
    assert sima("--suite", "amber").exit_code == 0
    assert {number for number, _ in service.asked} == {1}
    assert summary(finished)["suites"]["amber"]["pairs"] == 4


def test_one_round_is_scored_by_chair_before_the_other(
    finished: Run, service: Service, sima: Sima, tmp_path: Path
) -> None:
    """No report can be made of one side; that is said, and is no failure."""
    question = {"image": "COCO_val2014_000000000025.jpg", "text": "Tell.", "ground_truth": "A man."}
    (tmp_path / "chair.jsonl").write_text(json.dumps(question))
    values = yaml.safe_load(finished.folder.read_text("run.yaml"))
    values["evaluation"] |= {
        "prompts": str(tmp_path / "chair.jsonl"),
        "instances": str(tmp_path / "coco" / "instances.json"),
    }
    (tmp_path / "chair.yaml").write_text(yaml.safe_dump(values))
    before = summary(finished)
    for number in (0, 1):
        assert summary(finished) == before
        done = sima("--round", f"{number}", "--suite", "chair", config=str(tmp_path / "chair.yaml"))
        assert done.exit_code == 0, done
        assert service.asked == [(number, "Tell.")]
        assert ("captions.jsonl is missing: run the stage `evaluate`" in done.output) == (
            not number
        )
    found = summary(finished)
    assert [found[side]["chair_s"]["value"] for side in ("before", "after")] == [0, 1]

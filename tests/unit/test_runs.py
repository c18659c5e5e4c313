"""`sima runs`: what a run folder tells by itself, and totals that do not add up."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from jobs import entry
from sima_ray.cli import app
from sima_ray.config import RunConfig
from sima_ray.errors import DataError, LedgerError, SimaError
from sima_ray.ledger import Ledger
from sima_ray.records import Outcome, Quarantine
from sima_ray.runtime.account import account, show
from sima_ray.runtime.attempt import Attempt, last_attempt, recorded
from sima_ray.runtime.progress import Progress
from sima_ray.runtime.run import Run
from sima_ray.runtime.runs import RunView, done_line, list_runs, resumption, table, view

LEDGER = Ledger(
    10,
    {Outcome.PREFERRED_FIRST: 4, Outcome.IDENTICAL: 5, Outcome.QUARANTINED: 1},
    {Quarantine.MISSING_IMAGE: 1},
)
USAGE = {"requests": 30, "failed": 0, "prompt_tokens": 900, "cached_tokens": 600, "tokens": 120}


def make(root: Path, rounds: int = 1, name: str = "r", **sections: Any) -> Run:
    """A run whose rounds are all there, as its stages leave them."""
    values = {
        "name": name,
        "runs": str(root),
        "rounds": rounds,
        "data": {"prompts": "p.jsonl", "images": "images"},
        "policy": {"model": "model"},
    }
    run = Run.open(RunConfig.parse(values | sections), Progress(io.StringIO()))
    mark(run, "prepare", {"rows": 10, "good": 9})
    mark(run, "round-0-evaluate", figures(0.5, 0.8))
    for number in range(1, rounds + 1):
        result = {"ledger": LEDGER.to_json(), "usage": USAGE}
        mark(run, f"round-{number}-preferences", result, seconds=1800)
        run.folder.write_json(LEDGER.to_json(), f"round-{number}", "ledger.json")
        run.folder.write_text("{}\n", f"round-{number}", "quarantine.jsonl")
        pq.write_table(pa.table({"row_id": list("abcd")}), run.round_path(number, "pairs.parquet"))
        for stage in ("train", "merge"):
            mark(run, f"round-{number}-{stage}", {"rows": 8}, seconds=3600)
        mark(run, f"round-{number}-evaluate", figures(0.4, 0.9))
    return run


def mark(run: Run, key: str, result: dict[str, Any], seconds: float = 2.0) -> None:
    marker = {"result": result, "seconds": seconds, "at": "2026-01-01T00:00:00+00:00"}
    run.folder.write_json(marker, "stages", f"{key}.json")


def figures(chair_s: float, recall: float) -> dict[str, Any]:
    return {"chair_s": {"value": chair_s}, "recall": {"value": recall}}


def home(run: Run) -> Path:
    return Path(run.folder.root)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_run_is_one_line(tmp_path: Path) -> None:
    run = make(tmp_path, rounds=2)
    run.folder.write_json({}, "summary.json")
    header, line = table([view(home(run))]).splitlines()
    assert header.split()[:4] == ["NAME", "ROUNDS", "STAGE", "STATE"]
    assert line.startswith("r     2/2     round 2 evaluate  done")
    assert line.endswith("8  0.500 → 0.400  0.800 → 0.900")


def test_an_attempt_says_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMA_JOB", "sima-train-r-1")
    run = make(tmp_path)
    with recorded(run.folder, "train", 1):
        found = view(home(run))
        assert found.attempt == last_attempt(home(run))
        assert isinstance(found.attempt, Attempt) and found.attempt.state == "RUNNING"
        # A killed job cannot say that it ended: only a cluster knows whether it goes on.
        assert found.state() == "unfinished"
        assert found.state({"sima-train-r-1"}) == found.state({run.folder.root}) == "running"
    assert view(home(run)).state() == "unfinished"
    run.folder.write_json({}, "summary.json")
    assert view(home(run)).state() == "done"
    with pytest.raises(DataError), recorded(run.folder, "train", 1):
        raise DataError("no pairs")
    found = view(home(run))
    assert (found.state(), found.to_json()["error"]) == ("failed", "no pairs")
    with pytest.raises(SystemExit), recorded(run.folder, "train", 1):
        raise SystemExit(15)
    assert view(home(run)).state() == "stopped"


@pytest.mark.parametrize(
    ("stage", "state", "expected"),
    [
        ("train", "RUNNING", ("train", ("--round", "1"))),
        ("pipeline", "FAILED", ("pipeline", ())),
        ("pipeline", "STOPPED", ("pipeline", ())),
        ("train", "SUCCEEDED", (None, ())),
        (None, None, ("pipeline", ())),  # made by a version that kept no record
    ],
)
def test_what_was_interrupted(
    tmp_path: Path, stage: str | None, state: str | None, expected: tuple[Any, Any]
) -> None:
    run = make(tmp_path)
    if stage:
        values = {"stage": stage, "round": 1, "job": None, "began": "", "state": state}
        run.folder.write_json(values, "job.json")
    for name in ("r", run.folder.root, f"{run.folder.root}/run.yaml"):
        found = resumption(name, tmp_path)
        assert (found.stage, found.arguments) == expected
        assert found.config == run.config
    done = "prepare · round 0: evaluate · round 1: preferences, train, merge, evaluate"
    assert done_line(found.run) == done


@pytest.mark.parametrize(
    ("line", "again"),
    [
        (["--round", "0", "--suites", "mmhal,pope"], ("--round", "0", "--suites", "mmhal,pope")),
        (["--suites", "mmhal"], ("--round", "1", "--suites", "mmhal")),
        ([], ("--round", "1")),
    ],
)
def test_a_job_is_taken_up_with_its_own_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: list[str], again: tuple[str, ...]
) -> None:
    run, seen = make(tmp_path), list[tuple[int, str]]()

    def body(run: Run, number: int, suites: str) -> None:
        seen.append((number, suites))
        raise DataError("the judge is away")

    def job(*arguments: str) -> None:
        words = ["jobs.evaluate", f"{run.folder.root}/run.yaml", *arguments]
        monkeypatch.setattr("sys.argv", words)
        with pytest.raises(SystemExit):
            entry.main("evaluate", "", body, lambda run, suites: 1, suites="")

    monkeypatch.setattr(entry, "connect", lambda: None)  # no cluster is needed for this
    job(*line)
    found = resumption("r", tmp_path)
    assert (found.stage, found.arguments) == ("evaluate", again)
    job(*found.arguments)
    assert seen[0] == seen[1]
    assert resumption("r", tmp_path).arguments == again


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(SimaError, match="none: no run there"):
        resumption("none", tmp_path)
    run = make(tmp_path)
    config = tmp_path / "other.yaml"
    config.write_text(yaml.safe_dump(run.config.model_dump() | {"name": "other"}))
    with pytest.raises(SimaError, match="the run has not begun: `sima submit pipeline"):
        resumption(str(config), tmp_path)
    home(run).rename(tmp_path / "copy")
    with pytest.raises(SimaError, match="belongs to the run r"):
        resumption("copy", tmp_path)


def test_a_broken_run_hides_no_other(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.yaml").write_text("- not\n- a mapping\n")
    error, good = list_runs(tmp_path)
    assert isinstance(error, DataError) and "bad/run.yaml" in str(error)
    assert isinstance(good, RunView)
    done = CliRunner().invoke(app, ["runs", "--runs", str(tmp_path)])
    assert done.exit_code == 0
    assert "left out: " in done.stderr and len(done.stdout.splitlines()) == 2


def test_the_account(tmp_path: Path) -> None:
    run = make(tmp_path, rounds=2)
    found = account(home(run))
    assert (found.problems, found.cost, found.total.pairs) == ([], None, 8)
    assert found.usage()["tokens"] == 240
    text = show(found)
    assert "round 1      10 prompts = 4 pairs + 5 identical + 1 quarantined" in text
    assert "total        20 prompts = 8 pairs" in text
    assert "COST" not in text and "seed 0" in text
    values = json.loads(json.dumps(found.to_json()))
    assert values["ledger"]["rows"] == 20 and values["stages"][1]["stage"] == "round-0-evaluate"


def test_the_account_has_what_judges_took(tmp_path: Path) -> None:
    run = make(tmp_path)
    judge = {"model": "judge-1", "asked": 96, "cached": 4, "tries": 97, "failures": {"timeout": 2}}
    judge |= {"prompt_tokens": 50_000, "answer_tokens": 1_200, "cost": 0.125, "cost_before": 0.005}
    mark(run, "round-0-evaluate-mmhal", {"figures": {}, "judge": judge})
    free = judge | {"cost": None, "cost_before": None}
    mark(run, "round-1-evaluate-mementos", {"figures": {}, "judge": free})
    found = account(home(run))
    header, first, second, total = (
        " ".join(line.split()) for line in show(found).partition("JUDGED")[2].splitlines()[:4]
    )
    assert header == "MODEL ASKED KEPT FAILED TOKENS COST KEPT-COST"
    assert first == "round 0 evaluate-mmhal judge-1 96 4 2 51,200 0.12 0.01"
    assert second == "round 1 evaluate-mementos judge-1 96 4 2 51,200 - -"
    assert total == "total - - - - - 0.12 -"
    assert all(len(line) <= 100 for line in show(found).splitlines() if "judge-1" in line)
    values = found.to_json()
    assert values["judge_cost"] == 0.125 and values["cost"] is None
    [kept] = [one for one in values["stages"] if one["stage"] == "round-0-evaluate-mmhal"]
    assert kept["judge"] == judge
    assert "JUDGED" not in show(account(home(make(tmp_path, name="other"))))


def test_cost_is_a_range_where_replicas_follow_the_load(tmp_path: Path) -> None:
    policy = {"model": "m", "service": {"max_replicas": 4, "release_for_training": True}}
    run = make(tmp_path, policy=policy, training={"workers": 8})
    costs = account(home(run), price=3.0).costs
    assert costs["round-1-preferences"] == (1.5, 6.0)  # half an hour of 1 to 4
    assert costs["round-1-train"] == (24.0, 24.0)  # an hour of 8; the replicas were given back
    text = show(account(home(run), price=3.0), 3.0)
    assert "1.50 … 6.00" in text and "  24.00" in text and "at 3 an hour" in text


def test_cost_of_replicas_that_stay_while_training(tmp_path: Path) -> None:
    costs = account(home(make(tmp_path)), price=1.0).costs
    assert costs["round-1-train"] == costs["round-1-merge"] == (2.0, 2.0)


def wrong_total(run: Run) -> str:
    run.folder.write_json((LEDGER + LEDGER).to_json(), "ledger.json")
    return "the run: ledger.json does not add up: .*rows is 20 and must be 10"


def wrong_outcomes(run: Run) -> str:
    bad = Ledger(11, LEDGER.outcomes, LEDGER.quarantined)
    mark(run, "round-1-preferences", {"ledger": bad.to_json(), "usage": USAGE})
    return "round 1: the ledger does not add up: 11 rows read but 10 accounted for"


def wrong_pairs(run: Run) -> str:
    change(home(run) / "round-1" / "ledger.json", pairs=5)
    return "round 1: ledger.json does not add up: pairs is 5 and must be 4"


def lost_pair(run: Run) -> str:
    pq.write_table(pa.table({"row_id": list("abc")}), run.round_path(1, "pairs.parquet"))
    return r"round 1: pairs\.parquet holds 3 rows, the ledger 4"


def lost_reason(run: Run) -> str:
    run.folder.write_text("", "round-1", "quarantine.jsonl")
    return r"round 1: quarantine\.jsonl holds 0 rows, the ledger 1"


@pytest.mark.parametrize(
    "spoil", [wrong_total, wrong_outcomes, wrong_pairs, lost_pair, lost_reason]
)
def test_a_total_that_does_not_add_up_is_an_error(tmp_path: Path, spoil: Any) -> None:
    run = make(tmp_path)
    runner, arguments = CliRunner(), ["runs", "--runs", str(tmp_path), "show", "r"]
    assert runner.invoke(app, arguments).exit_code == 0
    message = spoil(run)
    for more in ([], ["--json"]):
        done = runner.invoke(app, [*arguments, *more])
        assert isinstance(done.exception, LedgerError)
        with pytest.raises(LedgerError, match=message):
            raise done.exception
        assert "revision" in done.stdout  # what there is, is shown all the same

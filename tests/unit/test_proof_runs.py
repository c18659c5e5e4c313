"""The runs of the proof: what has finished, what is left, and work folders that must not be mixed up."""

import json
from pathlib import Path

import pytest

from benchmarks.proof.runs import Journal, Task, Workers, make_world, revisions
from benchmarks.proof.settings import changed
from sima_ray.config import RunConfig
from sima_ray.errors import ConfigError

DEMO = RunConfig.load(Path(__file__).parents[2] / "configs" / "demo.yaml")


def policy(folder: Path, weights: bytes) -> str:
    """A folder with as much of a model as a fingerprint reads."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    header = b"{}"
    content = len(header).to_bytes(8, "little") + header + weights
    (folder / "model.safetensors").write_bytes(content)
    return str(folder)


def test_jobs_that_left_their_marker_are_not_run_again(tmp_path: Path) -> None:
    task = Task(changed(DEMO, name="r", runs=str(tmp_path)), ("evaluate", "preferences"))
    assert task.left() == ["evaluate", "preferences"]
    (task.folder / "stages").mkdir(parents=True)
    (task.folder / "run.yaml").write_text(task.config.dump())
    (task.folder / "stages" / "round-0-evaluate.json").write_text("{}")
    assert task.left() == ["preferences"]
    ledger = {"rows": 1200, "pairs": 300}
    marker = {"result": {"ledger": ledger}}
    (task.folder / "stages" / "round-1-preferences.json").write_text(json.dumps(marker))
    assert task.left() == []
    assert task.result() == "1,200 prompts → 300 pairs"


def finished(folder: Path, config: RunConfig, revision: str) -> Task:
    """A whole run, as far as tasks look."""
    task = Task(changed(config, name=f"r-{revision}", runs=str(folder)), ("pipeline",))
    (task.folder / "stages").mkdir(parents=True)
    (task.folder / "run.yaml").write_text(task.config.dump())
    (task.folder / "summary.json").write_text("{}")
    (task.folder / "provenance.json").write_text(json.dumps({"revision": revision}))
    figures = {"captions": 2, "chair_s": {"value": 0.5}, "recall": {"value": 0.9}}
    marker = json.dumps({"result": figures})
    (task.folder / "stages" / "round-1-evaluate.json").write_text(marker)
    return task


def test_finished_runs_need_no_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [finished(tmp_path, DEMO, revision) for revision in ("abc", "abc-dirty")]
    with Workers(2, tmp_path / "logs", lambda: None) as workers:
        workers.run(tasks)
    assert "  2/2  r-abc-dirty" in capsys.readouterr().out
    assert revisions(workers.folders) == ["abc", "abc-dirty"]


def test_a_run_with_other_settings_is_not_taken_for_it(tmp_path: Path) -> None:
    config = changed(DEMO, name="r", runs=str(tmp_path))
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.yaml").write_text(changed(config, seed=1).dump())
    with pytest.raises(ConfigError, match="other settings"):
        Task(config, ("pipeline",)).left()


def test_a_work_folder_belongs_to_one_policy(tmp_path: Path) -> None:
    work = tmp_path / "work"
    config = changed(DEMO, policy={"model": policy(tmp_path / "policy", b"\0" * 64)})
    first = Journal(work, config)
    assert Journal(work, config).wall_s >= 0
    assert Journal(work, config).made_with == first.made_with
    policy(tmp_path / "policy", b"\1" * 64)
    with pytest.raises(ConfigError, match="another policy"):
        Journal(work, config)


def test_wall_time_adds_up_over_commands(tmp_path: Path) -> None:
    config = changed(DEMO, policy={"model": policy(tmp_path / "policy", b"\0" * 64)})
    journal = Journal(tmp_path, config)
    file = tmp_path / "journal.json"
    file.write_text(json.dumps({"made_with": journal.made_with, "wall_s": 1000.0}))
    again = Journal(tmp_path, config)
    assert 1000 <= again.wall_s < 1060
    again.tick()
    assert json.loads(file.read_text())["wall_s"] >= 1000


def test_a_world_is_built_once(tmp_path: Path) -> None:
    world = make_world(tmp_path, "test", 2, 0)
    assert len(world.prompts.read_text().splitlines()) == 2
    world.prompts.write_text("changed\n")
    assert make_world(tmp_path, "test", 2, 0).prompts.read_text() == "changed\n"

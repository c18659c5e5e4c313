"""The run folder: markers, resume, and runs that must not be mixed up."""

import io
from pathlib import Path

import pytest

from sima_ray.config import RunConfig
from sima_ray.errors import ConfigError
from sima_ray.runtime.progress import MARK, Progress, Screen, Stage, duration
from sima_ray.runtime.run import Run


def config(folder: Path, **changes: object) -> RunConfig:
    values = {
        "name": "r",
        "runs": str(folder),
        "data": {"prompts": "p.jsonl", "images": "images"},
        "policy": {"model": "model"},
    }
    return RunConfig.parse(values | changes)


def test_a_finished_stage_is_not_run_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def work(stage: Stage) -> tuple[dict[str, object], str]:
        calls.append(1)
        return {"answer": 42}, "worked"

    for _ in range(2):
        run = Run.open(config(tmp_path), Progress(io.StringIO()))
        assert run.once("a-stage", "a stage", work) == {"answer": 42}
    assert calls == [1]


def test_a_stage_that_failed_runs_again(tmp_path: Path) -> None:
    run = Run.open(config(tmp_path), Progress(io.StringIO()))

    def fail(stage: Stage) -> tuple[dict[str, object], str]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        run.once("a-stage", "a stage", fail)
    assert run.done("a-stage") is None


def test_the_run_folder_keeps_config_and_provenance(tmp_path: Path) -> None:
    run = Run.open(config(tmp_path, seed=7))
    assert RunConfig.load(tmp_path / "r" / "run.yaml") == run.config
    provenance = run.folder.read_json("provenance.json")
    assert provenance["seed"] == 7
    assert {"ray", "torch"} <= provenance["versions"].keys()


def test_another_config_under_the_same_name_is_refused(tmp_path: Path) -> None:
    Run.open(config(tmp_path))
    with pytest.raises(ConfigError, match=r"other settings \(seed, training\.beta\)"):
        Run.open(config(tmp_path, seed=1, training={"beta": 0.2}))


def test_how_a_run_is_done_may_change(tmp_path: Path) -> None:
    Run.open(config(tmp_path))
    policy = {"model": "model", "service": {"port": 8123}}
    run = Run.open(config(tmp_path, policy=policy, generation={"concurrency": 3}))
    assert "8123" in run.folder.read_text("run.yaml")


def test_rounds_name_policies_and_versions(tmp_path: Path) -> None:
    run = Run.open(config(tmp_path))
    assert run.policy(0) == run.config.policy.model
    assert run.policy(2) == str(tmp_path / "r" / "round-2" / "policy")
    assert (run.version(0), run.version(2)) == ("base", "r-round-2")


def test_only_marked_lines_reach_the_screen() -> None:
    out = io.StringIO()
    screen = Screen(out)
    for line in ("noise of a library", f"{MARK}prepare      0.1 s · 4 prompts", f"x{MARK}no"):
        screen.line(line)
    assert out.getvalue() == "prepare      0.1 s · 4 prompts\n"


def test_updates_replace_each_other_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    screen = Screen(out)
    progress = io.StringIO()
    with Progress(progress).stage("train") as stage:
        stage.update("step 1/9")
        stage.result("done")
    for line in progress.getvalue().splitlines():
        screen.line(line)
    assert out.getvalue().startswith("\r\033[Ktrain        … step 1/9\r\033[Ktrain")
    assert out.getvalue().endswith(" · done\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 s"), (73.2, "73 s"), (245, "4 min 05 s"), (7300, "2 h 01 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text

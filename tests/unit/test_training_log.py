"""What a tuning run writes: lines, TensorBoard's events, the time left, and the warning of the classic failure."""

import json
from pathlib import Path
from typing import Any

import pytest

from sima_ray.runtime.run import RunFolder
from sima_ray.runtime.training_log import ChosenFall, TrainingLog


def metrics(step: int, loss: float = 0.5, change: float = 0.0, **more: float) -> dict[str, Any]:
    return {"step": step, "loss": loss, "accuracy": 1.0, "chosen_change": change} | more


def warnings(losses: list[float], changes: list[float], nats: float = 20) -> list[str | None]:
    fall = ChosenFall(nats)
    lines = zip(losses, changes, strict=True)
    return [fall.step(metrics(i + 1, *line)) for i, line in enumerate(lines)]


def test_the_classic_failure_is_told_once():
    losses = [0.7 - 0.02 * i for i in range(20)]
    told = warnings(losses, [-2.5 * i for i in range(20)])
    # The mean of the last five changes passes −20 where the third last is −22.5: at step 12.
    assert [i + 1 for i, text in enumerate(told) if text] == [12]
    assert "have lost 22 nats" in str(told[11])
    assert "loss.sft_weight" in str(told[11])


def test_other_runs_are_not_warned_of():
    falling, rising = [0.7 - 0.02 * i for i in range(20)], [0.7 + 0.02 * i for i in range(20)]
    assert not any(warnings(falling, [0.5 * i for i in range(20)]))
    assert not any(warnings(falling, [-0.5 * i for i in range(20)]))
    assert not any(warnings(rising, [-5.0 * i for i in range(20)]))  # diverges: the loss says so
    assert not any(warnings(falling[:9], [-50.0] * 9))


def log_in(folder: Path) -> TrainingLog:
    return TrainingLog(RunFolder(str(folder)), active=True, nats=20)


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {
        tag: [(e.step, round(e.value, 4)) for e in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def test_a_resumed_run_forgets_the_steps_after_its_checkpoint(tmp_path: Path):
    first = log_in(tmp_path)
    first.begin(0, 4, float)
    for step in (1, 2, 3):
        first.step(metrics(step, loss=0.5, tokens_per_s=9))
    first.flush()
    again = log_in(tmp_path)
    again.begin(2, 4, float)
    for step in (3, 4):
        again.step(metrics(step, loss=0.25, tokens_per_s=9, eval_loss=0.75))
    again.flush()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [(line["step"], line["loss"]) for line in lines] == [
        (1, 0.5),
        (2, 0.5),
        (3, 0.25),
        (4, 0.25),
    ]
    found = events(tmp_path)
    assert found["train/loss"] == [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25)]
    assert found["eval/loss"] == [(3, 0.75), (4, 0.75)]


def test_the_time_left_counts_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr("sima_ray.runtime.training_log.time.monotonic", lambda: clock[0])
    log = log_in(tmp_path)
    work = [
        0,
        1,
        2,
        6,
        7,
        8,
        12,
    ]  # each third step is followed by an evaluation of three steps' cost
    log.begin(0, 6, work.__getitem__)
    for step, now, left in ((1, 10, 110), (2, 20, 100), (3, 60, 60), (6, 120, 0)):
        clock[0] = now
        log.step(metrics(step, tokens_per_s=1))
        assert json.loads((tmp_path / "progress.json").read_text())["seconds_left"] == left


def test_a_warning_reaches_whoever_follows(tmp_path: Path):
    log = log_in(tmp_path)
    log.begin(0, 12, float)
    for step in range(1, 13):
        log.step(metrics(step, 1 / step, -50.0, tokens_per_s=1))
    told = json.loads((tmp_path / "progress.json").read_text())["warnings"]
    assert len(told) == 1 and told[0].startswith("step 10: the loss falls")


def test_a_warning_from_before_the_first_step_is_told_too(tmp_path: Path):
    log = log_in(tmp_path)
    log.warn("all references were computed")
    log.begin(0, 2, float)
    log.step(metrics(1, 1.0, 0.0, tokens_per_s=1))
    told = json.loads((tmp_path / "progress.json").read_text())["warnings"]
    assert told == ["all references were computed"]

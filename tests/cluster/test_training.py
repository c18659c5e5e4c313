"""Tuning on Ray Train and DeepSpeed, on the CPU: two workers, one worker, stopped and taken up again."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from easy_pairs import easy_pairs, write_pairs
from ray.exceptions import TaskCancelledError, WorkerCrashedError
from safetensors.torch import load_file

from sima_ray.config import LoraSettings, TrainingConfig
from sima_ray.errors import TrainingError
from sima_ray.records import PreferencePair
from sima_ray.runtime.training import TrainingResult, TrainProgress, run_training

CONFIG = TrainingConfig(
    learning_rate=5e-3,
    epochs=3,
    batch_size=8,
    micro_batch_size=2,
    max_tokens=512,
    dtype="float32",
    lora=LoraSettings(r=4, alpha=8),
    workers=2,
    accelerator="cpu",
    cpus_per_worker=0.5,
    zero_stage=2,
    checkpoint_every=2,
    max_failures=0,
)


@dataclass(frozen=True)
class Finished:
    """A run that is over."""

    output: Path
    result: TrainingResult
    progress: list[TrainProgress]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.output / "metrics.jsonl").open()]

    @property
    def adapter(self) -> dict[str, Any]:
        return load_file(self.output / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def data(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("data")
    pairs = easy_pairs(folder / "images", 22)
    pairs.append(PreferencePair("r900", "0.png", "So?", "", "no", "greedy", "sampled"))
    return {
        "model": str(tiny_llava),
        "pairs": write_pairs(pairs, folder / "pairs.parquet"),
        "images": str(folder / "images"),
        "seed": 3,
    }


def run(data: dict[str, Any], output: Path, config: TrainingConfig) -> Finished:
    progress: list[TrainProgress] = []
    result = run_training(**data, output=str(output), config=config, on_progress=progress.append)
    return Finished(output, result, progress)


@pytest.fixture(scope="module")
def two_workers(
    ray_cluster: None, data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    return run(data, tmp_path_factory.mktemp("two"), CONFIG)


def test_two_workers_learn_an_easy_preference(two_workers: Finished):
    metrics = two_workers.metrics
    assert [line["step"] for line in metrics] == list(range(1, 10))
    assert metrics[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert metrics[-1]["margin"] > 0.2 > metrics[1]["margin"]
    assert metrics[-1]["accuracy"] == 1.0
    assert metrics[-1]["chosen_reward"] > metrics[-1]["rejected_reward"]
    result = two_workers.result
    assert (result.steps, result.pairs, result.set_aside) == (9, 22, {"empty_response": 1})
    state = json.loads((two_workers.output / "train.json").read_text())
    assert state["forward_note"] is None  # rows share their prompt
    aside = [json.loads(line) for line in (two_workers.output / "set_aside.jsonl").open()]
    assert [row["row_id"] for row in aside] == ["r900"]


def test_progress_is_told(two_workers: Finished):
    assert two_workers.progress
    last = two_workers.progress[-1]
    assert (last.stage, last.step, last.steps) == ("train", 9, 9)
    assert last.loss == two_workers.metrics[-1]["loss"]
    assert last.text.startswith("step 9/9 · loss 0.")


def test_the_adapter_loads_and_changes_the_model(two_workers: Finished, data: dict[str, Any]):
    import torch
    from peft import PeftModel

    from sima_ray.policy.checkpoint import load_policy

    assert all(
        tensor.abs().max() > 0 for name, tensor in two_workers.adapter.items() if "lora_B" in name
    )
    model, _ = load_policy(data["model"], "float32")
    ids = torch.arange(10, 20)[None]
    before = model(input_ids=ids).logits
    tuned = PeftModel.from_pretrained(model, two_workers.result.adapter)
    assert (tuned(input_ids=ids).logits - before).abs().max() > 1e-3


def test_a_finished_run_starts_no_workers(
    two_workers: Finished, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    from ray.train.torch import TorchTrainer

    def fit(trainer: TorchTrainer) -> None:
        raise AssertionError("workers are started")

    monkeypatch.setattr(TorchTrainer, "fit", fit)
    again = run(data, two_workers.output, CONFIG)
    assert again.result == two_workers.result
    other = CONFIG.model_copy(update={"beta": 0.2})
    with pytest.raises(TrainingError, match=r"other settings \(training\.beta\)"):
        run(data, two_workers.output, other)


def test_held_out_pairs_are_evaluated_each_epoch(
    ray_cluster: None, data: dict[str, Any], tmp_path: Path
):
    settings = {"holdout": 0.3, "epochs": 2, "tokens_per_micro_batch": 1024, "zero_stage": 3}
    config = CONFIG.model_copy(update=settings)
    finished = run(data, tmp_path / "evaluated", config)
    result = finished.result
    assert result.held_out > 0 and result.pairs + result.held_out == 22
    ends = [line for line in finished.metrics if "eval_loss" in line]
    assert [line["epoch"] for line in ends] == [1.0, 2.0]
    assert ends[1]["eval_loss"] < ends[0]["eval_loss"]
    assert result.metrics["eval_loss"] == ends[1]["eval_loss"]
    assert result.warnings == []
    assert list((finished.output / "tensorboard").iterdir())


def test_one_worker_without_zero_does_the_same(
    two_workers: Finished, data: dict[str, Any], tmp_path: Path
):
    config = CONFIG.model_copy(update={"workers": 1, "zero_stage": 0, "micro_batch_size": 8})
    one = run(data, tmp_path / "one", config)
    for a, b in zip(two_workers.metrics, one.metrics, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_a_stopped_run_is_taken_up_where_it_was_by_other_workers(
    two_workers: Finished, data: dict[str, Any], tmp_path: Path
):
    output = tmp_path / "stopped"
    task = ray.remote(num_cpus=0, max_retries=0)(run_training)  # pyright: ignore
    running = task.remote(**data, output=str(output), config=CONFIG)
    snapshot = output / "checkpoints" / "checkpoint_manager_snapshot.json"
    deadline = time.monotonic() + 300
    while not (snapshot.exists() and "checkpoint_2" in snapshot.read_text()):
        assert time.monotonic() < deadline
        assert not ray.wait([running], timeout=0.05)[0], "the run ended before it could be stopped"
    ray.cancel(running, force=True)
    with pytest.raises((TaskCancelledError, WorkerCrashedError)):
        ray.get(running)
    assert json.loads((output / "train.json").read_text())["status"] == "started"

    finished = run(data, output, CONFIG.model_copy(update={"workers": 1, "zero_stage": 3}))
    assert [line["step"] for line in finished.metrics] == list(range(1, 10))
    for a, b in zip(two_workers.metrics, finished.metrics, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    for name, tensor in two_workers.adapter.items():
        assert (tensor - finished.adapter[name]).abs().max() < 1e-5
    assert not (output / "checkpoints").exists()

"""Tuning whose worker, driver or job is killed at a random step ends like a run that nothing disturbed.

The step is drawn anew each time and printed; SIMA_KILL_SEED draws the same again.
"""

import json
import multiprocessing
import os
import random
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from easy_pairs import easy_pairs, write_pairs
from safetensors.torch import load_file

from sima_ray.config import RunConfig, TrainingConfig
from sima_ray.errors import JobFailed
from sima_ray.runtime import cluster, submission
from sima_ray.runtime.run import RunFolder
from sima_ray.runtime.training import _forget_damaged, run_training

SEED = int(os.environ.get("SIMA_KILL_SEED") or secrets.randbelow(10**6))
STEPS = 14
LATEST = (
    9  # what is killed after it has checkpoints to write, each of half a second, before the end
)
TOLERANCE = 1e-6
TRAINING: dict[str, Any] = {
    "learning_rate": 5e-3,
    "epochs": 7,
    "batch_size": 8,
    "micro_batch_size": 2,
    "max_tokens": 512,
    "dtype": "float32",
    "lora": {"r": 4, "alpha": 8, "dropout": 0.2},
    "workers": 2,
    "accelerator": "cpu",
    "cpus_per_worker": 0.5,
    "zero_stage": 2,
    "checkpoint_every": 2,
    "max_failures": 1,
}
CONFIG = TrainingConfig.model_validate(TRAINING)


@pytest.fixture(scope="module")
def data(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("data")
    pairs = easy_pairs(folder / "images", 16)
    return {
        "model": str(tiny_llava),
        "pairs": write_pairs(pairs, folder / "pairs.parquet"),
        "images": str(folder / "images"),
        "seed": 3,
    }


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: None, data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    run_training(**data, output=str(output), config=CONFIG)
    return output


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> random.Random:
    """Draws the steps after which something is killed."""
    print(f"SIMA_KILL_SEED={SEED}")
    return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.LocalCluster]:
    """A cluster that takes jobs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIMA_HOME", str(tmp_path_factory.mktemp("home")))
        yield cluster.up(cpus=2, gpus=0)
        cluster.down()


def metrics(output: Path) -> list[dict[str, Any]]:
    file = output / "metrics.jsonl"
    return [json.loads(line) for line in file.open()] if file.exists() else []


def state(output: Path) -> dict[str, Any]:
    return json.loads((output / "train.json").read_text())


def wait_for_step(output: Path, step: int, alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while len(metrics(output)) < step:
        assert alive() and time.monotonic() < deadline
        time.sleep(0.01)
    assert state(output)["status"] == "started", "the run ended before anything was killed"
    print(
        f"a kill was drawn for step {step} and comes after step {len(metrics(output))} of {STEPS}"
    )


def train_workers(root: int) -> set[int]:
    """The process ids of Ray Train's workers below a process."""
    return {
        process.pid
        for process in psutil.Process(root).children(recursive=True)
        if "RayTrainWorker" in process.name() + "".join(process.cmdline())
    }


def check_same(output: Path, undisturbed: Path) -> None:
    found, expected = metrics(output), metrics(undisturbed)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    loss = max(abs(a["loss"] - b["loss"]) for a, b in zip(found, expected, strict=True))
    adapters = [
        load_file(o / "adapter" / "adapter_model.safetensors") for o in (output, undisturbed)
    ]
    assert adapters[0].keys() == adapters[1].keys()
    weight = max(float((adapters[0][k] - adapters[1][k]).abs().max()) for k in adapters[0])
    print(f"largest distance from the undisturbed run: loss {loss:.1e}, adapter {weight:.1e}")
    assert loss <= TOLERANCE
    assert weight <= TOLERANCE
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.1
    assert state(output)["status"] == "done"
    assert not (output / "checkpoints").exists()


def test_a_killed_worker_and_then_its_driver(
    undisturbed: Path, data: dict[str, Any], draw: random.Random, tmp_path: Path
):
    """The run itself survives the first; the same call goes on after the second."""
    address = ray.get_runtime_context().gcs_address
    driver = multiprocessing.get_context("spawn").Process(
        target=drive, args=(address, data, str(tmp_path)), daemon=True
    )
    driver.start()
    try:
        wait_for_step(tmp_path, draw.randint(1, 5), driver.is_alive)
        workers = train_workers(os.getpid())
        assert len(workers) == CONFIG.workers
        os.kill(draw.choice(sorted(workers)), signal.SIGKILL)
        wait_for_step(tmp_path, draw.randint(8, LATEST), driver.is_alive)
        assert not workers & train_workers(os.getpid())
    finally:
        driver.kill()
        driver.join()
    assert state(tmp_path)["status"] == "started"

    result = run_training(**data, output=str(tmp_path), config=CONFIG)
    assert result.steps == STEPS
    check_same(tmp_path, undisturbed)

    # As if the driver had been killed after the end.
    (tmp_path / "checkpoints").mkdir()
    assert run_training(**data, output=str(tmp_path), config=CONFIG) == result
    assert not (tmp_path / "checkpoints").exists()


def drive(address: str, data: dict[str, Any], output: str) -> None:
    """The process that `test_a_killed_worker_and_then_its_driver` kills."""
    ray.init(address, log_to_driver=False)
    run_training(**data, output=output, config=CONFIG)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"ray_version": "2', False),
        ("", False),
        ("{}", False),
        ('{"checkpoint_results": []}', True),
    ],
)
def test_a_list_of_checkpoints_that_is_cut_short_ends_no_run(
    text: str, kept: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "checkpoint_manager_snapshot.json").write_text(text)
    _forget_damaged(RunFolder(str(tmp_path)))
    assert checkpoints.exists() is kept
    assert ("begins anew" in caplog.text) is not kept


def test_a_stopped_job(
    undisturbed: Path,
    data: dict[str, Any],
    draw: random.Random,
    tmp_path: Path,
    local: cluster.LocalCluster,
):
    config = RunConfig.parse(
        {
            "name": "stopped",
            "runs": str(tmp_path),
            "seed": data["seed"],
            "data": {"prompts": str(tmp_path / "none.jsonl"), "images": data["images"]},
            "policy": {"model": data["model"]},
            "training": TRAINING,
        }
    )
    output = tmp_path / "stopped" / "round-1" / "train"
    output.mkdir(parents=True)
    shutil.copy(data["pairs"], output.parent / "pairs.parquet")
    target = submission.Target.of(local)
    job = submission.submit("train", config, target)
    # Early: the workers go on until the driver has ended, which takes it seconds.
    wait_for_step(output, draw.randint(1, 4), lambda: local.alive)
    asked = time.monotonic()
    submission.stop(job, target)
    print(f"ended {time.monotonic() - asked:.1f} s after it was stopped, at {len(metrics(output))}")
    with pytest.raises(JobFailed, match=f"{job} ended as STOPPED") as failure:
        submission.follow(job, target, lambda _: None)
    assert failure.value.exit_code == 1
    assert state(output)["status"] == "started"
    assert not (output / "adapter").exists()

    lines: list[str] = []
    submission.follow(submission.submit("train", config, target), target, lines.append)
    told = [line for line in lines if line.startswith("[sima] train")]
    assert f"{STEPS} steps on 16 pairs" in told[-1]
    check_same(output, undisturbed)

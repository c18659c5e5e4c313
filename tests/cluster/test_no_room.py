"""A run that the cluster can never hold is refused within seconds, before anything is generated."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sima_ray.config import RunConfig
from sima_ray.errors import JobFailed
from sima_ray.runtime import cluster, submission


@pytest.fixture(scope="module")
def small() -> Iterator[cluster.LocalCluster]:
    running = cluster.start(cpus=2, gpus=0)
    yield running
    cluster.stop(running)


GPU_ENGINE = {"accelerator": "gpu", "tensor_parallel_size": 8}
CPU_ENGINE = {"accelerator": "cpu"}


@pytest.mark.parametrize(
    ("stage", "engine", "training", "refusal"),
    [
        (
            "pipeline",
            CPU_ENGINE,
            {"workers": 8},
            "training asks for 8 workers of 1 CPU and 1 GPU",
        ),
        ("preferences", GPU_ENGINE, {}, "policy.service asks for 1 replica of 1 CPU and 8 GPU"),
        ("train", CPU_ENGINE, {"workers": 8}, "training asks for 8 workers of 1 CPU and 1 GPU"),
    ],
)
def test_eight_gpus_are_refused_on_a_small_cluster(
    small: cluster.LocalCluster,
    tmp_path: Path,
    stage: str,
    engine: dict[str, Any],
    training: dict[str, Any],
    refusal: str,
) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "a.jpg")
    line = {"image": "a.jpg", "text": "What is there?", "ground_truth": "Red."}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line) + "\n")
    values = {
        "name": "large",
        "runs": str(tmp_path / "runs"),
        "data": {"prompts": str(tmp_path / "prompts.jsonl"), "images": str(tmp_path / "images")},
        "policy": {"model": "model", "engine": engine},
        "training": training,
    }
    folder = tmp_path / "runs" / "large"
    if stage == "train":
        (folder / "round-1").mkdir(parents=True)
        (folder / "round-1" / "pairs.parquet").touch()
    lines: list[str] = []
    started = time.monotonic()
    target = submission.Target.of(small)
    job = submission.submit(stage, RunConfig.parse(values), target)
    with pytest.raises(JobFailed):
        submission.follow(job, target, lines.append)
    seconds = time.monotonic() - started
    print(f"{stage}: refused after {seconds:.1f} s")
    (said,) = (line for line in lines if line.startswith("[sima] error: "))
    assert refusal in said
    assert said.endswith("GPU in all, on 1 node") and "2 CPU and 0 GPU" in said
    assert seconds < 30
    assert not (folder / "round-1" / "preferences").exists()
    if stage == "pipeline":
        assert not (folder / "stages").exists()

"""Tuning without Ray, one worker and two: states that go from any ZeRO stage to any other, and stops together."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from easy_pairs import easy_pairs, write_pairs
from safetensors.torch import load_file

from sima_ray.records import PreferencePair

WORKER = Path(__file__).parents[1] / "tuning_worker.py"
pytestmark = pytest.mark.timeout(3600)  # a machine that is busy with something else is no failure
CONFIG: dict[str, Any] = {
    "learning_rate": 5e-3,
    "epochs": 2,
    "batch_size": 8,
    "micro_batch_size": 2,
    "max_tokens": 512,
    "dtype": "float32",
    "lora": {"r": 4, "alpha": 8},
    "accelerator": "cpu",
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
}
EVALUATED: dict[str, Any] = {
    "holdout": 0.3,
    "tokens_per_micro_batch": 256,
    "max_tokens": 96,
    "length_window": 2,
    "batch_size": 4,
    "micro_batch_size": 1,
}
STEPS = 4
SAVED_AT = 2


class Runs:
    """The jobs of all tests, by world size, and what they left."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        self.model = model
        pairs = easy_pairs(self.images, 16)
        self.pairs = write_pairs(pairs, folder / "pairs.parquet")
        self.references = folder / "float32-None.parquet"

    def job(self, name: str, *, load: str | None = None, **config: Any) -> dict[str, Any]:
        """One run of four steps, or of the last two, after a state that another run has saved."""
        references = f"{config.get('dtype', 'float32')}-{config.get('max_tokens')}.parquet"
        if config["zero_stage"] == 3:  # which computes them in a way of its own
            references = f"{name}.references"
        return {
            "job": {
                "model": str(self.model),
                "pairs": self.pairs,
                "images": str(self.images),
                "references": str(self.folder / references),
                "config": CONFIG | config,
                "seed": 3,
            },
            "load": load and str(self._state(load)),
            "save": {str(SAVED_AT): str(self._state(name))},
            "adapter": str(self.folder / f"{name}.adapter"),
            "out": str(self.folder / f"{name}.json"),
        }

    def spoilt(self, job: dict[str, Any]) -> dict[str, Any]:
        """The same on images of its own, one of which is removed before the second step."""
        images = shutil.copytree(self.images, self.folder / "spoilt-images")
        fields = job["job"] | {"images": str(images)}
        return job | {"job": fields, "spoil_at": 1, "spoil": str(images / "0.png")}

    def generated(self, job: dict[str, Any]) -> dict[str, Any]:
        """The same on pairs that come with what the run `whole` has computed of them, but for two."""
        known = {row["row_id"]: row for row in pq.read_table(self.references).to_pylist()}
        pairs: list[PreferencePair] = []
        for pair in easy_pairs(self.images, 16):
            texts = {"chosen": pair.chosen, "rejected": pair.rejected}
            logps = {f"{side}_logp": known[pair.row_id][f"{side}_logp"] for side in texts}
            # A token a byte, with a space before them, and the end.
            tokens = {f"{side}_tokens": len(text) + 2 for side, text in texts.items()}
            pairs.append(
                pair if pair.row_id in ("r002", "r006") else replace(pair, **logps, **tokens)
            )
        path = write_pairs(pairs, self.folder / "generated.parquet")
        return job | {"job": job["job"] | {"pairs": path}}

    def _state(self, name: str) -> Path:
        path = self.folder / f"{name}.state"
        path.mkdir(exist_ok=True)
        return path

    def start(self, world: int, jobs: list[dict[str, Any]]) -> None:
        """Run jobs on so many workers."""
        workers: list[subprocess.Popen[str]] = []
        for rank in range(world):
            plan = self.folder / f"plan-{world}-{rank}.json"
            meeting = self.folder / f"meeting-{world}-{len(jobs)}"
            plan.write_text(
                json.dumps({"rank": rank, "world": world, "meeting": str(meeting), "jobs": jobs})
            )
            environment = os.environ | {"OMP_NUM_THREADS": "1", "LOCAL_RANK": "0"}
            workers.append(
                subprocess.Popen(
                    [sys.executable, str(WORKER), str(plan)],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        try:
            for worker in workers:
                output, _ = worker.communicate(timeout=1500)
                assert worker.returncode == 0, output[-4000:]
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()

    def metrics(self, name: str, rank: int = 0) -> list[dict[str, Any]]:
        return json.loads((self.folder / f"{name}.json.{rank}").read_text())

    def adapter(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def runs(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("runs"), tiny_llava)
    job = runs.job
    runs.start(
        1,
        [
            job("whole", zero_stage=2),
            *(job(f"1-{stage}", load="whole", zero_stage=stage) for stage in (0, 1, 3)),
            job("zero", zero_stage=0),
            job("projector", zero_stage=2, train_projector=True),
            job("eval-1", zero_stage=2, **EVALUATED),
            job("eval-1-plain", zero_stage=2, **EVALUATED | {"tokens_per_micro_batch": None}),
            job("bf16", dtype="bfloat16", zero_stage=2),
            job("bf16-1-0", load="bf16", dtype="bfloat16", zero_stage=0),
        ],
    )
    runs.start(
        2,
        [
            job("two", zero_stage=3),
            job("eval-2", zero_stage=3, **EVALUATED),
            job("projector-2", load="projector", zero_stage=3, train_projector=True),
            *(
                job(f"offload-{stage}", load="whole", zero_stage=stage, offload=offload)
                for stage, offload in ((1, "optimizer"), (2, "optimizer"), (3, "parameters"))
            ),
            *(job(f"2-{stage}", load="whole", zero_stage=stage) for stage in (0, 1, 3)),
            *(
                job(f"bf16-2-{stage}", load="bf16", dtype="bfloat16", zero_stage=stage)
                for stage in (0, 1, 2, 3)
            ),
            runs.spoilt(job("spoilt", zero_stage=3)),
            job("uneven", zero_stage=3) | {"uneven": True},
            runs.generated(job("generated", zero_stage=3, reference="generated")),
            job("parted", zero_stage=3, gradient_checkpointing=True) | {"as_if_large": True},
        ],
    )
    runs.start(1, [job("back", load="two", zero_stage=2)])
    return runs


def taken(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps among what a worker wrote."""
    return [line for line in lines if "step" in line]


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for a, b in zip(found, expected, strict=True):
        for name in ("loss", "margin", "chosen_logp", "rejected_logp", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (a, b)


@pytest.mark.parametrize("name", ["two", "zero", "parted", "generated"])
def test_any_number_of_workers_and_any_stage_does_the_same(runs: Runs, name: str):
    whole = runs.metrics("whole")
    assert len(whole) == STEPS
    assert whole[-1]["loss"] < whole[0]["loss"] - 0.01
    same(taken(runs.metrics(name)), whole, 1e-5)


def test_no_worker_holds_a_shared_model_whole(runs: Runs):
    """Half of it; in a pass also what is gathered: for the module that computes, and those around it."""
    for rank in (0, 1):
        held = runs.metrics("parted", rank)[0]["held"]
        half, whole = held["whole"] / 2, held["whole"]
        assert 0.5 <= held["frozen"] < 0.51
        assert half <= held["rest"] < half * 1.01
        assert half < held["most"] < half + 2 * held["largest"] < whole


def test_generated_references_are_believed_by_workers_that_share_a_model(runs: Runs):
    for rank in (0, 1):
        assert runs.metrics("generated", rank)[0] == {
            "references": {"computed": 2, "generated": 14}
        }


def test_workers_with_unequal_shares_make_equally_many_passes(runs: Runs):
    found = [runs.metrics("uneven", rank) for rank in (0, 1)]
    assert found[0][0] == found[1][0]
    odd = {f"r{i:03d}" for i in range(1, 16, 2)} | {"r004"}
    assert set(found[0][0]["set_aside"]) == odd
    same(taken(found[0]), taken(found[1]), 0)
    assert len(taken(found[0])) == 2


@pytest.mark.parametrize(
    "name",
    ["1-0", "1-1", "1-3", "2-0", "2-1", "2-3", "offload-1", "offload-2", "offload-3"],
)
def test_a_state_goes_to_another_stage_and_number_of_workers(runs: Runs, name: str):
    same(runs.metrics(name), runs.metrics("whole")[SAVED_AT:], 1e-5)
    expected = runs.adapter("whole")
    for key, tensor in runs.adapter(name).items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=2e-6)


def test_a_trained_projector_goes_along(runs: Runs):
    same(runs.metrics("projector-2"), runs.metrics("projector")[SAVED_AT:], 1e-5)
    assert runs.metrics("projector")[-1]["loss"] != runs.metrics("whole")[-1]["loss"]
    found, expected = runs.adapter("projector-2"), runs.adapter("projector")
    assert sum("multi_modal_projector" in name for name in found) == 4
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=2e-6)


def test_a_state_of_two_workers_goes_to_one(runs: Runs):
    same(runs.metrics("back"), runs.metrics("two")[SAVED_AT:], 1e-5)


@pytest.mark.parametrize("name", ["eval-2", "eval-1-plain"])
def test_batches_by_tokens_and_evaluation_are_the_same_on_any_number(runs: Runs, name: str):
    found, expected = runs.metrics(name), runs.metrics("eval-1")
    same(found, expected, 1e-5)
    ends = [line for line in expected if "eval_loss" in line]
    assert [line["epoch"] for line in ends] == [1.0, 2.0]
    assert ends[0]["eval_loss"] > ends[1]["eval_loss"]
    assert ends[1]["eval_accuracy"] == 1.0
    for a, b in zip([line for line in found if "eval_loss" in line], ends, strict=True):
        names = [key for key in b if key.startswith("eval_")]
        assert {key: a[key] for key in names} == pytest.approx(
            {key: b[key] for key in names}, rel=1e-5, abs=1e-5
        )


@pytest.mark.parametrize("name", ["bf16-1-0", "bf16-2-0", "bf16-2-1", "bf16-2-2", "bf16-2-3"])
def test_float32_weights_behind_bfloat16_ones_go_along(runs: Runs, name: str):
    same(runs.metrics(name), runs.metrics("bf16")[SAVED_AT:], 2e-2)


def test_all_workers_stop_where_one_finds_a_changed_image(runs: Runs):
    found = [runs.metrics("spoilt", rank) for rank in (0, 1)]
    assert len(found[0]) == len(found[1])
    assert found[0][-1] == found[1][-1]
    error = found[0][-1]["error"]
    assert "pair r000: image 0.png" in error and "has changed since the run began" in error
    assert 1 <= len(found[0]) - 1 < STEPS

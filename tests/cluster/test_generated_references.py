"""References that came with the pairs, on two workers of Ray Train: taken where they hold, and told where not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from easy_pairs import easy_pairs, write_pairs

from sima_ray.config import LoraSettings, TrainingConfig
from sima_ray.policy.checkpoint import load_processor
from sima_ray.runtime.training import run_training
from sima_ray.tuning.dataset import PairEncoder

CONFIG = TrainingConfig(
    learning_rate=5e-3,
    epochs=1,
    batch_size=8,
    micro_batch_size=2,
    max_tokens=512,
    dtype="float32",
    lora=LoraSettings(r=4, alpha=8),
    workers=2,
    accelerator="cpu",
    cpus_per_worker=0.5,
    max_failures=0,
)


def test_two_workers_take_them_or_leave_them(
    ray_cluster: None, tiny_llava: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    pairs = easy_pairs(images, 20)

    def run(name: str, reference: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        state, lines = (tmp_path / name / file for file in ("train.json", "metrics.jsonl"))
        run_training(
            model=str(tiny_llava),
            pairs=write_pairs(pairs, tmp_path / f"{name}.parquet"),
            images=str(images),
            output=str(tmp_path / name),
            config=CONFIG.model_copy(update={"reference": reference}),
            seed=3,
        )
        return json.loads(state.read_text()), [json.loads(line) for line in lines.open()]

    state, expected = run("computed", "computed")
    assert state["references"] == {"computed": 20, "generated": 0}
    assert state["reference_note"] is None and state["warnings"] == []

    encoder = PairEncoder(load_processor(tiny_llava), str(images), 512)
    found = pq.read_table(tmp_path / "computed" / "reference.parquet").to_pylist()
    logps = {row["row_id"]: row for row in found}
    pairs = [
        replace(
            encoded.pair,
            chosen_logp=logps[encoded.pair.row_id]["chosen_logp"],
            rejected_logp=logps[encoded.pair.row_id]["rejected_logp"],
            chosen_tokens=len(encoded.chosen_C),
            rejected_tokens=len(encoded.rejected_R),
        )
        for encoded in map(encoder.encode, pairs)
    ]
    state, metrics = run("generated", "generated")
    assert state["references"] == {"computed": 0, "generated": 20}
    assert state["reference_note"] is None and state["warnings"] == []
    for a, b in zip(metrics, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)

    pairs = [replace(pair, chosen_logp=(pair.chosen_logp or 0.0) - 1.0) for pair in pairs]
    state, metrics = run("refused", "generated")
    assert state["references"] == {"computed": 20, "generated": 0}
    assert "generated and computed log-probabilities differ" in state["reference_note"]
    assert state["warnings"] == [f"all references were computed: {state['reference_note']}"]
    for a, b in zip(metrics, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)

"""A run on another project's preference data, through the product's stages: taken, trained on, merged, told."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from easy_pairs import easy_pairs
from foreign_data import rlaif_v
from given_run import NoService, given_config, opened, said
from safetensors.torch import load_file

from sima_ray.data.foreign import take_pairs
from sima_ray.errors import ConfigError
from sima_ray.runtime import stages
from sima_ray.runtime.account import account, show
from sima_ray.runtime.run import Run
from sima_ray.runtime.tables import show_summary


@pytest.fixture(scope="module")
def finished(ray_cluster: None, tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All rounds of a run on a data set of RLAIF-V's form: two steps, and no policy is served."""
    folder = tmp_path_factory.mktemp("given")
    source = rlaif_v(easy_pairs(folder / "a", 9), folder / "a", folder / "rlaif.parquet")
    output, images = str(folder / "pairs.parquet"), str(folder / "images")
    take_pairs([source], output, images=images, max_pixels=10**6, max_chars=100)
    training = {
        **{"epochs": 1, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 5e-3},
        **{"dtype": "float32", "lora": {"r": 4, "alpha": 8}, "max_tokens": 512},
        **{"workers": 1, "cpus_per_worker": 0.5, "zero_stage": 0, "max_failures": 0},
    }
    config = given_config(
        folder,
        output,
        images,
        data={"limit": 8},
        policy={"model": str(tiny_llava), "engine": {"accelerator": "cpu", "cpus": 0.5}},
        training=training,
    )
    run = opened(config)
    stages.rounds(run, NoService(run))
    stages.report(run)
    return run


def folder(run: Run) -> Path:
    return Path(run.folder.root)


def test_two_steps_are_taken_on_them(finished: Run) -> None:
    lines = (folder(finished) / "round-1" / "train" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [line["step"] for line in metrics] == [1, 2]
    assert metrics[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    adapter = load_file(
        Path(finished.round_path(1, "train", "adapter"), "adapter_model.safetensors")
    )
    assert all(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    assert (folder(finished) / "round-1" / "policy" / "model.safetensors").exists()
    assert "8 given pairs = 8 pairs" in said(finished)
    assert "2 steps on 8 pairs" in said(finished)


def test_the_account_says_what_it_began_with_and_adds_up(
    finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = account(folder(finished))
    assert drawn.problems == []
    assert drawn.run.state() == "done" and drawn.run.pairs == 8
    shown = show(drawn)
    given = str(finished.config.data.pairs)
    assert f"began with   given pairs: {given}, made of " in shown and "rlaif.parquet" in shown
    assert "round 1      8 given pairs = 8 pairs" in shown
    show_summary(folder(finished))
    printed = capsys.readouterr().out
    assert f"given    {given}, made of" in printed and "critic" not in printed
    page = (folder(finished) / "report.html").read_text()
    assert "The run began with" in page and "no critic was asked" in page

    kept = pq.read_table(finished.round_path(1, "pairs.parquet"))
    pq.write_table(kept.slice(1), finished.round_path(1, "pairs.parquet"))
    try:
        assert account(folder(finished)).problems == [
            "round 1: pairs.parquet holds 7 rows, the ledger 8"
        ]
    finally:
        pq.write_table(kept, finished.round_path(1, "pairs.parquet"))


def test_provenance_names_the_file_and_its_origin(finished: Run) -> None:
    given: dict[str, Any] = finished.folder.read_json("provenance.json")["given"]
    assert given["pairs"] == finished.config.data.pairs
    assert len(given["sha256"]) == 64
    (source,) = given["origin"]["sources"]
    assert (source["records"], source["forms"]) == (9, {"RLAIF-V": 9})


def test_taken_up_again_nothing_is_done_twice(finished: Run) -> None:
    again = opened(finished.config)
    stages.rounds(again, NoService(again))
    for stage in ("pairs", "train", "merge"):
        assert f"{stage:<12} done before" in said(again)
    with pytest.raises(ConfigError, match=r"begins with given pairs .* submit `train`"):
        stages.preferences(again, 1, NoService(again))

"""Merging: published names, every file beside the weights, and no model that computes something else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from easy_pairs import easy_pairs
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from sima_ray.config import LoraSettings, MergeConfig
from sima_ray.errors import ModelError, ParityError
from sima_ray.policy.checkpoint import check_policy, fingerprint, load_policy, weight_names
from sima_ray.policy.merge import VERSION_FILE, merge
from sima_ray.tuning.lora import add_lora, save_adapter, trainable

CONFIG = MergeConfig(parity_rows=3)


@pytest.fixture(scope="module")
def adapter(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes the model plainly."""
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = load_policy(tiny_llava, "float32")
    tuned = add_lora(model, LoraSettings(r=4, alpha=8), seed=1)
    torch.manual_seed(1)
    weights = {name: p.detach() + torch.randn_like(p) * 0.1 for name, p in trainable(tuned).items()}
    save_adapter(tuned, weights, folder)
    return folder


@pytest.fixture(scope="module")
def adapter_and_projector(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a projector that has moved."""
    folder = tmp_path_factory.mktemp("adapter-and-projector")
    model, _ = load_policy(tiny_llava, "float32")
    tuned = add_lora(model, LoraSettings(r=4, alpha=8), seed=1, train_projector=True)
    torch.manual_seed(1)
    weights = {name: p.detach() + torch.randn_like(p) * 0.1 for name, p in trainable(tuned).items()}
    save_adapter(tuned, weights, folder)
    return folder


@pytest.fixture
def arguments(tiny_llava: Path, adapter: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "base": str(tiny_llava),
        "adapter": str(adapter),
        "destination": str(tmp_path / "out" / "policy"),
        "config": CONFIG,
        "probe": easy_pairs(tmp_path / "images", 5),
        "images": str(tmp_path / "images"),
    }


def test_a_good_merge_is_published_whole(arguments, tiny_llava: Path):
    Path(arguments["destination"]).parent.mkdir()
    report = merge(**arguments)
    merged = Path(arguments["destination"])
    assert report.rows == 3
    assert report.difference < CONFIG.tolerance
    assert weight_names(merged) == weight_names(tiny_llava)
    assert any(name.startswith("vision_tower.vision_model.") for name in weight_names(merged))
    beside = {f.name for f in tiny_llava.iterdir()} | {VERSION_FILE}
    assert {f.name for f in merged.iterdir()} == beside
    assert json.loads((merged / VERSION_FILE).read_text())["version"] == fingerprint(merged)
    assert fingerprint(merged) != fingerprint(tiny_llava)
    assert [f.name for f in merged.parent.iterdir()] == ["policy"]
    AutoModelForImageTextToText.from_pretrained(merged)
    AutoProcessor.from_pretrained(merged)


def test_a_trained_projector_takes_the_old_ones_place(
    arguments, adapter_and_projector: Path, tiny_llava: Path
):
    report = merge(**arguments | {"adapter": str(adapter_and_projector)})
    assert report.difference < CONFIG.tolerance
    merged, _ = load_policy(arguments["destination"], "float32")
    base, _ = load_policy(tiny_llava, "float32")
    saved = load_file(adapter_and_projector / "adapter_model.safetensors")
    assert weight_names(arguments["destination"]) == weight_names(tiny_llava)
    for name, weight in base.named_parameters():
        if "multi_modal_projector" in name:
            now = merged.get_parameter(name)
            [trained] = [tensor for key, tensor in saved.items() if key.endswith(name)]
            assert (now - weight).abs().max() > 0.05
            torch.testing.assert_close(now, trained.to(now), rtol=0, atol=1e-2)


def test_merging_again_returns_the_same_report(arguments):
    assert merge(**arguments) == merge(**arguments)
    with pytest.raises(ModelError, match="not a merge of this base and adapter"):
        merge(**arguments | {"base": arguments["destination"]})


def test_a_tampered_merge_is_not_published(arguments):
    def tampering(model: Any, folder: Path) -> None:
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1.5)
        model.save_pretrained(folder)

    with pytest.raises(ParityError, match="differs from base \\+ adapter"):
        merge(**arguments, write=tampering)
    assert not list(Path(arguments["destination"]).parent.glob("*"))


def test_a_merge_that_forgets_the_adapter_is_not_published(arguments, tiny_llava: Path):
    def forgetting(model: Any, folder: Path) -> None:
        load_policy(tiny_llava)[0].save_pretrained(folder)

    with pytest.raises(ParityError):
        merge(**arguments | {"config": MergeConfig(tolerance=0.005)}, write=forgetting)


def test_renamed_weights_are_not_published(arguments):
    def renaming(model: Any, folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        model.save_pretrained(folder)
        file = folder / "model.safetensors"
        save_file({f"model.{k}": v for k, v in load_file(file).items()}, file, {"format": "pt"})

    with pytest.raises(ParityError, match="named otherwise"):
        merge(**arguments, write=renaming)


def test_nothing_to_compare_is_no_parity(arguments):
    with pytest.raises(ParityError, match="no usable pair"):
        merge(**arguments | {"probe": []})


def test_a_folder_that_is_no_policy_says_what_is_missing(tiny_llava: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="no such model folder"):
        check_policy(tmp_path / "none")
    with pytest.raises(ModelError, match=r"no config\.json"):
        check_policy(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava_llama"}')
    with pytest.raises(ModelError, match="convert"):
        check_policy(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ModelError, match="no weights"):
        check_policy(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="no tokenizer"):
        check_policy(tmp_path)


def test_an_adapter_folder_without_weights_is_an_error(arguments, tmp_path: Path):
    with pytest.raises(ModelError, match="not a PEFT adapter"):
        merge(**arguments | {"adapter": str(tmp_path)})

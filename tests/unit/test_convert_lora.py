"""LoRA folders of LLaVA's training scripts: what `sima convert` merges is what PEFT merges."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from original_llava import (
    LAYERS,
    TOWER_PREFIX,
    VOCABULARY,
    Parts,
    make_parts,
    original_config,
    original_weights,
    write_json,
    write_original,
    write_tokenizer,
    write_tower,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from sima_ray.errors import ModelError
from sima_ray.policy.convert import Converted, convert
from sima_ray.policy.convert_config import Layout
from sima_ray.policy.convert_keys import TOWER, published_name

MODEL = "base_model.model."
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj", "gate_proj"]


@pytest.fixture(scope="module")
def parts() -> Parts:
    return make_parts()


@pytest.fixture(scope="module")
def base(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_original(tmp_path_factory.mktemp("base") / "model", parts)
    write_tower(folder / "somebody" / "small-clip", parts)
    return folder


def write_lora(
    folder: Path, parts: Parts, *, as_bin: bool = True, **settings: Any
) -> dict[str, Tensor]:
    """A folder as LLaVA's training leaves it; PEFT's own merge of the language model, by published names.

    As in SIMA's, the adapters lie on the vision tower too, where no gradient reached them.
    """
    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, **settings)
    tuned: Any = get_peft_model(copy.deepcopy(parts.llama), config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    tuned.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    adapter = load_file(file)
    rank = settings["r"]
    for layer in range(4):
        at = f"{MODEL}{TOWER_PREFIX}vision_model.encoder.layers.{layer}.self_attn.q_proj"
        adapter[f"{at}.lora_A.weight"] = torch.randn(rank, 32)
        adapter[f"{at}.lora_B.weight"] = torch.zeros(32, rank)
    file.unlink()
    if as_bin:
        torch.save(adapter, folder / "adapter_model.bin")
    else:
        from safetensors.torch import save_file

        save_file(adapter, file)
    write_json(folder / "config.json", original_config())
    return {published_name(k): v for k, v in tuned.merge_and_unload().state_dict().items()}


def write_whole(folder: Path, parts: Parts) -> dict[str, Tensor]:
    """non_lora_trainables.bin with another projector; its weights by published names."""
    names = parts.projector.state_dict()
    whole = {f"{MODEL}model.mm_projector.{k}": v + 0.5 for k, v in names.items()}
    torch.save(whole, folder / "non_lora_trainables.bin")
    return {published_name(name.removeprefix(MODEL)): v for name, v in whole.items()}


def check(output: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    found = load_file(output / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name][: len(tensor)], tensor, rtol=0, atol=1e-6)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"r": 8, "lora_alpha": 16}, id="plain"),
        pytest.param({"r": 8, "lora_alpha": 16, "use_rslora": True}, id="rslora"),
        pytest.param(
            {
                "r": 8,
                "lora_alpha": 16,
                "rank_pattern": {"model.layers.1.self_attn.q_proj": 4, "down_proj": 2},
                "alpha_pattern": {"model.layers.1.self_attn.q_proj": 3, "o_proj": 5},
            },
            id="patterns",
        ),
    ],
)
def test_a_lora_folder_becomes_what_peft_merges(
    base: Path, parts: Parts, tmp_path: Path, settings: dict[str, Any]
) -> None:
    merged = write_lora(tmp_path / "lora", parts, **settings)
    whole = write_whole(tmp_path / "lora", parts)
    done = convert(tmp_path / "lora", tmp_path / "out", base=base)
    found = check(tmp_path / "out", merged | whole)
    tower = {published_name(TOWER_PREFIX + k): v for k, v in parts.tower.state_dict().items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tower.items())
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    moved = (found[name] - original_weights(parts)["model.layers.1.self_attn.q_proj.weight"]).abs()
    assert moved.max() > 0.01
    assert words(done) == (
        f"{LAYERS * len(TARGETS)} updates merged, 4 on the vision tower add nothing (B is zero), "
        "4 weights replaced as a whole"
    )


def test_halves_are_merged_in_float32(base: Path, parts: Parts, tmp_path: Path) -> None:
    """As exact as the result's own type allows: not W rounded, plus the update rounded."""
    convert(base, tmp_path / "hf", dtype="bfloat16")
    merged = write_lora(tmp_path / "lora", parts, r=8, lora_alpha=16)
    convert(tmp_path / "lora", tmp_path / "out", base=tmp_path / "hf")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("hf", "out"))
    assert before.keys() == after.keys()
    weights = original_weights(parts)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn.v_proj.weight"
        delta = merged[published_name(name)] - weights[name]
        exact = before[published_name(name)].float() + delta
        torch.testing.assert_close(
            after[published_name(name)].float(), exact.bfloat16().float(), rtol=8e-3, atol=1e-6
        )
    for name in ("config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_language_model_alone_can_be_the_base(base: Path, parts: Parts, tmp_path: Path) -> None:
    """LLaVA's own LoRA release lies over Vicuna: the projector comes with it, the vision tower from its folder."""
    vicuna = tmp_path / "vicuna"
    parts.llama.save_pretrained(vicuna)
    write_tokenizer(vicuna, parts)
    merged = write_lora(tmp_path / "lora", parts, as_bin=False, r=4, lora_alpha=8)
    with pytest.raises(ModelError, match=r"lacks 4 of 105 weights: model\.mm_projector\.0\.weight"):
        convert(
            tmp_path / "lora",
            tmp_path / "out",
            base=vicuna,
            vision_tower=base / "somebody/small-clip",
        )
    whole = write_whole(tmp_path / "lora", parts)
    convert(
        tmp_path / "lora", tmp_path / "out", base=vicuna, vision_tower=base / "somebody/small-clip"
    )
    found = check(tmp_path / "out", merged | whole)
    assert f"{TOWER}pre_layrnorm.weight" in found

    # Into LLaVA's own layout, whose vision tower may stay where its name says.
    (tmp_path / "lora" / "config.json").write_text(
        json.dumps(original_config(mm_vision_tower=str(base / "somebody" / "small-clip")))
    )
    done = convert(tmp_path / "lora", tmp_path / "original", to=Layout.ORIGINAL, base=vicuna)
    own = load_file(tmp_path / "original" / "model.safetensors")
    assert not any(name.startswith(TOWER_PREFIX) for name in own)
    assert {published_name(name) for name in own} == {n for n in found if not n.startswith(TOWER)}
    assert own["lm_head.weight"].shape[0] == VOCABULARY
    values = json.loads((tmp_path / "original" / "config.json").read_text())
    assert values["model_type"] == "llava_llama"
    assert "4 on the vision tower add nothing" in words(done)


def test_an_adapter_of_ours_fits_too(base: Path, parts: Parts, tmp_path: Path) -> None:
    """Its names are those of a loaded Hugging Face model, a trained projector among them."""
    convert(base, tmp_path / "hf")
    before = load_file(tmp_path / "hf" / "model.safetensors")
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": ["projector"]}
    write_json(folder / "adapter_config.json", settings)
    a, b = torch.randn(2, 64), torch.randn(64, 2)
    at = f"{MODEL}model.language_model.layers.0.self_attn.q_proj"
    bias = torch.randn(64)
    adapter = {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}
    adapter[f"{MODEL}model.multi_modal_projector.linear_2.bias"] = bias
    torch.save(adapter, folder / "adapter_model.bin")
    done = convert(folder, tmp_path / "out", base=tmp_path / "hf")
    assert words(done) == "1 updates merged, 1 weights replaced as a whole"
    found = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], found[name])}
    query = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert changed == {query, "multi_modal_projector.linear_2.bias"}
    torch.testing.assert_close(found[query], before[query] + 2 * b @ a)


@pytest.mark.parametrize(
    ("settings", "adapter", "words"),
    [
        ({"use_dora": True}, {}, "use_dora is True; only plain LoRA"),
        ({"bias": "all"}, {}, "bias is 'all'"),
        ({"peft_type": "IA3"}, {}, "peft_type IA3"),
        ({"r": 3}, {}, r"q_proj: A \(2, 64\) and B \(64, 2\) are not of rank 3"),
        ({}, {"lora_B.weight": None}, "q_proj has lora_A alone"),
        ({}, {"lora_B.weight": torch.full((64, 2), torch.nan)}, "not finite"),
        ({}, {"lora_B.weight": torch.ones(63, 2)}, r"is \(63, 64\), in the base \(64, 64\)"),
        ({}, {"lora_magnitude_vector": torch.ones(2)}, "is no LoRA of a linear layer"),
    ],
)
def test_other_adapters_are_refused(
    base: Path, tmp_path: Path, settings: dict[str, Any], adapter: dict[str, Any], words: str
) -> None:
    at = f"{MODEL}model.layers.0.self_attn.q_proj"
    values = {"lora_A.weight": torch.ones(2, 64), "lora_B.weight": torch.ones(64, 2)} | adapter
    found = {f"{at}.{name}": tensor for name, tensor in values.items() if tensor is not None}
    write_json(
        tmp_path / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **settings}
    )
    torch.save(found, tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match=words):
        convert(tmp_path, tmp_path.with_suffix(".out"), base=base)


def test_a_layer_that_the_base_lacks_is_an_error(base: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    with pytest.raises(ModelError, match="no adapter_model"):
        convert(tmp_path, tmp_path.with_suffix(".out"), base=base)
    at = f"{MODEL}model.layers.{LAYERS}.self_attn.q_proj"
    weights = {f"{at}.lora_A.weight": torch.ones(2, 64), f"{at}.lora_B.weight": torch.ones(64, 2)}
    torch.save(weights, tmp_path / "adapter_model.bin")
    with pytest.raises(
        ModelError, match=r"layers\.3\.self_attn\.q_proj\.weight, which the base lacks"
    ):
        convert(tmp_path, tmp_path.with_suffix(".out"), base=base)


def words(done: Converted) -> str:
    assert done.adapter is not None
    return done.adapter.summary()

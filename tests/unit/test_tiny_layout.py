"""Tiny checkpoints have the published layout, load in transformers, and read phrases as tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration

from sima_ray.policy.chat import join_response, render_prompt
from sima_ray.policy.tiny import TinyShape, make_tiny_llava, make_tokenizer, published_name
from sima_ray.ports import image_part, text_part

VISION = "vision_tower.vision_model."
# The names of llava-hf/llava-1.5-7b-hf, with layer numbers left out.
ATTENTION = [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj")]
PUBLISHED = {
    "language_model.lm_head.weight",
    "language_model.model.embed_tokens.weight",
    "language_model.model.norm.weight",
    *(f"language_model.model.layers.N.{part}.weight" for part in ATTENTION),
    "language_model.model.layers.N.self_attn.o_proj.weight",
    *(f"language_model.model.layers.N.mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
    "language_model.model.layers.N.input_layernorm.weight",
    "language_model.model.layers.N.post_attention_layernorm.weight",
    *(f"multi_modal_projector.linear_{n}.{p}" for n in (1, 2) for p in ("weight", "bias")),
    f"{VISION}embeddings.class_embedding",
    f"{VISION}embeddings.patch_embedding.weight",
    f"{VISION}embeddings.position_embedding.weight",
    *(f"{VISION}{n}.{p}" for n in ("pre_layrnorm", "post_layernorm") for p in ("weight", "bias")),
    *(
        f"{VISION}encoder.layers.N.{part}.{p}"
        for part in (
            *ATTENTION,
            "self_attn.out_proj",
            "layer_norm1",
            "layer_norm2",
            "mlp.fc1",
            "mlp.fc2",
        )
        for p in ("weight", "bias")
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("tiny"), phrases=[" dog", "Describe it."])


def test_weights_have_the_published_names(folder: Path) -> None:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert weights.get_tensor("language_model.model.norm.weight").dtype == torch.bfloat16
    unnumbered = {
        ".".join("N" if part.isdigit() else part for part in name.split(".")) for name in names
    }
    assert unnumbered == PUBLISHED


def test_published_names_stay() -> None:
    assert published_name("vision_tower.embeddings.x") == f"{VISION}embeddings.x"
    assert published_name(f"{VISION}embeddings.x") == f"{VISION}embeddings.x"
    assert published_name("language_model.model.norm.weight") == "language_model.model.norm.weight"


def test_the_folder_loads_and_answers(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    prompt = render_prompt(processor, [image_part(b""), text_part("Describe it.")])
    assert prompt == "USER: <image>\nDescribe it. ASSISTANT:"
    image = Image.new("RGB", (50, 80), "red")
    inputs = processor(text=[prompt], images=[image], return_tensors="pt")
    tokens = inputs["input_ids"][0].tolist()
    assert tokens.count(processor.image_token_id) == model.config.image_seq_length == 36
    assert tokens[0] == processor.tokenizer.bos_token_id
    made = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert made.shape[1] > len(tokens)


def test_the_same_seed_gives_the_same_weights(folder: Path, tmp_path: Path) -> None:
    again = make_tiny_llava(tmp_path, phrases=[" dog", "Describe it."])
    same = (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert same
    assert json.loads((again / "config.json").read_text())["model_type"] == "llava"


def test_phrases_are_single_tokens_and_all_text_survives() -> None:
    tokenizer = make_tokenizer([" dog", " dog house", "Describe it."], TinyShape().max_positions)
    text = join_response("Describe it. ASSISTANT:", "a dog, a dog house; 10 × «é»\n")
    ids = tokenizer(text).input_ids
    pieces = [tokenizer.decode([i]) for i in ids]
    assert {"Describe it.", " dog", " dog house"} <= set(pieces)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text

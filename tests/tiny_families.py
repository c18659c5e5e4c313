"""Untrained tiny models of other families than LLaVA 1.5, with the processors that belong to them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from sima_ray.critic.verdict import VERDICTS
from sima_ray.policy.tiny import CHAT_TEMPLATE, make_tokenizer, published_name

hf: Any = transformers  # its configs take more than their types say
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
GRID = {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "patch_size": 8}
QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def llava_next() -> tuple[Any, Any]:
    """LLaVA-NeXT: tiles of an image, as many as its shape asks for."""
    tokenizer = make_tokenizer(VERDICTS, 4096)
    tiles = [[32, 64], [64, 32], [64, 64]]
    processor = hf.LlavaNextProcessor(
        image_processor=hf.LlavaNextImageProcessor(
            size={"shortest_edge": 32},
            crop_size={"height": 32, "width": 32},
            image_grid_pinpoints=tiles,
        ),
        tokenizer=tokenizer,
        patch_size=8,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
    )
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(image_size=32, patch_size=8, **VISION),
        text_config=hf.LlamaConfig(**_text(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=tiles,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return _made(hf.LlavaNextForConditionalGeneration, config), processor


def qwen2_5_vl() -> tuple[Any, Any]:
    """Qwen2.5-VL: images of any shape, rotary positions in three axes."""
    tokenizer = make_tokenizer(VERDICTS, 4096)
    tokenizer.add_tokens(QWEN_TOKENS, special_tokens=True)
    config = hf.Qwen2_5_VLConfig(
        text_config=_text(tokenizer) | _rotary([4, 6, 6]),
        vision_config=GRID
        | {"out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 32},
        **_qwen_tokens(tokenizer),
    )
    processor = _qwen_processor(hf.Qwen2_5_VLProcessor, tokenizer)
    return _made(hf.Qwen2_5_VLForConditionalGeneration, config), processor


def qwen3_vl() -> tuple[Any, Any]:
    """Qwen3-VL: as Qwen2.5-VL, and features of deeper vision layers go into the decoder's first ones."""
    tokenizer = make_tokenizer(VERDICTS, 4096)
    tokenizer.add_tokens(QWEN_TOKENS, special_tokens=True)
    config = hf.Qwen3VLConfig(
        text_config=_text(tokenizer) | {"head_dim": 32} | _rotary([4, 6, 6]),
        vision_config=GRID
        | {"out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        **_qwen_tokens(tokenizer),
    )
    processor = _qwen_processor(hf.Qwen3VLProcessor, tokenizer)
    return _made(hf.Qwen3VLForConditionalGeneration, config), processor


def idefics3() -> tuple[Any, Any]:
    """Idefics3, which the first SmolVLMs are: an image as tiles and as a whole, one tensor of all features."""
    tokenizer = make_tokenizer(VERDICTS, 4096)
    tiles = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    others = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    tokenizer.add_tokens([*others, *tiles], special_tokens=True)
    processor = hf.Idefics3Processor(
        image_processor=hf.Idefics3ImageProcessor(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=CHAT_TEMPLATE,
    )
    config = hf.Idefics3Config(
        vision_config=hf.Idefics3VisionConfig(image_size=32, patch_size=8, **VISION),
        text_config=hf.LlamaConfig(**_text(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return _made(hf.Idefics3ForConditionalGeneration, config), processor


def gemma3(**text: Any) -> tuple[Any, Any]:
    """Gemma 3: sliding windows, and the tokens of an image see each other.

    Args:
        text: Settings of the language model.
    """
    tokenizer = make_tokenizer(VERDICTS, 4096)
    around = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer.add_tokens([*around.values()], special_tokens=True)
    for name, token in around.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**(_text(tokenizer) | {"head_dim": 16} | text)),
        vision_config=hf.SiglipVisionConfig(image_size=32, patch_size=8, **VISION),
        mm_tokens_per_image=4,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = hf.Gemma3Processor(
        image_processor=hf.Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=CHAT_TEMPLATE,
    )
    return _made(hf.Gemma3ForConditionalGeneration, config), processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    make.__name__: make for make in (llava_next, qwen2_5_vl, qwen3_vl, idefics3)
}


def _text(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,  # heads of 32, which the engine's kernels know
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _rotary(sections: list[int]) -> dict[str, Any]:
    kind = {"rope_type": "default", "mrope_section": sections, "rope_theta": 10000.0}
    return {"rope_parameters": kind}


def _qwen_tokens(tokenizer: Any) -> dict[str, int]:
    names = ["vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"]
    return dict(zip(names, tokenizer.convert_tokens_to_ids(QWEN_TOKENS), strict=True))


def _qwen_processor(kind: Any, tokenizer: Any) -> Any:
    sizes = {"patch_size": 8, "min_pixels": 16 * 16, "max_pixels": 48 * 48}
    tokenizer.image_token = "<|image_pad|>"
    tokenizer.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return kind(
        image_processor=hf.Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=hf.Qwen2VLVideoProcessor(**sizes),
        chat_template=CHAT_TEMPLATE,
    )


def _made(kind: Any, config: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()


def lean(model: Any, likes: dict[int, float]) -> None:
    """Let an untrained model of untied weights say what it likes, whatever it reads: by one wide dimension.

    Args:
        model: In float32.
        likes: How much more than other tokens, by token, in nats.
    """
    width = model.config.get_text_config().hidden_size
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 2.0
        head = model.get_output_embeddings().weight
        head[:, 0] = 0.0
        for token, nats in likes.items():
            head[token, 0] = nats / width**0.5


def save(model: Any, processor: Any, folder: Path) -> Path:
    """A model made here as a policy folder, with the weights' published names."""
    model.bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)
    if model.config.model_type.startswith("llava"):  # others save theirs by themselves
        weights = folder / "model.safetensors"
        renamed = {published_name(name): tensor for name, tensor in load_file(weights).items()}
        save_file(renamed, weights, metadata={"format": "pt"})
    return folder

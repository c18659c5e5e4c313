"""What the weights of a LLaVA are called in each layout, and what shapes they have.

Three layouts name the same tensors:

    published     language_model.model.layers.0…  multi_modal_projector.linear_1…        vision_tower.vision_model…
    original      model.layers.0…                 model.mm_projector.0…        model.vision_tower.vision_tower.…
    transformers  model.language_model.layers.0…  model.multi_modal_projector.linear_1…  model.vision_tower…

*Published* is that of `llava-hf/llava-1.5-7b-hf`, which transformers and vLLM load; *original* that of LLaVA's own
code (`liuhaotian/llava-v1.5-7b`); *transformers* what a model's parameters are called once it is loaded, which is
also how PEFT names an adapter's targets. Everything here goes through the published name.
"""

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

EMBEDDINGS = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
PROJECTOR = "multi_modal_projector."
TOWER = "vision_tower.vision_model."

_ORIGINAL_TOWER = "model.vision_tower.vision_tower.vision_model."
_TO_PUBLISHED = tuple(
    (re.compile(pattern), published)
    for pattern, published in (
        (r"model\.vision_tower\.vision_tower\.(vision_model\.)?", TOWER),
        (r"(model\.)?vision_tower\.(vision_model\.)?", TOWER),
        (r"(model\.)?mm_projector\.0\.", f"{PROJECTOR}linear_1."),
        (r"(model\.)?mm_projector\.2\.", f"{PROJECTOR}linear_2."),
        (r"(model\.)?multi_modal_projector\.", PROJECTOR),
        (r"(language_model\.)?lm_head\.", "language_model.lm_head."),
        (r"language_model\.model\.", "language_model.model."),
        (r"model\.language_model\.", "language_model.model."),
        (r"model\.", "language_model.model."),
    )
)
_TO_ORIGINAL = (
    (TOWER, _ORIGINAL_TOWER),
    (f"{PROJECTOR}linear_1.", "model.mm_projector.0."),
    (f"{PROJECTOR}linear_2.", "model.mm_projector.2."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)


class Skipped(StrEnum):
    """Why a tensor of the source has no place in the result."""

    ROTARY = "rotary frequencies, which the config gives"
    POSITIONS = "position numbers, which count up"
    CLIP_TEXT = "CLIP's text half"
    REPEATED = "held by another file that goes before"


_BUFFERS = (
    (re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$"), Skipped.ROTARY),
    (re.compile(r"(^|\.)embeddings\.position_ids$"), Skipped.POSITIONS),
)
_CLIP_TEXT = re.compile(r"(text_model\.|text_projection|visual_projection\.|logit_scale$)")


def skipped(name: str) -> Skipped | None:
    """The reason why a tensor of a LLaVA or CLIP checkpoint is left out; None for a weight."""
    return next((reason for pattern, reason in _BUFFERS if pattern.search(name)), None)


def published_name(name: str) -> str:
    """The published name of a weight that any of the three layouts names; an unknown name is returned as it is."""
    for pattern, published in _TO_PUBLISHED:
        if found := pattern.match(name):
            return published + name[found.end() :]
    return name


def published_tower_name(name: str) -> str | Skipped:
    """The published name of a weight of a CLIP folder, with or without its text half."""
    if _CLIP_TEXT.match(name):
        return Skipped.CLIP_TEXT
    return skipped(name) or TOWER + name.removeprefix("vision_model.")


def original_name(published: str) -> str:
    """What LLaVA's own code calls a weight.

    Raises:
        KeyError: Not the published name of a weight.
    """
    for prefix, original in _TO_ORIGINAL:
        if published.startswith(prefix):
            return original + published.removeprefix(prefix)
    raise KeyError(published)


def published_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The published name and the shape of every weight of a LLaVA with a Llama and a CLIP vision tower.

    Args:
        config: transformers' `LlavaConfig`.
    """
    text, vision = config.text_config, config.vision_config
    width, head = text.hidden_size, text.head_dim
    query, key = text.num_attention_heads * head, text.num_key_value_heads * head
    inner = text.intermediate_size
    shapes = {EMBEDDINGS: (text.vocab_size, width)}
    for layer in range(text.num_hidden_layers):
        parts = {
            "self_attn.q_proj": (query, width),
            "self_attn.k_proj": (key, width),
            "self_attn.v_proj": (key, width),
            "self_attn.o_proj": (width, query),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }
        at = f"language_model.model.layers.{layer}."
        shapes |= {f"{at}{part}.weight": shape for part, shape in parts.items()}
    shapes |= {"language_model.model.norm.weight": (width,), HEAD: (text.vocab_size, width)}
    shapes |= _affine({f"{PROJECTOR}linear_1": (width, vision.hidden_size)})
    shapes |= _affine({f"{PROJECTOR}linear_2": (width, width)})
    return shapes | _tower_shapes(vision)


def _tower_shapes(vision: Any) -> dict[str, tuple[int, ...]]:
    width, inner, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        f"{TOWER}embeddings.class_embedding": (width,),
        f"{TOWER}embeddings.patch_embedding.weight": (width, vision.num_channels, patch, patch),
        # One place for each patch, and CLIP's class token.
        f"{TOWER}embeddings.position_embedding.weight": (
            (vision.image_size // patch) ** 2 + 1,
            width,
        ),
    }
    # CLIP's own spelling.
    shapes |= _affine({f"{TOWER}pre_layrnorm": (width,), f"{TOWER}post_layernorm": (width,)})
    for layer in range(vision.num_hidden_layers):
        at = f"{TOWER}encoder.layers.{layer}."
        projections = ("q_proj", "k_proj", "v_proj", "out_proj")
        shapes |= _affine({f"{at}self_attn.{name}": (width, width) for name in projections})
        shapes |= _affine({f"{at}layer_norm{n}": (width,) for n in (1, 2)})
        shapes |= _affine({f"{at}mlp.fc1": (inner, width), f"{at}mlp.fc2": (width, inner)})
    return shapes


def _affine(layers: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Weight and bias of layers, by their names and the shapes of their weights."""
    weights = {f"{name}.weight": shape for name, shape in layers.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in layers.items()}

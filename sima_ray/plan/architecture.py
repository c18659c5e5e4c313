"""A vision-language model as a plan sees it: sizes of its parts, by the figures of its config.json alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sima_ray.errors import ModelError, why
from sima_ray.plan.image import ImageRule

PUBLISHED = Path(__file__).with_name("published.yaml")
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_LEFT_OUT: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
}
"""Defaults that published config.json files rely on and leave out."""


@dataclass(frozen=True, slots=True)
class Language:
    """The decoder.

    Attributes:
        width, inner: Of the residual stream, of the MLP.
        layers, heads, kv_heads, head_width: Of the attention.
        vocabulary: Rows of the embedding, and of the head.
        context: Positions at most.
        tied: Whether embedding and head are one matrix.
        qkv_bias: Whether query, key and value have biases.
        qk_norm: Whether queries and keys are normalised.
    """

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    context: int
    tied: bool
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a layer's linear modules."""
        queries, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        shapes = (
            *((self.width, queries), (self.width, keys), (self.width, keys), (queries, self.width)),
            *((self.width, self.inner), (self.width, self.inner), (self.inner, self.width)),
        )
        return dict(zip(_LINEAR, shapes, strict=True))

    @property
    def per_layer(self) -> int:
        """Parameters of a layer."""
        weights = sum(inputs * outputs for inputs, outputs in self.linear.values())
        biases = (self.heads + 2 * self.kv_heads) * self.head_width * self.qkv_bias
        return weights + biases + 2 * self.width + 2 * self.head_width * self.qk_norm

    @property
    def body(self) -> int:
        """Parameters of all layers and the last norm: what every token passes."""
        return self.layers * self.per_layer + self.width

    @property
    def head(self) -> int:
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        return self.body + self.head * (1 if self.tied else 2)

    def lora_parameters(self, r: int, targets: list[str]) -> int:
        """Of adapters of rank r on the linear layers that are named so; see `LoraSettings`."""
        rows = [shape for name, shape in self.linear.items() if name in targets]
        return self.layers * sum(r * (inputs + outputs) for inputs, outputs in rows)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A whole model.

    Attributes:
        family: Its `model_type`.
        language: The decoder.
        vision: Parameters of the vision tower.
        projector: Parameters between tower and decoder.
        vision_width: Of the tower's residual stream.
        vision_layers: Of the tower.
        image: What `image_tokens` counts by.
    """

    family: str
    language: Language
    vision: int
    projector: int
    vision_width: int
    vision_layers: int
    image: ImageRule = field(repr=False)

    @property
    def parameters(self) -> int:
        return self.language.parameters + self.vision + self.projector


def find_architecture(model: str | Path) -> tuple[Architecture, str]:
    """The architecture of a model folder, and where its figures are from.

    Raises:
        ModelError: Neither such a folder nor a published model of its name; or of a family that a plan does not
            know.
    """
    path = Path(model)
    if (path / "config.json").is_file():
        return read_architecture(_json(path / "config.json"), _image_figures(path)), str(
            path / "config.json"
        )
    facts = {name.lower(): value for name, value in published().items()}.get(path.name.lower())
    if facts is None:
        raise ModelError(
            f"{model}: not on this machine, and no published model of that name is known "
            f"({', '.join(published())}): give a folder with its config.json by --model"
        )
    return read_architecture(facts["config"], facts.get("image", {})), (
        f"published figures of {path.name}; the folder is not on this machine"
    )


@cache
def published() -> dict[str, Any]:
    """The shipped facts by model name."""
    facts = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    return {name: value for name, value in facts.items() if not name.startswith(".")}


def read_architecture(
    config: Mapping[str, Any], image: Mapping[str, Any] | None = None
) -> Architecture:
    """The architecture that a config.json describes.

    Args:
        config: Its values.
        image: Those of the image processor that matter: min_pixels, max_pixels, longest_edge, tile.

    Raises:
        ModelError: A family that a plan does not know, or a figure that is missing.
    """
    family = str(config.get("model_type"))
    parts = {
        "llava": _clip_parts,
        "llava_next": _clip_parts,
        "qwen2_5_vl": _qwen2_5_parts,
        "qwen3_vl": _qwen3_parts,
        "idefics3": _idefics_parts,
        "smolvlm": _idefics_parts,
    }.get(family)
    if parts is None:
        raise ModelError(f"a plan knows no models of type {family}")
    try:
        language = _language(config)
        vision = _with_defaults(config["vision_config"])
        tower, projector = parts(config, vision, language)
        return Architecture(
            family=family,
            language=language,
            vision=tower,
            projector=projector,
            vision_width=vision["hidden_size"],
            vision_layers=vision.get("num_hidden_layers") or vision["depth"],
            image=_image_rule(family, config, vision, image or {}),
        )
    except (KeyError, TypeError) as error:
        raise ModelError(f"config.json of a {family}: {error} is missing") from error


def _language(config: Mapping[str, Any]) -> Language:
    text = _with_defaults(config.get("text_config") or config)
    kind, heads = str(text.get("model_type")), text["num_attention_heads"]
    return Language(
        width=text["hidden_size"],
        inner=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_width=text.get("head_dim") or text["hidden_size"] // heads,
        vocabulary=text["vocab_size"],
        context=text["max_position_embeddings"],
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        qkv_bias=kind.startswith("qwen2"),
        qk_norm=kind.startswith("qwen3"),
    )


def _with_defaults(section: Mapping[str, Any]) -> dict[str, Any]:
    return {**_LEFT_OUT.get(str(section.get("model_type")), {}), **section}


def _block(width: int, inner: int) -> int:
    """A transformer layer with biases: four attention matrices, two of the MLP, two norms."""
    return 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width


def _clip_parts(
    config: Mapping[str, Any], vision: dict[str, Any], language: Language
) -> tuple[int, int]:
    width, patch = vision["hidden_size"], vision["patch_size"]
    positions = (vision["image_size"] // patch) ** 2 + 1
    embeddings = width + 3 * patch * patch * width + positions * width
    tower = vision["num_hidden_layers"] * _block(width, vision["intermediate_size"])
    projector = (width + 1) * language.width + (language.width + 1) * language.width
    newline = language.width if config["model_type"] == "llava_next" else 0
    return embeddings + tower + 4 * width, projector + newline


def _idefics_parts(
    config: Mapping[str, Any], vision: dict[str, Any], language: Language
) -> tuple[int, int]:
    width, patch = vision["hidden_size"], vision["patch_size"]
    positions = (vision["image_size"] // patch) ** 2
    embeddings = (3 * patch * patch + 1) * width + positions * width
    tower = vision["num_hidden_layers"] * _block(width, vision["intermediate_size"])
    return embeddings + tower + 2 * width, width * config["scale_factor"] ** 2 * language.width


def _qwen2_5_parts(
    config: Mapping[str, Any], vision: dict[str, Any], language: Language
) -> tuple[int, int]:
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    patches = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2 * width
    block = 4 * (width * width + width) + 3 * width * inner + 2 * inner + width + 2 * width
    merged = width * vision["spatial_merge_size"] ** 2
    merger = width + (merged + 1) * merged + (merged + 1) * vision["out_hidden_size"]
    return patches + vision["depth"] * block, merger


def _qwen3_parts(
    config: Mapping[str, Any], vision: dict[str, Any], language: Language
) -> tuple[int, int]:
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    patches = (3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2 + 1) * width
    positions = vision["num_position_embeddings"] * width
    merged = width * vision["spatial_merge_size"] ** 2
    linear = (merged + 1) * merged + (merged + 1) * vision["out_hidden_size"]
    deeper = len(vision["deepstack_visual_indexes"]) * (2 * merged + linear)
    return patches + positions + vision["depth"] * _block(width, inner), (
        2 * width + linear + deeper
    )


def _image_rule(
    family: str, config: Mapping[str, Any], vision: dict[str, Any], image: Mapping[str, Any]
) -> ImageRule:
    patch = vision["patch_size"]
    if family.startswith("qwen"):
        least, most = image.get("min_pixels", 0), image.get("max_pixels", 0)
        return ImageRule(family, patch, merge=vision["spatial_merge_size"], least=least, most=most)
    grids = tuple((high, wide) for high, wide in config.get("image_grid_pinpoints") or ())
    side = image.get("tile") or vision["image_size"]
    edge = image.get("longest_edge") or 4 * side
    return ImageRule(family, patch, side, config.get("scale_factor", 1), grids, edge=edge)


def _image_figures(folder: Path) -> dict[str, Any]:
    """The image processor's figures, from whichever file a folder keeps them in."""
    found: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            values = _json(folder / name)
            found |= values.get("image_processor") or values
    size, tile = found.get("size") or {}, found.get("max_image_size") or {}
    figures = {
        "min_pixels": found.get("min_pixels") or size.get("shortest_edge"),
        "max_pixels": found.get("max_pixels") or size.get("longest_edge"),
        "longest_edge": size.get("longest_edge"),
        "tile": tile.get("longest_edge"),
    }
    return {key: value for key, value in figures.items() if value}


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {why(error)}") from error

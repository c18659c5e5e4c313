"""The configs of LLaVA's layouts: which one a folder has, and one written as the other."""

import ntpath
from enum import StrEnum
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from sima_ray.errors import ModelError, one_line
from sima_ray.policy.checkpoint import read_config
from sima_ray.ports import JsonDict

TOWER_FOLDER = "vision-tower"
"""Where a folder in the original layout keeps the config of a vision tower that nobody knows by name."""

_CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
KNOWN_TOWERS: dict[str, JsonDict] = {
    "openai/clip-vit-large-patch14-336": {**_CLIP_LARGE, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_CLIP_LARGE, "image_size": 224},
}
"""Vision towers whose sizes need no folder; their weights may."""

_FEATURES = {"patch": "default", "cls_patch": "full"}
_NOT_LLAMA = "only LLaVA with a Llama (or Vicuna) and a CLIP vision tower is converted"


class Layout(StrEnum):
    """How a LLaVA folder is laid out."""

    HF = "hf"
    ORIGINAL = "original"


def layout_of(folder: Path) -> Layout | None:
    """The layout of a model folder; None for a plain Llama, which can only be the base of an adapter.

    Raises:
        ModelError: Neither, or a LLaVA of another family.
    """
    config = read_config(folder)
    kind = str(config.get("model_type"))
    if "llm_cfg" in config:
        raise ModelError(f"{folder}: a VILA folder (llm_cfg); {_NOT_LLAMA}")
    if kind == "llama":
        return None
    if kind == "llava_llama" or (kind == "llava" and "mm_vision_tower" in config):
        return Layout.ORIGINAL
    if kind != "llava":
        raise ModelError(f"{folder}: model_type {kind}; {_NOT_LLAMA} (llava_llama, llava)")
    return Layout.HF


def read_hf_config(folder: Path) -> LlavaConfig:
    """The config of a folder in the Hugging Face layout.

    Raises:
        ModelError: It is broken, or of a language model or vision tower that LLaVA's own code would not read.
    """
    values = read_config(folder)
    for part, wanted in (("text_config", "llama"), ("vision_config", "clip_vision_model")):
        kind = (values.get(part) or {}).get("model_type", wanted)
        if kind != wanted:
            raise ModelError(f"{folder}/config.json: {part} of model_type {kind}; {_NOT_LLAMA}")
    try:
        config = LlavaConfig.from_dict(values)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}/config.json: {one_line(error)}") from error
    if not isinstance(config.vision_feature_layer, int):
        raise ModelError(f"{folder}/config.json: several vision_feature_layer; LLaVA-1.5 has one")
    return config


def read_original_config(folder: Path, values: JsonDict, tower: CLIPVisionConfig) -> LlavaConfig:
    """transformers' config of an original one, the vocabulary as it is there.

    Args:
        folder: For messages.
        values: Its config.json.
        tower: Of its vision tower.

    Raises:
        ModelError: Broken, or of a LLaVA that is put together otherwise than 1.5.
    """
    where = f"{folder}/config.json"
    _check_family(where, values)
    feature = values.get("mm_vision_select_feature", "patch")
    if feature not in _FEATURES:
        raise ModelError(
            f"{where}: mm_vision_select_feature {feature}; known: {', '.join(_FEATURES)}"
        )
    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"}
    text = {key: value for key, value in values.items() if key in known and key != "model_type"}
    text |= {"architectures": ["LlamaForCausalLM"], "dtype": None, "pad_token_id": None}
    patches = (tower.image_size // tower.patch_size) ** 2  # pyright: ignore[reportOperatorIssue]
    try:
        return LlavaConfig(
            text_config=LlamaConfig(**text),
            vision_config=tower,
            image_seq_length=patches + (feature == "cls_patch"),
            vision_feature_layer=values.get("mm_vision_select_layer", -2),
            vision_feature_select_strategy=_FEATURES[feature],  # pyright: ignore[reportArgumentType]
            projector_hidden_act="gelu",
            tie_word_embeddings=False,
        )
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{where}: {one_line(error)}") from error


def tower_config(folder: Path, values: JsonDict, given: Path | None) -> CLIPVisionConfig:
    """The config of an original folder's vision tower: given, beside it, or known by its name.

    Raises:
        ModelError: None of these, or no CLIP.
    """
    name = str(values.get("mm_vision_tower") or values.get("vision_tower") or "")
    source = given or tower_folder(folder, name)
    if source is not None:
        return read_tower_config(source)
    # A path on the machine where it was trained ends in the name that it was published under.
    for known, sizes in KNOWN_TOWERS.items():
        if ntpath.basename(name.rstrip("/")) == known.rpartition("/")[2]:
            return CLIPVisionConfig(**sizes)
    raise ModelError(
        f"{folder}/config.json: mm_vision_tower {name!r} is no folder and no known name; "
        "give its folder: --vision-tower"
    )


def tower_folder(folder: Path, name: str) -> Path | None:
    """The folder that an original config's `mm_vision_tower` names, if there is one."""
    return next((p for p in (folder / name, Path(name)) if name and p.is_dir()), None)


def read_tower_config(folder: Path) -> CLIPVisionConfig:
    """The vision half of a CLIP folder's config.

    Raises:
        ModelError: No CLIP.
    """
    values = read_config(folder)
    if values.get("model_type") == "clip":
        values = values.get("vision_config") or {}
    elif values.get("model_type") != "clip_vision_model":
        raise ModelError(
            f"{folder}: a vision tower of model_type {values.get('model_type')}; {_NOT_LLAMA}"
        )
    try:
        return CLIPVisionConfig.from_dict(values)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}/config.json: {one_line(error)}") from error


def original_config(config: Any, vocabulary: int, dtype: str) -> JsonDict:
    """What LLaVA's own code reads, from transformers' `LlavaConfig`.

    The vision tower's weights are in the folder, and `unfreeze_mm_vision_tower` is what makes that code read
    them from there; `mm_vision_tower` still names where it finds the tower's config.
    """
    text = config.text_config
    features = {ours: theirs for theirs, ours in _FEATURES.items()}
    rope = dict(text.rope_parameters or {})
    scaling = rope if rope.pop("rope_type", "default") != "default" else None
    kept = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range"),
        *("rms_norm_eps", "attention_bias", "bos_token_id", "eos_token_id"),
    )
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        **{key: getattr(text, key) for key in kept},
        "head_dim": text.head_dim,
        "vocab_size": vocabulary,
        "pad_token_id": 0,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": scaling and {**scaling, "type": text.rope_parameters["rope_type"]},
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": features[config.vision_feature_select_strategy],
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_tower": known_tower(config.vision_config) or TOWER_FOLDER,
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
    }


def known_tower(tower: Any) -> str | None:
    """The published name of the vision tower with these sizes."""
    for name, sizes in KNOWN_TOWERS.items():
        if all(getattr(tower, key) == value for key, value in sizes.items()):
            return name
    return None


def _check_family(where: str, values: JsonDict) -> None:
    """Refuse what has the layout of LLaVA-1.5 and computes something else.

    Raises:
        ModelError: Says what differs.
    """
    projector = values.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise ModelError(f"{where}: mm_projector_type {projector}; LLaVA-1.5 has mlp2x_gelu")
    if values.get("image_aspect_ratio") == "anyres" or "unpad" in str(
        values.get("mm_patch_merge_type")
    ):
        raise ModelError(
            f"{where}: LLaVA-NeXT (several tiles an image), which has another Hugging Face layout"
        )
    if values.get("mm_use_im_start_end"):
        raise ModelError(
            f"{where}: mm_use_im_start_end: its prompts hold tokens around an image, as before LLaVA-1.5"
        )
    if values.get("tie_word_embeddings"):
        raise ModelError(f"{where}: tie_word_embeddings; LLaVA-1.5 has two matrices")

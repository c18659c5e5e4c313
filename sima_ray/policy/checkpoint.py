"""Policy folders: what makes one complete, loading it, and a fingerprint that names its weights."""

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sima_ray.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf")
INDEX_SUFFIX = ".index.json"
_SAMPLE_BYTES = 1 << 16

_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Of safetensors' names."""


def check_policy(folder: str | Path) -> Path:
    """Check, by its files alone, that a folder can be a policy.

    Raises:
        ModelError: Not a folder; no config, weights or processor; a layout that must be converted first.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ModelError(f"{folder}: no such model folder; give a local Hugging Face folder")
    model_type = read_config(path).get("model_type")
    if model_type == "llava_llama":
        raise ModelError(
            f"{folder}: LLaVA's original layout (model_type llava_llama); convert it to the "
            "Hugging Face layout first: sima convert"
        )
    if not weight_files(path):
        raise ModelError(f"{folder}: holds no weights (*.safetensors)")
    if not any((path / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        raise ModelError(f"{folder}: holds no tokenizer (tokenizer.json, tokenizer_config.json)")
    if not any(
        (path / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")
    ):
        raise ModelError(
            f"{folder}: holds no processor (processor_config.json or preprocessor_config.json)"
        )
    return path


def load_policy(
    folder: str | Path, dtype: str = "auto", attention: str = "sdpa"
) -> "tuple[PreTrainedModel, ProcessorMixin]":
    """Load a vision-language model and its processor from a local folder, for evaluation.

    Args:
        folder: Hugging Face folder of any model that `AutoModelForImageTextToText` knows.
        dtype: "float32", "bfloat16", … or "auto" for that of the checkpoint.
        attention: transformers' name of the attention implementation.

    Raises:
        ModelError: As `check_policy`, or files that cannot be loaded.
    """
    path = check_policy(folder)
    # Imported here: the checks above must answer without seconds of imports.
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    processor = load_processor(path)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, local_files_only=True, attn_implementation=attention
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder}: the model cannot be loaded: {_first_line(error)}") from error
    if model.get_output_embeddings() is None:
        raise ModelError(f"{folder}: {type(model).__name__} has no language-model head")
    return model.eval(), processor


def load_processor(folder: str | Path) -> "ProcessorMixin":
    """Load the processor alone.

    Raises:
        ModelError: It cannot be loaded, has no image token or no chat template.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{folder}: the processor cannot be loaded: {_first_line(error)}"
        ) from error
    if getattr(processor, "image_token", None) is None:
        raise ModelError(f"{folder}: {type(processor).__name__} names no image token")
    if getattr(processor, "chat_template", None) is None:
        raise ModelError(f"{folder}: the processor has no chat template")
    return processor


def image_token_id(processor: "ProcessorMixin") -> int:
    """The id of the token that stands for one image feature in a prompt."""
    known = getattr(processor, "image_token_id", None)
    if known is not None:
        return int(known)
    tokenizer: Any = processor.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    return int(tokenizer.convert_tokens_to_ids(processor.image_token))  # pyright: ignore[reportAttributeAccessIssue]


def context_length(model: Any) -> int | None:
    """The most tokens that a model takes, by its config; None where that names no limit."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if length is None else int(length)


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a folder, by name; older formats are not read."""
    return sorted(Path(folder).glob("*.safetensors"))


def weight_names(folder: str | Path) -> set[str]:
    """The names of all weights in a folder, from the files' headers."""
    return {
        name for file in weight_files(folder) for name in _header(file) if name != "__metadata__"
    }


def stored_dtype(folder: str | Path) -> str:
    """torch's name of the precision that most of a folder's weights are stored in; config.json may name another.

    Raises:
        ModelError: No floating-point weight there.
    """
    sizes: Counter[str] = Counter()
    for file in weight_files(folder):
        for name, entry in _header(file).items():
            if name != "__metadata__" and entry["dtype"] in _FLOATS:
                sizes[_FLOATS[entry["dtype"]]] += math.prod(entry["shape"])
    if not sizes:
        raise ModelError(f"{folder}: holds no floating-point weights (*.safetensors)")
    return max(sizes, key=lambda name: sizes[name])


def fingerprint(folder: str | Path) -> str:
    """16 hex digits that name a model or adapter folder's weights and config.

    Reads headers and a sample of each file's bytes, not gigabytes: meant to tell versions apart, not to resist
    someone who forges them.
    """
    digest = hashlib.sha256()
    path = Path(folder)
    for name in ("config.json", "adapter_config.json"):
        if (path / name).is_file():
            digest.update((path / name).read_bytes())
    for file in weight_files(path):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        digest.update(json.dumps(_header(file), sort_keys=True).encode())
        with file.open("rb") as stream:
            for eighth in range(8):
                stream.seek(max(0, size - _SAMPLE_BYTES) * eighth // 7)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: eight bytes of length, then JSON."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            raise ModelError(f"{file}: not a whole safetensors file")
        try:
            return json.loads(stream.read(length))
        except ValueError as error:
            raise ModelError(f"{file}: not a safetensors file") from error


def read_config(path: Path) -> dict[str, Any]:
    """A model folder's config.json.

    Raises:
        ModelError: It is missing or no JSON.
    """
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: holds no config.json: not a Hugging Face model folder") from None
    except ValueError as error:
        raise ModelError(f"{path}/config.json: not JSON: {error}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

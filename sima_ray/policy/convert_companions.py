"""The files beside a LLaVA's weights: tokenizer, image processor, chat template, generation config.

Hugging Face folders have two tokens that original ones lack: `<image>`, which stands for one image feature, and
`<pad>`. They are added behind the vocabulary (32000 and 32001 for Vicuna's), and taken off again on the way back.
Prompts are those of published Hugging Face folders. LLaVA's own code puts a system prompt in front of them, and a
token more, a lone space, behind an image, since it tokenizes what follows as a text of its own.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AddedToken,
    CLIPImageProcessor,
    GenerationConfig,
    LlamaTokenizer,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from sima_ray.errors import ModelError, one_line
from sima_ray.policy.checkpoint import load_processor
from sima_ray.policy.convert_config import TOWER_FOLDER, known_tower
from sima_ray.policy.tiny import CHAT_TEMPLATE, IMAGE, PAD

_SENTENCEPIECE, _FAST, _SETTINGS = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
_OF_A_LOAD = ("is_local", "local_files_only", "model_specific_special_tokens")
"""What transformers writes of how a tokenizer was loaded; it says nothing of the tokenizer."""
_OF_SENTENCEPIECE = ("legacy", "add_bos_token", "add_eos_token")
_LEGAL = ("LICENSE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Rows of the embeddings and of the output matrix.

    Attributes:
        tokens: That the tokenizer knows, all added ones included.
        image: Id of `<image>`.
        pad: Id of `<pad>`; None where it has none.
    """

    tokens: int
    image: int
    pad: int | None

    @property
    def rows(self) -> int:
        """The published multiple of 64: 32064 for Vicuna's 32000 and the two added ones."""
        return -(-self.tokens // 64) * 64

    @property
    def without_added(self) -> int | None:
        """How many tokens there were before these two; None where they are among the others."""
        added = {self.image, self.pad} - {None}
        first = self.tokens - len(added)
        return first if added == set(range(first, self.tokens)) else None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A folder's tokenizer with `<image>` and `<pad>`: a fast one as it is, or made from sentencepiece's model.

    Raises:
        ModelError: There is none, or it cannot be read.
    """
    llama = str(_settings(folder).get("tokenizer_class")).startswith("LlamaTokenizer")
    if (folder / _FAST).is_file():
        kind = LlamaTokenizer if llama else PreTrainedTokenizerFast
    elif (folder / _SENTENCEPIECE).is_file():
        kind = LlamaTokenizer
    else:
        raise ModelError(f"{folder}: holds no tokenizer ({_SENTENCEPIECE} or {_FAST})")
    try:
        tokenizer: Any = kind.from_pretrained(folder)
    except Exception as error:  # the libraries below raise their own, and bare `Exception`s
        raise ModelError(f"{folder}: the tokenizer cannot be read: {one_line(error)}") from error
    added = [AddedToken(text, special=True, normalized=False) for text in (IMAGE, PAD)]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.pad_token = PAD
    tokenizer.padding_side = "left"
    return tokenizer


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """The tokenizer's size and its two ids."""
    known = tokenizer.get_vocab()
    return Vocabulary(len(tokenizer), known[IMAGE], known.get(PAD))


def image_processor_of(
    config: Any, folders: list[Path], *, pad: bool
) -> CLIPImageProcessor | LlavaImageProcessor:
    """A vision tower's own image processor, or CLIP's for its image size.

    Args:
        config: transformers' `LlavaConfig`; names the size.
        folders: Where its preprocessor_config.json may lie; the first one counts.
        pad: Pad images to squares, as LLaVA's own code does where `image_aspect_ratio` is "pad"; published
            Hugging Face folders crop them instead.
    """
    side = config.vision_config.image_size
    values: Any = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
    }
    for folder in folders:
        if (file := folder / "preprocessor_config.json").is_file():
            try:
                values = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ModelError(f"{file}: not JSON: {one_line(error)}") from error
            break
    for key in ("image_processor_type", "feature_extractor_type", "processor_class"):
        values.pop(key, None)
    if pad:
        values["do_pad"] = True
        return LlavaImageProcessor(**values)
    return CLIPImageProcessor(**values)


def write_hf_companions(
    folder: Path, source: Path, tokenizer: Any, images: Any, config: Any
) -> None:
    """Write all but the weights of a Hugging Face folder; `config` is a complete `LlavaConfig`."""
    text = config.text_config
    tokenizer.model_max_length = text.max_position_embeddings
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        # CLIP's class token is counted here, and dropped by the "default" strategy.
        num_additional_image_tokens=1,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=CHAT_TEMPLATE,
    )
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    images.save_pretrained(folder)  # read by transformers before 5 and by other servers
    settings = {k: v for k, v in _settings(folder).items() if k not in _OF_A_LOAD}
    # transformers 5 leaves these to tokenizer.json; earlier ones read them.
    settings |= {k: v for k, v in _settings(source).items() if k in _OF_SENTENCEPIECE}
    known = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    extra = [text for text in settings.get("extra_special_tokens", ()) if text not in known]
    settings |= {"extra_special_tokens": extra, "image_token": IMAGE}
    _write_json(folder / _SETTINGS, settings)
    if (source / _SENTENCEPIECE).is_file():
        shutil.copyfile(source / _SENTENCEPIECE, folder / _SENTENCEPIECE)
    GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(folder)
    copy_legal(source, folder)


def write_original_companions(
    folder: Path, source: Path, config: Any, values: dict[str, Any], vocabulary: Vocabulary
) -> None:
    """Write all but the weights of an original folder.

    Args:
        folder: To write into.
        source: The Hugging Face folder.
        config: Its `LlavaConfig`.
        values: The original config.
        vocabulary: Of its tokenizer.
    """
    _write_json(folder / "config.json", values)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    _write_json(folder / "generation_config.json", {name: values[name] for name in names})
    for name in (_SENTENCEPIECE, _FAST, _SETTINGS, "special_tokens_map.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if vocabulary.without_added is not None:
        _remove_added_tokens(folder)
    if known_tower(config.vision_config) is None:
        tower = folder / TOWER_FOLDER
        tower.mkdir()
        config.vision_config.save_pretrained(tower)
        images: Any = load_processor(source)
        images.image_processor.save_pretrained(tower)
    copy_legal(source, folder)


def copy_legal(source: Path, folder: Path) -> None:
    """Copy a model's licence files."""
    for pattern in _LEGAL:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def _remove_added_tokens(folder: Path) -> None:
    """Take `<image>` and `<pad>` out of a tokenizer's files; what cannot be known is read back as LLaVA-1.5's."""
    if (file := folder / _FAST).is_file():
        values = json.loads(file.read_text(encoding="utf-8"))
        values["added_tokens"] = [
            token for token in values["added_tokens"] if token["content"] not in (IMAGE, PAD)
        ]
        values["padding"] = None
        _write_json(file, values)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    settings = _settings(folder)
    dropped = (
        *("added_tokens_decoder", "image_token", "processor_class", "extra_special_tokens"),
        *("chat_template", "pad_token", "backend"),
    )
    settings = {key: value for key, value in settings.items() if key not in dropped}
    settings["padding_side"] = "right"
    if settings.get("unk_token"):
        settings["pad_token"] = settings["unk_token"]
    if (folder / _SENTENCEPIECE).is_file():
        settings["tokenizer_class"] = "LlamaTokenizer"
    _write_json(folder / _SETTINGS, settings)


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / _SETTINGS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _write_json(file: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")

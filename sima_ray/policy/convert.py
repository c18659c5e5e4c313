"""LLaVA folders from LLaVA's own layout into the Hugging Face one and back; LoRA folders are merged on the way.

Weights are read, renamed and written one at a time: in memory is what one written file holds and, with an
adapter, the adapter. Every tensor of the source is converted, or counted with the reason why it is left out. That
nothing is missing, nothing unknown, and that all shapes are the config's, is checked before anything is written.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sima_ray.errors import ModelError
from sima_ray.policy import convert_companions as companions
from sima_ray.policy.checkpoint import load_processor, read_config, weight_names
from sima_ray.policy.convert_config import TOWER_FOLDER, Layout, original_config
from sima_ray.policy.convert_keys import EMBEDDINGS, HEAD, Skipped, original_name
from sima_ray.policy.convert_lora import Adapter, is_adapter, read_adapter
from sima_ray.policy.convert_source import Source, check_weights, read_source
from sima_ray.policy.merge import copy_companions
from sima_ray.policy.weight_files import SHARD_BYTES, ShardWriter, opened
from sima_ray.ports import JsonDict

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Step:
    """A file of the source that is about to be read.

    Attributes:
        file: Its path.
        number: Of `files`, from 1.
        tensors: To be converted from it.
        size: Their bytes.
    """

    file: Path
    number: int
    files: int
    tensors: int
    size: int


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion did.

    Attributes:
        read: Tensors of the source: those converted, and those skipped.
        skipped: Those that have no place in the result, by reason.
        written: Tensors written.
        size: Bytes written.
        files: Files of weights written.
        dtype: Of all weights written.
        cast: Weights that had another type.
        rows: Of the embeddings, before and after.
        adapter: What became of the adapter.
    """

    read: int
    skipped: Mapping[Skipped, int]
    written: int
    size: int
    files: int
    dtype: str
    cast: int
    rows: tuple[int, int]
    adapter: Adapter | None


def convert(
    source: Path,
    output: Path,
    *,
    to: Layout = Layout.HF,
    base: Path | None = None,
    vision_tower: Path | None = None,
    dtype: str | None = None,
    pad_images: bool = False,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Converted:
    """Convert a LLaVA folder, or merge a LoRA folder into its base and convert that.

    The rows that `<image>` and `<pad>` need are the mean of all others, in the embeddings and in the output
    matrix: the same at every conversion, and logits that are never the largest. All other logits stay as they
    are. On the way back all rows behind the original vocabulary are cut off.

    Args:
        source: A model folder, or an adapter's with `base`.
        output: Folder to make; it appears whole or not at all.
        to: The layout to write.
        base: What an adapter was trained on: either layout, or the language model alone.
        vision_tower: CLIP folder; needed where the checkpoint only names it.
        dtype: "float16", "bfloat16" or "float32"; None is that of the source's language model.
        pad_images: Let the processor pad images to squares, as LLaVA's own code does; otherwise it crops them,
            as published Hugging Face folders do.
        force: Replace a model folder that is at `output`.
        shard_bytes: The most that one written file holds.
        on_step: Told of each file before it is read.

    Raises:
        ModelError: A folder that is broken, incomplete or of another family; something at `output`.
    """
    _check_output(output, [p for p in (source, base, vision_tower) if p], force)
    output = output.resolve()  # what a link stands for is replaced, not the link
    adapter = _read_adapter(source, base)
    with_tower = to is Layout.HF
    model = read_source(
        base or source, source if adapter else None, vision_tower, with_tower=with_tower
    )
    if model.layout is to and adapter is None:
        raise ModelError(f"{source}: has the {to} layout already")
    check_weights(model, adapter, with_tower=with_tower)
    wanted = getattr(torch, dtype) if dtype else model.weights[EMBEDDINGS].dtype
    _check_room(output, model, wanted)
    temporary = output.parent / f".{output.name}.{os.getpid()}.part"
    try:
        temporary.mkdir(parents=True)
        rows = _write_companions(temporary, model, to, wanted, pad_images)
        copier = _Copier(ShardWriter(temporary, shard_bytes), to, wanted, rows, adapter)
        copier.copy(model, on_step)
        files = copier.close(temporary)
        _publish(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Converted(
        read=len(model.weights) + model.skipped.total(),
        skipped=model.skipped,
        written=len(copier.names),
        size=copier.size,
        files=files,
        dtype=_name(wanted),
        cast=copier.cast,
        rows=(model.rows, rows),
        adapter=adapter,
    )


class _Copier:
    """Takes weights by published name, and writes them as they are to be."""

    def __init__(
        self,
        writer: ShardWriter,
        to: Layout,
        dtype: torch.dtype,
        rows: int,
        adapter: Adapter | None,
    ) -> None:
        self._writer = writer
        self._to = to
        self._dtype = dtype
        self._rows = rows
        self._adapter = adapter
        self.names: set[str] = set()
        self.cast = 0

    @property
    def size(self) -> int:
        """Bytes written."""
        return self._writer.size

    def copy(self, model: Source, on_step: Callable[[Step], None]) -> None:
        """Copy a model's weights, file by file; what an adapter has as a whole takes their place."""
        whole = self._adapter.whole if self._adapter else {}
        files = list(dict.fromkeys(held.file for held in model.weights.values()))
        for number, file in enumerate(files, 1):
            held = {name: s for name, s in model.weights.items() if s.file == file}
            size = sum(s.size for s in held.values())
            on_step(Step(file, number, len(files), len(held), size))
            with opened(file) as tensors:
                for name, where in held.items():
                    if name not in whole:
                        self._add(name, tensors.read(where.name), file)
        for name, tensor in whole.items():
            assert self._adapter is not None
            self._add(name, tensor, self._adapter.folder)

    def close(self, folder: Path) -> int:
        """Write the rest and check that the folder names all weights; the number of files."""
        files = self._writer.close()
        if (found := weight_names(folder)) != self.names:
            raise ModelError(f"{folder}: was written wrongly: {sorted(found ^ self.names)[0]}")
        return len(files)

    def _add(self, name: str, weight: Tensor, file: Path) -> None:
        self.cast += weight.dtype != self._dtype
        if self._adapter is not None:
            weight = self._adapter.apply(name, weight)
        if name in (EMBEDDINGS, HEAD):
            weight = with_rows(weight, self._rows)
        fitting = weight.to(self._dtype)
        if fitting.dtype != weight.dtype and not torch.isfinite(fitting).all():
            where = f"{file}: {name}"
            if torch.isfinite(weight).all():
                raise ModelError(
                    f"{where} does not fit {_name(self._dtype)}; choose another --dtype"
                )
            raise ModelError(f"{where} holds values that are not finite")
        name = name if self._to is Layout.HF else original_name(name)
        self.names.add(name)
        self._writer.add(name, fitting)


def with_rows(weight_VD: Tensor, rows: int) -> Tensor:
    """A matrix cut to so many rows, or filled up to them with the mean of those that it has."""
    have = len(weight_VD)
    if rows <= have:
        return weight_VD[:rows]
    parts = weight_VD.split(_ROWS_AT_ONCE)
    mean_D = torch.stack([part.sum(0, dtype=torch.float64) for part in parts]).sum(0) / have
    return torch.cat([weight_VD, mean_D.to(weight_VD.dtype).expand(rows - have, -1)])


def _write_companions(
    folder: Path, model: Source, to: Layout, dtype: torch.dtype, pad_images: bool
) -> int:
    """Write all files but the weights; the rows that the embeddings are to have."""
    if to is Layout.HF:
        if model.layout is Layout.HF:
            rows = _same_companions(folder, model, {"dtype": _name(dtype)})
        else:
            rows = _hf_companions(folder, model, dtype, pad_images)
        load_processor(folder)
        return rows
    if model.layout is Layout.HF:
        return _original_companions(folder, model, dtype)
    values = model.values | {"model_type": "llava_llama", "torch_dtype": _name(dtype)}
    return _same_companions(folder, model, values)


def _hf_companions(folder: Path, model: Source, dtype: torch.dtype, pad_images: bool) -> int:
    tokenizer = companions.load_tokenizer(model.folder)
    vocabulary = companions.vocabulary_of(tokenizer)
    rows = model.rows if vocabulary.tokens <= model.rows else vocabulary.rows
    config: Any = model.config
    text = config.text_config
    config.image_token_index = vocabulary.image
    config.pad_token_id = text.pad_token_id = vocabulary.pad
    config.bos_token_id, config.eos_token_id = text.bos_token_id, text.eos_token_id
    text.vocab_size = rows
    config.dtype = _name(dtype)
    config.architectures = ["LlavaForConditionalGeneration"]
    folders = [path for path in (model.tower, model.folder) if path]
    images = companions.image_processor_of(config, folders, pad=pad_images)
    companions.write_hf_companions(folder, model.folder, tokenizer, images, config)
    return rows


def _original_companions(folder: Path, model: Source, dtype: torch.dtype) -> int:
    text: Any = model.config.text_config
    tokenizer: Any = load_processor(model.folder).tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    if (image := tokenizer.get_vocab().get(companions.IMAGE)) != model.config.image_token_index:
        raise ModelError(
            f"{model.folder}: {companions.IMAGE} is token {image}, by the config "
            f"{model.config.image_token_index}"
        )
    vocabulary = companions.vocabulary_of(tokenizer)
    if vocabulary.tokens > model.rows:
        raise ModelError(
            f"{model.folder}: the tokenizer knows {vocabulary.tokens} tokens, the embeddings {model.rows}"
        )
    rows = vocabulary.without_added or model.rows
    values = original_config(model.config, rows, _name(dtype))
    # LLaVA-1.5 pads with its unknown token.
    values["pad_token_id"] = 0 if rows < model.rows else text.pad_token_id
    companions.write_original_companions(folder, model.folder, model.config, values, vocabulary)
    return rows


def _same_companions(folder: Path, model: Source, changes: JsonDict) -> int:
    """The files of an adapter's base, which has the wanted layout already."""
    copy_companions(model.folder, folder)
    if (tower := model.folder / TOWER_FOLDER).is_dir():
        shutil.copytree(tower, folder / TOWER_FOLDER)
    values = read_config(model.folder) if model.layout is Layout.HF else {}
    values.pop("torch_dtype", None)
    text = json.dumps(values | changes, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    return model.rows


def _read_adapter(source: Path, base: Path | None) -> Adapter | None:
    if not source.is_dir():
        raise ModelError(f"{source}: no such folder")
    if not is_adapter(source):
        if base is not None:
            raise ModelError(f"{source}: holds no adapter_config.json; --base is for LoRA folders")
        return None
    if base is None:
        raise ModelError(f"{source}: a LoRA adapter; give what it was trained on: --base")
    return read_adapter(source)


def _check_output(output: Path, sources: list[Path], force: bool) -> None:
    place = output.resolve()
    for source in sources:
        if place == source.resolve() or source.resolve() in place.parents:
            raise ModelError(f"{output}: lies in {source}, which is read; name another folder")
        if place in source.resolve().parents:
            raise ModelError(f"{output}: holds {source}, which is read; name another folder")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not force:
        raise ModelError(f"{output}: already there; name another folder, or replace it: --force")
    if not (output / "config.json").is_file():
        raise ModelError(f"{output}: already there and no model folder, so --force leaves it alone")


def _check_room(output: Path, model: Source, dtype: torch.dtype) -> None:
    """Compare what will be written with what the disk has free, before hours of it."""
    needed = sum(torch.Size(s.shape).numel() for s in model.weights.values()) * dtype.itemsize
    parent = next(path for path in output.absolute().parents if path.is_dir())
    if (free := shutil.disk_usage(parent).free) < needed:
        raise ModelError(
            f"{output}: needs {needed / 1e9:.1f} GB, and {parent} has {free / 1e9:.1f} GB free"
        )


def _publish(temporary: Path, output: Path) -> None:
    """Put the finished folder in its place; a former one goes only once the new one is there."""
    if not output.exists():
        temporary.rename(output)
        return
    former = temporary.with_suffix(".old")
    output.rename(former)
    temporary.rename(output)
    shutil.rmtree(former)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Files of tensors: which of them hold a folder's weights, what is in each, and reading and writing one at a time.

Two formats: safetensors, and PyTorch's `.bin`, which is read without running any code that it might hold.
"""

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sima_ray.errors import ModelError, one_line, why
from sima_ray.policy.checkpoint import INDEX_SUFFIX

SHARD_BYTES = 5_000_000_000
"""The most that one written file holds, as published LLaVA folders have it."""

_KINDS = (("model", ".safetensors"), ("pytorch_model", ".bin"))


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: what it is, without its values."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def model_files(folder: Path) -> list[Path]:
    """The files of a model's weights: those that its index names, or the one file that there is.

    Safetensors go before `.bin`, and an index before other files: a folder may hold both.

    Raises:
        ModelError: There are none, the index cannot be read, or a file that it names is missing.
    """
    index, single = _find(folder)
    return [folder / name for name in sorted(set(index.values()))] if index else [single]


def model_weights(folder: Path) -> dict[str, Stored]:
    """What is in a model's files, by name, from their headers.

    Raises:
        ModelError: As `model_files` and `stored`, or a tensor that the index promises and its file lacks.
    """
    index, _ = _find(folder)
    found = stored(model_files(folder))
    for name, file in index.items():
        if name not in found or found[name].file.name != file:
            raise ModelError(f"{folder / file}: lacks {name}, which the index names")
    return found


def stored(files: list[Path]) -> dict[str, Stored]:
    """What is in files of tensors.

    Raises:
        ModelError: A file that is damaged or holds other things than tensors, or a tensor that two files hold.
    """
    found: dict[str, Stored] = {}
    for file in files:
        with opened(file) as tensors:
            for name in tensors:
                if name in found:
                    raise ModelError(f"{file}: {name} is also in {found[name].file.name}")
                found[name] = tensors.describe(name)
    return found


def _find(folder: Path) -> tuple[dict[str, str], Path]:
    """The index of a model's weights, empty where one file holds them all, and that file."""
    for stem, suffix in _KINDS:
        index, single = folder / f"{stem}{suffix}{INDEX_SUFFIX}", folder / f"{stem}{suffix}"
        if index.is_file():
            return _read_index(index), single
        if single.is_file():
            return {}, single
    raise ModelError(
        f"{folder}: holds no weights (model.safetensors, pytorch_model.bin, or either in parts with an index)"
    )


def _read_index(index: Path) -> dict[str, str]:
    try:
        held = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        files = {str(name) for name in held.values()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index}: not an index of weights: {why(error)}") from error
    if not files:
        raise ModelError(f"{index}: names no weights")
    for name in sorted(files):
        if Path(name).name != name:
            raise ModelError(f"{index}: names a file outside its folder: {name}")
        if not (index.parent / name).is_file():
            raise ModelError(f"{index}: names {name}, which is not there; fetch the rest")
    return held


class Tensors:
    """The tensors of one open file, each read when it is asked for."""

    def __init__(self, file: Path, source: "Mapping[str, Tensor] | safe_open") -> None:
        self._file = file
        self._source = source

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._source.keys()))

    def describe(self, name: str) -> Stored:
        """Shape and type of a tensor."""
        if isinstance(self._source, Mapping):
            tensor = self._source[name]
            return Stored(self._file, name, tuple(tensor.shape), tensor.dtype)
        part = self._source.get_slice(name)
        # No rows: the type alone is read.
        dtype = (part[:0] if part.get_shape() else self._source.get_tensor(name)).dtype
        return Stored(self._file, name, tuple(part.get_shape()), dtype)

    def read(self, name: str) -> Tensor:
        """A tensor's values, mapped from the file."""
        if isinstance(self._source, Mapping):
            return self._source[name]
        return self._source.get_tensor(name)


@contextmanager
def opened(file: Path) -> Iterator[Tensors]:
    """Open a file of tensors; its values are mapped, not loaded.

    Raises:
        ModelError: It is missing, damaged, or holds other things than tensors.
    """
    if not file.is_file():
        raise ModelError(f"{file}: no such file")
    if file.suffix == ".safetensors":
        try:
            source = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: not a whole safetensors file: {one_line(error)}") from error
        with source as tensors:
            yield Tensors(file, tensors)
        return
    yield Tensors(file, _load_bin(file))


def _load_bin(file: Path) -> dict[str, Tensor]:
    try:
        # Files of PyTorch before 1.6 are no zip archives and cannot be mapped.
        loaded = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{file}: not a whole PyTorch file of tensors alone (nothing else is loaded from it): "
            f"{one_line(error)}"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ModelError(f"{file}: not a whole PyTorch file: {one_line(error)}") from error
    if not isinstance(loaded, dict):
        raise ModelError(f"{file}: holds a {type(loaded).__name__}, not named tensors")
    for name, tensor in loaded.items():
        if not isinstance(tensor, Tensor):
            raise ModelError(f"{file}: {name} is a {type(tensor).__name__}, not a tensor")
    return loaded


class ShardWriter:
    """Writes tensors as safetensors, in files of a limited size, with an index where there are several."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._limit = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_size = 0
        self._parts: list[list[str]] = []
        self.size = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor, and write what was taken before where it does not fit in beside it.

        Raises:
            ModelError: The disk is full, or the like.
        """
        if self._pending_size + tensor.nbytes > self._limit:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_size += tensor.nbytes

    def _flush(self) -> None:
        if not self._pending:
            return
        file = self._part(len(self._parts))
        try:
            save_file(self._pending, file, metadata={"format": "pt"})
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file.parent}: cannot be written: {why(error)}") from error
        self.size += self._pending_size
        self._parts.append(list(self._pending))
        self._pending, self._pending_size = {}, 0

    def close(self) -> list[Path]:
        """Write the rest, name the files as published ones are, and write their index."""
        self._flush()
        if len(self._parts) == 1:
            return [self._part(0).rename(self._folder / "model.safetensors")]
        files: list[Path] = []
        held: dict[str, str] = {}
        for number, names in enumerate(self._parts):
            name = f"model-{number + 1:05d}-of-{len(self._parts):05d}.safetensors"
            files.append(self._part(number).rename(self._folder / name))
            held |= dict.fromkeys(names, name)
        index = {"metadata": {"total_size": self.size}, "weight_map": dict(sorted(held.items()))}
        path = self._folder / f"model.safetensors{INDEX_SUFFIX}"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return files

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}.safetensors"

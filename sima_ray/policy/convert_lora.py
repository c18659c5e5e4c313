"""LoRA adapters as LLaVA's training scripts leave them, merged tensor by tensor.

Such a folder holds a PEFT adapter and, in `non_lora_trainables.bin`, what was trained as a whole (the projector).
Names are the model's own with PEFT's `base_model.model.` in front; an adapter of a Hugging Face model fits too.

    W' = W + scale · B A      A: (r, in), B: (out, r), scale: alpha / r, or alpha / √r (rslora)
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from sima_ray.errors import ModelError, why
from sima_ray.policy.convert_keys import TOWER, published_name
from sima_ray.policy.weight_files import opened

NON_LORA = "non_lora_trainables.bin"
_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
_PLAIN: dict[str, Any] = {"use_dora": False, "fan_in_fan_out": False, "bias": "none"}


@dataclass(frozen=True, slots=True)
class Update:
    """What an adapter adds to one matrix."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def idle(self) -> bool:
        """It adds nothing: B is where training began."""
        return not bool(self.b.any())

    def delta(self) -> Tensor:
        """Of the matrix's shape (out, in), in float32."""
        return (self.b.float() @ self.a.float()) * self.scale


@dataclass(slots=True)
class Adapter:
    """An adapter folder, by the published names of the weights that it changes.

    Attributes:
        updates: Low-rank updates.
        whole: Weights that take the base's place.
        merged: The updates that were applied so far.
    """

    folder: Path
    updates: dict[str, Update]
    whole: dict[str, Tensor]
    merged: set[str] = field(default_factory=set)

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Compare with the model's weights.

        Raises:
            ModelError: A weight that the model lacks, or of another shape.
        """
        found = {name: (len(u.b), u.a.shape[1]) for name, u in self.updates.items()}
        found |= {name: tuple(tensor.shape) for name, tensor in self.whole.items()}
        for name, shape in found.items():
            if name not in shapes:
                raise ModelError(f"{self.folder}: changes {name}, which the base lacks")
            if shape != shapes[name]:
                raise ModelError(f"{self.folder}: {name} is {shape}, in the base {shapes[name]}")

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """A weight with this adapter merged, in float32 where it changed."""
        update = self.updates.get(name)
        if update is None:
            return weight
        self.merged.add(name)
        return weight if update.idle else weight.float() + update.delta()

    def summary(self) -> str:
        """What became of each part, in words.

        A vision tower that no gradient reached has updates that add nothing. One that is not in the checkpoint
        is not changed by LLaVA's own code either.
        """
        towers = {name for name in self.updates if name.startswith(TOWER)}
        idle = {name for name, update in self.updates.items() if update.idle}
        parts = [f"{len(self.merged - idle - towers):,} updates merged"]
        counts = {
            "merged into the vision tower": len(self.merged & towers - idle),
            "add nothing (B is zero)": len(idle - towers),
            "on the vision tower add nothing (B is zero)": len(idle & towers),
            "for the vision tower, which is not in the checkpoint": len(
                towers - self.merged - idle
            ),
            "weights replaced as a whole": len(self.whole),
        }
        return ", ".join(parts + [f"{count:,} {what}" for what, count in counts.items() if count])


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter, not a model."""
    return (folder / _CONFIG).is_file()


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder.

    Raises:
        ModelError: Broken, incomplete, or of a kind that is not plain LoRA.
    """
    settings = _read_settings(folder)
    files = [
        f for n in ("adapter_model.safetensors", "adapter_model.bin") if (f := folder / n).is_file()
    ]
    if not files:
        raise ModelError(f"{folder}: holds no adapter_model.safetensors or adapter_model.bin")
    sides: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    with opened(files[0]) as tensors:
        for key in tensors:
            if found := _PART.fullmatch(key):
                sides.setdefault(found["module"], {})[found["side"]] = tensors.read(key)
            elif "lora_" in key:
                raise ModelError(f"{files[0]}: {key} is no LoRA of a linear layer")
            else:  # PEFT's `modules_to_save`
                whole[_published(key)] = tensors.read(key)
    updates: dict[str, Update] = {}
    for module, parts in sides.items():
        where = f"{files[0]}: {module}"
        if set(parts) != {"A", "B"}:
            raise ModelError(f"{where} has lora_{''.join(parts)} alone")
        updates[_published(f"{module}.weight")] = _update(where, module, settings, parts)
    if (file := folder / NON_LORA).is_file():
        with opened(file) as tensors:
            whole |= {_published(key): tensors.read(key) for key in tensors}
    return Adapter(folder, updates, whole)


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / _CONFIG
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        kind, rank, alpha = settings["peft_type"], settings["r"], settings["lora_alpha"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: not the config of a LoRA adapter: {why(error)}") from error
    if kind != "LORA" or not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise ModelError(
            f"{file}: peft_type {kind}, r {rank}, lora_alpha {alpha}; only LoRA is merged"
        )
    for key, plain in _PLAIN.items():
        if (value := settings.get(key, plain)) != plain:
            raise ModelError(f"{file}: {key} is {value!r}; only plain LoRA is merged")
    return settings


def _update(where: str, module: str, settings: dict[str, Any], parts: dict[str, Tensor]) -> Update:
    a, b = parts["A"], parts["B"]
    target = module.removeprefix(_PREFIX)

    def of_module(patterns: str, plain: str) -> Any:
        """A setting of this module, by PEFT's own rule for exceptions by pattern."""
        exceptions = settings.get(patterns) or {}
        return exceptions.get(get_pattern_key(list(exceptions), target), settings[plain])

    rank, alpha = of_module("rank_pattern", "r"), of_module("alpha_pattern", "lora_alpha")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise ModelError(
            f"{where}: A {tuple(a.shape)} and B {tuple(b.shape)} are not of rank {rank}"
        )
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ModelError(f"{where} holds values that are not finite")
    return Update(a, b, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _published(key: str) -> str:
    return published_name(key.removeprefix(_PREFIX))

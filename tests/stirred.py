"""Adapters that plainly change a model, and a tiny LLaVA in float32, so that equal can mean equal."""

from pathlib import Path
from typing import Any

import torch

from sima_ray.config import LoraSettings
from sima_ray.policy.checkpoint import load_policy
from sima_ray.policy.merge import copy_companions
from sima_ray.tuning.lora import add_lora, save_adapter, trainable


def in_float32(policy: Path, folder: Path) -> Path:
    """The same policy, its weights in float32."""
    folder.mkdir(parents=True)
    copy_companions(policy, folder)
    model: Any = load_policy(policy, "float32")[0]
    model.save_pretrained(folder)
    return folder


def stirred_adapter(policy: Path, folder: Path, r: int, *, train_projector: bool = False) -> Path:
    """An adapter as training leaves it, with random weights."""
    model, _ = load_policy(policy, "float32")
    settings = LoraSettings(r=r, alpha=2 * r)
    tuned = add_lora(model, settings, seed=r, train_projector=train_projector)
    generator = torch.Generator().manual_seed(r)
    scale = 0.4 / r**0.5
    weights = {
        name: p.detach() + scale * torch.randn(p.shape, generator=generator)
        for name, p in trainable(tuned).items()
    }
    save_adapter(tuned, weights, folder)
    return folder

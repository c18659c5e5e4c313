"""LoRA on the language model, and where it is wished for the projector as a whole; on nothing else."""

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from sima_ray.config import LoraSettings
from sima_ray.errors import ModelError

PROJECTORS = (
    "multi_modal_projector",
    "multimodal_projector",
    "connector",
    "merger",
    "aligner",
    "embed_vision",
)
"""What transformers' models call the layers between vision tower and language model."""


def add_lora(
    model: Any, settings: LoraSettings, seed: int, *, train_projector: bool = False
) -> PeftModel:
    """Put fresh adapters on the language model's linear layers and freeze the rest.

    Args:
        model: A vision-language model.
        settings: Rank, scale and the layers by the end of their names.
        seed: Of the adapters' weights: all workers begin alike.
        train_projector: Train a copy of the projector too. It is saved with the adapter (PEFT's
            `modules_to_save`), and a merge puts it in the projector's place. With the adapters off the original
            one computes.

    Raises:
        ModelError: No layer of the language model has such a name, or the projector cannot be told.
    """
    projector = [projector_name(model)] if train_projector else None
    pattern = language_model_pattern(model, settings.targets)
    switch_dropout_off(model)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=pattern,
        modules_to_save=projector,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # In the model's own precision: the optimizer keeps float32 copies of what it trains.
        return get_peft_model(model, config, autocast_adapter_dtype=False)  # pyright: ignore[reportReturnType]


def language_model_pattern(model: Any, targets: list[str]) -> str:
    """A pattern for the full names of the language model's linear layers that end in one of `targets`.

    The vision tower's layers often have the same last names, so the pattern holds the path to the decoder.
    """
    decoder = model.get_decoder()
    paths = [name for name, module in model.named_modules() if module is decoder]
    if not paths or not paths[0]:
        raise ModelError(f"{type(model).__name__}: its language model cannot be told from the rest")
    pattern = rf"{re.escape(paths[0])}\.(.*\.)?({'|'.join(map(re.escape, targets))})"
    if not any(
        re.fullmatch(pattern, name) and isinstance(module, nn.Linear)
        for name, module in model.named_modules()
    ):
        raise ModelError(f"no linear layer of {paths[0]} is named {', '.join(targets)}")
    return pattern


def projector_name(model: nn.Module) -> str:
    """The full name of the layers between vision tower and language model.

    Raises:
        ModelError: There is not exactly one module of a known name.
    """
    known = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in PROJECTORS]
    if len(known) != 1:
        found = ", ".join(known) or "none"
        raise ModelError(
            f"{type(model).__name__}: its projector cannot be told ({found} of {', '.join(PROJECTORS)}); "
            "set training.train_projector to false"
        )
    return known[0]


def switch_dropout_off(model: nn.Module) -> None:
    """Make the base model deterministic in training mode: DPO compares it with itself."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_adapter(model: PeftModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Write a PEFT folder that `PeftModel.from_pretrained` and vLLM load.

    Args:
        model: Holds the adapter's config.
        weights: The trained parameters by their names in `model`, whole even where ranks share them.
        folder: Made if missing.
    """
    model.save_pretrained(str(folder), state_dict=dict(weights), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card

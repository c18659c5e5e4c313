"""A step's numbers in the small: models with stirred adapters, pairs of random lengths, loss and gradients."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sima_ray.config import LoraSettings
from sima_ray.loss import dpo_loss
from sima_ray.policy.checkpoint import load_policy
from sima_ray.records import PreferencePair
from sima_ray.tuning.attention import set_attention
from sima_ray.tuning.dataset import EncodedPair
from sima_ray.tuning.forward import PairForward, PairLogps, base_of
from sima_ray.tuning.lora import add_lora, trainable

IMAGE_ID, IMAGE_TOKENS, SIDE = 3, 36, 96  # of the tiny LLaVA

RAGGED = [(3, 1, 1), (9, 7, 7), (1, 1, 40), (30, 25, 2), (5, 2, 60)]
"""Lengths of prompt text, chosen, rejected: equal, very different, of one token."""


def stirred(model: Any, seed: int = 1) -> Any:
    """The model with adapters that are no longer zero."""
    tuned = add_lora(model, LoraSettings(r=4, alpha=8), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(tuned).values():
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            parameter.add_(noise.to(parameter.dtype) * 0.1)
    return tuned


def stirred_llava(folder: Path, attention: str) -> Any:
    """The same of a model on the disk, in float64 and with this attention."""
    loaded = load_policy(folder, "float64")[0]
    set_attention(loaded, attention)
    return stirred(loaded)


def ragged_pairs() -> list[EncodedPair]:
    """Pairs of `RAGGED` lengths."""
    return [random_pair(*lengths, seed) for seed, lengths in enumerate(RAGGED)]


def random_pair(prompt: int, chosen: int, rejected: int, seed: int = 0) -> EncodedPair:
    """A pair for the tiny LLaVA, of random tokens: `prompt` counts the text around the image."""
    generator = torch.Generator().manual_seed(seed)
    texts = [
        torch.randint(4, 250, (length,), generator=generator)
        for length in (prompt, chosen, rejected)
    ]
    image = torch.full((IMAGE_TOKENS,), IMAGE_ID)
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    pair = PreferencePair(f"r{seed}", f"{seed}.png", "", "", "", "", "")
    ids = torch.cat([texts[0][:1], image, texts[0][1:]])
    return EncodedPair(pair, ids, texts[1], texts[2], {"pixel_values": pixels})


def loss_and_gradients(
    forward: PairForward, model: Any, pairs: Sequence[EncodedPair]
) -> tuple[Tensor, PairLogps, list[Tensor]]:
    """DPO's loss against made-up references, the log-probabilities, and the gradients of all adapters."""
    logps = forward(base_of(model), pairs)
    references = [
        (-4.0 * torch.tensor([len(ids) for ids in side])).to(logps.chosen_B)
        for side in ([p.chosen_C for p in pairs], [p.rejected_R for p in pairs])
    ]
    loss = dpo_loss(logps.chosen_B, logps.rejected_B, *references, beta=0.1).loss
    gradients = torch.autograd.grad(loss, list(trainable(model).values()))
    return loss.detach(), logps, list(gradients)


def distances(
    one: tuple[Tensor, PairLogps, list[Tensor]], other: tuple[Tensor, PairLogps, list[Tensor]]
) -> tuple[float, float, float]:
    """The largest differences of loss, log-probabilities and gradients."""
    logps = [torch.cat([of[1].chosen_B, of[1].rejected_B]).detach() for of in (one, other)]
    return (
        float((one[0] - other[0]).abs()),
        float((logps[0] - logps[1]).abs().max()),
        max(float((a - b).abs().max()) for a, b in zip(one[2], other[2], strict=True)),
    )

"""The training loops of the demo policy: vision on dense labels, then language on samples.

bf16 matrix products are several times faster than fp32 on the CPUs that have them, so the model is
in bf16 and the optimizer keeps fp32 masters of its weights.

Dimensions: B images or rows, P tokens of an image, T tokens of a row, D width.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from sima_ray.demo.language import COLORS, NAMES, PLACES
from sima_ray.demo.packing import Batch
from sima_ray.demo.scenes import CELL, SIDE, Scene, render

EMPTY = len(NAMES)  # the label of a patch in an empty cell
IGNORE = -100  # the label that no loss counts
MASKED = -30000.0  # added to a forbidden attention score; finite in bf16
Log = Callable[[str], None]


class Optimizer:
    """AdamW on fp32 masters of bf16 weights: linear warm-up, cosine decay, clipped gradients."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], rate: float, steps: int, warmup: int = 50
    ) -> None:
        self._weights = [p for p in parameters if p.requires_grad]
        self._masters = [p.detach().float().clone().requires_grad_() for p in self._weights]
        self._adamw = torch.optim.AdamW(
            self._masters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._adamw,
            lambda step: min(
                (step + 1) / warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps))
            ),
        )

    def step(self) -> float:
        """Apply the gradients that lie in the weights; returns their norm before clipping."""
        for master, weight in zip(self._masters, self._weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        norm = nn.utils.clip_grad_norm_(self._masters, 1.0)
        self._adamw.step()
        self._schedule.step()
        with torch.no_grad():
            for master, weight in zip(self._masters, self._weights, strict=True):
                weight.copy_(master)
        return float(norm)


def pixels_of(scenes: Sequence[Scene], processor: LlavaProcessor) -> torch.Tensor:
    """The rendered scenes, as bytes: uint8 (scenes, SIDE, SIDE, 3)."""
    assert processor.image_processor.size["height"] == SIDE
    return torch.from_numpy(np.stack([np.asarray(render(scene)) for scene in scenes]))


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    """What the image processor makes of bytes (mean and deviation 0.5): bf16 (B, 3, SIDE, SIDE)."""
    return (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).to(torch.bfloat16)


def image_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """The vision tower's features that the projector reads: (B, P, D)."""
    output = model.model.vision_tower(normalized(pixels), output_hidden_states=True)
    return output.hidden_states[-1][:, 1:]


def patch_labels(scenes: Sequence[Scene], patch: int) -> torch.Tensor:
    """For each patch its cell's object, its attributes, the background, the cell: (scenes, P, 4).

    The cell is a label because features that forget where they are cannot be named by place.
    """
    side, across = SIDE // patch, CELL // patch
    labels = torch.full((len(scenes), side, side, 4), IGNORE)
    labels[..., 0] = EMPTY
    row = torch.arange(side) // across
    labels[..., 3] = row[:, None] * (SIDE // CELL) + row
    for at, scene in enumerate(scenes):
        labels[at, :, :, 2] = COLORS.index(scene.truth.background or COLORS[0])
        for entry in scene.truth.entries:
            top, left = (x * across for x in divmod(entry.place, SIDE // CELL))
            cell = labels[at, top : top + across, left : left + across]
            cell[..., 0] = NAMES.index(entry.name)
            cell[..., 1] = 2 * entry.small + entry.faded
    return labels.flatten(1, 2)


def train_vision(
    model: LlavaForConditionalGeneration,
    pixels: torch.Tensor,
    labels_BP4: torch.Tensor,
    steps: int,
    log: Log,
    rate: float = 1.5e-3,
    batch: int = 64,
    seed: int = 0,
) -> None:
    """Teach the vision tower what each patch's cell holds; the heads are thrown away."""
    torch.manual_seed(seed)
    vision: Any = model.config.vision_config
    width = vision.hidden_size
    sizes = [EMPTY + 1, 4, len(COLORS), len(PLACES)]
    heads = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(sizes)))
    heads.to(torch.bfloat16)
    tower = model.model.vision_tower
    optimizer = Optimizer([*tower.parameters(), *heads.parameters()], rate, steps)
    started = time.perf_counter()
    for step in range(steps):
        at = torch.randint(len(pixels), (batch,))
        scores = heads(image_features(model, pixels[at])).float()
        parts = scores.split(sizes, dim=-1)
        labels = labels_BP4[at]
        losses = [
            cross_entropy(part.flatten(0, 1), labels[..., i].flatten(), ignore_index=IGNORE)
            for i, part in enumerate(parts)
        ]
        torch.stack(losses).sum().backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            occupied = labels[..., 1] != IGNORE
            right = [(part.argmax(-1) == labels[..., i])[occupied] for i, part in enumerate(parts)]
            log(
                f"vision {step + 1}/{steps} {time.perf_counter() - started:.0f}s"
                f" loss {' '.join(f'{loss.item():.3f}' for loss in losses)}"
                f" right {' '.join(f'{float(r.float().mean()):.3f}' for r in right)}"
            )


def language_loss(
    model: LlavaForConditionalGeneration, batch: Batch, features_NPD: torch.Tensor | None
) -> torch.Tensor:
    """The weighted mean cross-entropy of the batch's responses.

    Args:
        model: With eager attention, which is the fastest here for short rows.
        batch: The packed rows.
        features_NPD: The vision tower's features of the images that the batch indexes.
    """
    llama = model.model.language_model
    embedded = llama.embed_tokens(batch.ids_BT)
    if len(batch.images):
        assert features_NPD is not None
        projected = model.model.multi_modal_projector(features_NPD[batch.images])
        shown = (batch.ids_BT == model.config.image_token_index)[..., None].expand_as(embedded)
        embedded = embedded.masked_scatter(shown, projected)
    mask = torch.zeros(batch.mask_B1TT.shape, dtype=embedded.dtype)
    mask.masked_fill_(~batch.mask_B1TT, MASKED)
    hidden = llama(
        inputs_embeds=embedded,
        attention_mask=mask,
        position_ids=batch.positions_BT,
        use_cache=False,
    ).last_hidden_state
    scores = model.lm_head(hidden[batch.rows, batch.columns]).float()
    losses = cross_entropy(scores, batch.targets, reduction="none")
    return (losses * batch.weights).sum() / batch.weights.sum()


def train_language(
    model: LlavaForConditionalGeneration,
    batches: Iterable[Sequence[Batch]],
    steps: int,
    log: Log,
    rate: float,
    features_NPD: torch.Tensor | None = None,
    decay_steps: int | None = None,
    every: Callable[[int], None] | None = None,
) -> None:
    """Teach the language model and the projector; the vision tower stays as it is.

    Args:
        model: In bf16; trained in place.
        batches: At least `steps` of them: the batches whose losses are added up in a step.
        steps: How many to take.
        log: Takes progress lines.
        rate: Peak learning rate.
        features_NPD: See `language_loss`.
        decay_steps: The length of the rate's cosine, where training stops before its end.
        every: Called with the number of steps done, after each 100.
    """
    trained = [p for n, p in model.named_parameters() if "vision_tower" not in n]
    optimizer = Optimizer(trained, rate, decay_steps or steps)
    started = time.perf_counter()
    running: dict[str, float] = defaultdict(float)
    for step, parts in zip(range(1, steps + 1), batches, strict=False):
        for part in parts:
            loss = language_loss(model, part, features_NPD)
            loss.backward()
            running[part.name] += loss.item() / 25
        norm = optimizer.step()
        if step % 25 == 0:
            seconds = time.perf_counter() - started
            losses = " ".join(f"{name} {loss:.4f}" for name, loss in sorted(running.items()))
            log(f"language {step}/{steps} {seconds:.0f}s {losses} norm {norm:.2f}")
            running.clear()
        if every and (step % 100 == 0 or step == steps):
            every(step)

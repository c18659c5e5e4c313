"""One optimizer step of DPO: micro batches forward and backward, one update, and what to watch.

Dimensions: B pairs of a micro batch.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sima_ray.config import LossSettings
from sima_ray.errors import TrainingError
from sima_ray.loss import DpoLoss, dpo_loss
from sima_ray.tuning.batches import MicroBatch
from sima_ray.tuning.engine import (
    Engine,
    gather_lists,
    gather_rows,
    gradient_norm,
    peak_memory,
    set_learning_rate,
)

NAMES = (
    "loss",
    "accuracy",
    "margin",
    "chosen_reward",
    "rejected_reward",
    "chosen_logp",
    "rejected_logp",
    "chosen_change",
)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Weighted means over a step's pairs, all workers together.

    Attributes:
        step: Counted from 1.
        epoch: Epochs done after this step, as a fraction.
        loss: Of the settings' kind.
        accuracy: Share of pairs whose chosen response has the higher reward.
        margin: Chosen minus rejected reward.
        chosen_reward, rejected_reward: beta × (policy − reference log-probability).
        chosen_logp, rejected_logp: Policy log-probabilities, sums over the response.
        chosen_change: Policy − reference log-probability of the chosen response, a sum over its tokens, nats. Far
            below 0 is the classic failure: the loss falls, and so does what was chosen.
        learning_rate: Of this step.
        grad_norm: Before clipping.
        tokens_per_s: Tokens of both rows of each pair, all workers together.
        peak_memory_bytes: Of the worker that has used most, since it began: allocated on the GPU, or resident
            where it computes on a CPU.
    """

    step: int
    epoch: float
    loss: float
    accuracy: float
    margin: float
    chosen_reward: float
    rejected_reward: float
    chosen_logp: float
    rejected_logp: float
    chosen_change: float
    learning_rate: float
    grad_norm: float
    tokens_per_s: float
    peak_memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For a line of JSON."""
        return asdict(self)


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up to `peak`, then a cosine to 0: the rate of a step counted from 0."""
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_step(
    engine: Engine,
    micro_batches: Sequence[MicroBatch],
    *,
    step: int,
    epoch: float,
    beta: float,
    loss: LossSettings,
    rate: float,
    total_weight: float,
    world: int,
    seeds: Sequence[int] | None = None,
    started: float | None = None,
) -> StepMetrics:
    """Take one optimizer step.

    The step's loss is Σ weight · loss / Σ weight over the whole batch, however it is split over workers and micro
    batches.

    Args:
        engine: Wraps a `PairScorer`.
        micro_batches: This worker's share; all workers have equally many.
        step, epoch: For the metrics.
        beta, loss: As in `dpo_loss`.
        rate: Learning rate.
        total_weight: Of the whole batch, all workers together.
        world: Number of workers.
        seeds: Of each micro batch's dropout; None leaves the generators as they are.
        started: When the step began, by `time.perf_counter`, waiting for its pairs included; None is now.

    Raises:
        TrainingError: On all workers alike: a loss that is not finite, before the weights are touched; gradients
            that are not, after which the weights in memory must not be used.
    """
    started = time.perf_counter() if started is None else started
    sums = torch.zeros(len(NAMES), dtype=torch.float64)
    tokens = 0
    broken: list[str] = []
    for index, micro in enumerate(micro_batches):
        engine.set_gradient_accumulation_boundary(index + 1 == len(micro_batches))
        if seeds is not None:
            torch.manual_seed(seeds[index])
        result, columns = score(engine, micro, beta, loss)
        weights_B = micro.weights_B.to(result.losses_B)
        # DeepSpeed averages over the workers; the weights say what a pair counts.
        engine.backward(
            (weights_B * result.losses_B).sum() / total_weight * world, scale_wrt_gas=False
        )
        sums += (weights_B.double() @ columns).cpu()
        tokens += sum(p.tokens for p, w in zip(micro.pairs, micro.weights_B, strict=True) if w > 0)
        broken += _not_finite(result.losses_B, micro)
        if index + 1 < len(micro_batches):
            engine.step()  # between micro batches it only counts
    own = [*sums.tolist(), tokens, len(broken), peak_memory(engine.device)]
    rows = gather_rows(torch.tensor(own, dtype=torch.float64, device=engine.device)).cpu()
    *means, tokens_done, all_broken, _ = rows.sum(0).tolist()
    if all_broken > 0:
        raise TrainingError(_broken_message(step, gather_lists(broken)))
    set_learning_rate(engine, rate)
    norm = _updated(engine, step)
    return StepMetrics(
        step=step,
        epoch=epoch,
        learning_rate=rate,
        grad_norm=norm,
        tokens_per_s=tokens_done / (time.perf_counter() - started),
        peak_memory_bytes=int(rows[:, -1].max()),
        **{name: value / total_weight for name, value in zip(NAMES, means, strict=True)},
    )


def _updated(engine: Engine, step: int) -> float:
    """Update the weights; the norm of the gradients before clipping.

    Raises:
        TrainingError: They are not finite.
    """
    norm = gradient_norm(engine)
    if norm is None or math.isfinite(norm):
        engine.step()
        norm = engine.get_global_grad_norm() if norm is None else norm
    value = 0.0 if norm is None else float(norm)
    if not math.isfinite(value) or value < 0:  # DeepSpeed says −1 of what is not finite
        raise TrainingError(
            f"step {step}: the gradient is not finite though the loss is; no checkpoint holds this "
            "step. Lower learning_rate, or compute in float32"
        )
    return value


def score(
    engine: Engine, micro: MicroBatch, beta: float, loss: LossSettings
) -> tuple[DpoLoss, Tensor]:
    """A micro batch's loss, and its metrics pair by pair.

    Returns:
        (loss, columns): columns are of shape (B, len(NAMES)), float64, detached, 0 for pairs of weight 0.
    """
    chosen_B, rejected_B = engine(micro.pairs)
    reference_chosen_B = micro.reference_chosen_B.to(chosen_B)
    result = dpo_loss(
        chosen_B,
        rejected_B,
        reference_chosen_B,
        micro.reference_rejected_B.to(rejected_B),
        beta=beta,
        settings=loss,
        chosen_tokens_B=_lengths(chosen_B, [len(pair.chosen_C) for pair in micro.pairs]),
        rejected_tokens_B=_lengths(rejected_B, [len(pair.rejected_R) for pair in micro.pairs]),
        weights_B=micro.weights_B,
    )
    columns = (
        result.losses_B,
        (result.margins_B > 0).to(result.margins_B),
        result.margins_B,
        result.chosen_rewards_B,
        result.rejected_rewards_B,
        chosen_B,
        rejected_B,
        chosen_B - reference_chosen_B,
    )
    assert len(columns) == len(NAMES)
    counts_B = micro.weights_B.to(result.losses_B) > 0
    rows = torch.stack([torch.where(counts_B, column.detach(), 0.0) for column in columns], dim=1)
    return result, rows.double()


def _lengths(like: Tensor, values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(like)


def _not_finite(losses_B: Tensor, micro: MicroBatch) -> list[str]:
    finite = losses_B.isfinite().tolist()
    return [pair.pair.row_id for pair, fine in zip(micro.pairs, finite, strict=True) if not fine]


def _broken_message(step: int, row_ids: list[str]) -> str:
    shown = ", ".join(sorted(row_ids)[:10]) + (" …" if len(row_ids) > 10 else "")
    return (
        f"step {step}: the loss is not finite for {len(row_ids)} pairs ({shown}); no weight was "
        "changed by this step. Lower learning_rate, or leave these pairs out"
    )

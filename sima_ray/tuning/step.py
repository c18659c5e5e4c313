"""One optimizer step of DPO: micro batches forward and backward, one update, and what to watch.

Dimensions: B pairs of a micro batch.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sima_ray.config import LossSettings
from sima_ray.errors import TrainingError
from sima_ray.loss import DpoLoss, dpo_loss
from sima_ray.tuning.dataset import EncodedPair
from sima_ray.tuning.engine import (
    Engine,
    gather_lists,
    gradient_norm,
    set_learning_rate,
    sum_over_workers,
)

NAMES = (
    "loss",
    "accuracy",
    "margin",
    "chosen_reward",
    "rejected_reward",
    "chosen_logp",
    "rejected_logp",
)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward and backward pass takes.

    Attributes:
        pairs: B of them; fillers that make up a batch's number repeat another pair, with weight 0.
        weights_B: float32.
        reference_chosen_B, reference_rejected_B: Reference log-probabilities, float64.
    """

    pairs: Sequence[EncodedPair]
    weights_B: Tensor
    reference_chosen_B: Tensor
    reference_rejected_B: Tensor


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
        chosen_logp, rejected_logp: Policy log-probabilities, sums over the response. Both falling fast is the
            classic failure.
        learning_rate: Of this step.
        grad_norm: Before clipping.
        tokens_per_s: Tokens of both rows of each pair, all workers together.
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
    learning_rate: float
    grad_norm: float
    tokens_per_s: float

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
    micro_batches: Iterable[MicroBatch],
    *,
    step: int,
    epoch: float,
    beta: float,
    loss: LossSettings,
    rate: float,
    total_weight: float,
    world: int,
) -> StepMetrics:
    """Take one optimizer step.

    The step's loss is Σ weight · loss / Σ weight over the whole batch, however it is split over workers and micro
    batches.

    Args:
        engine: Wraps a `PairScorer`.
        micro_batches: This worker's share, as many as the engine accumulates.
        step, epoch: For the metrics.
        beta, loss: As in `dpo_loss`.
        rate: Learning rate.
        total_weight: Of the whole batch, all workers together.
        world: Number of workers.

    Raises:
        TrainingError: A loss that is not finite, on all workers alike, before the weights are touched.
    """
    started = time.perf_counter()
    sums = torch.zeros(len(NAMES) + 2, dtype=torch.float64)  # the metrics, tokens, broken pairs
    broken: list[str] = []
    for index, micro in enumerate(micro_batches):
        if index:
            engine.step()  # between micro batches it only counts
        result, chosen_B, rejected_B = _score(engine, micro, beta, loss)
        weights_B = micro.weights_B.to(result.losses_B)
        # DeepSpeed averages over the workers; the weights say what a pair counts.
        share = (weights_B * result.losses_B).sum() / total_weight
        engine.backward(share * world, scale_wrt_gas=False)
        sums[:-2] += _weighted_sums(result, chosen_B, rejected_B, weights_B)
        sums[-2] += sum(pair.tokens for pair in micro.pairs)
        broken += _not_finite(result.losses_B, micro)
    sums[-1] = len(broken)
    sums = sum_over_workers(sums.to(engine.device)).cpu()
    if sums[-1] > 0:
        raise TrainingError(_broken_message(step, gather_lists(broken)))
    set_learning_rate(engine, rate)
    norm = gradient_norm(engine)
    engine.step()
    norm = engine.get_global_grad_norm() if norm is None else norm
    return StepMetrics(
        step=step,
        epoch=epoch,
        learning_rate=rate,
        grad_norm=float(norm) if norm is not None else 0.0,
        tokens_per_s=float(sums[-2]) / (time.perf_counter() - started),
        **dict(zip(NAMES, (sums[:-2] / total_weight).tolist(), strict=True)),
    )


def _score(
    engine: Engine, micro: MicroBatch, beta: float, loss: LossSettings
) -> tuple[DpoLoss, Tensor, Tensor]:
    chosen_B, rejected_B = engine(micro.pairs)
    result = dpo_loss(
        chosen_B,
        rejected_B,
        micro.reference_chosen_B.to(chosen_B),
        micro.reference_rejected_B.to(rejected_B),
        beta=beta,
        settings=loss,
        chosen_tokens_B=_lengths(chosen_B, [len(pair.chosen_C) for pair in micro.pairs]),
        rejected_tokens_B=_lengths(rejected_B, [len(pair.rejected_R) for pair in micro.pairs]),
        weights_B=micro.weights_B,
    )
    return result, chosen_B.detach(), rejected_B.detach()


def _lengths(like: Tensor, values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(like)


def _weighted_sums(
    result: DpoLoss, chosen_B: Tensor, rejected_B: Tensor, weights_B: Tensor
) -> Tensor:
    """Weighted sums over the pairs, in the order of NAMES."""
    columns = (
        result.losses_B.detach(),
        (result.margins_B > 0).to(weights_B),
        result.margins_B,
        result.chosen_rewards_B,
        result.rejected_rewards_B,
        chosen_B,
        rejected_B,
    )
    rows = torch.stack([torch.where(weights_B > 0, column, 0.0) for column in columns])
    return (rows.double() @ weights_B.double()).cpu()


def _not_finite(losses_B: Tensor, micro: MicroBatch) -> list[str]:
    finite = losses_B.isfinite().tolist()
    return [pair.pair.row_id for pair, fine in zip(micro.pairs, finite, strict=True) if not fine]


def _broken_message(step: int, row_ids: list[str]) -> str:
    shown = ", ".join(sorted(row_ids)[:10]) + (" …" if len(row_ids) > 10 else "")
    return (
        f"step {step}: the loss is not finite for {len(row_ids)} pairs ({shown}); no weight was "
        "changed by this step. Lower learning_rate, or leave these pairs out"
    )

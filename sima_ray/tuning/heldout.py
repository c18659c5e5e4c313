"""Evaluation on held-out pairs: what a step reports, without a gradient, the same at any number of workers."""

from collections.abc import Iterable

import torch

from sima_ray.config import LossSettings
from sima_ray.tuning.batches import MicroBatch
from sima_ray.tuning.engine import Engine, gather_lists
from sima_ray.tuning.schedule import MicroRows
from sima_ray.tuning.step import NAMES, score

PREFIX = "eval_"


def evaluate(
    engine: Engine,
    batches: Iterable[tuple[MicroRows, MicroBatch]],
    *,
    beta: float,
    loss: LossSettings,
) -> dict[str, float]:
    """Weighted means over all held-out pairs; every worker must call this.

    The pairs' own numbers are gathered and summed in the order of their rows, so that no split changes a digit.

    Args:
        engine: Wraps a `PairScorer`.
        batches: This worker's share, with the rows that each is of; all workers have equally many.
        beta, loss: As in `dpo_loss`.

    Returns:
        `eval_loss`, `eval_accuracy`, …: the names of `sima_ray.tuning.step.NAMES`. All 0 where no pair has weight.
    """
    own: list[tuple[int, float, list[float]]] = []
    engine.eval()
    try:
        with torch.no_grad():
            for rows, micro in batches:
                _, columns = score(engine, micro, beta, loss)
                found = zip(rows, micro.weights_B.tolist(), columns.tolist(), strict=True)
                own += [(row, weight, values) for row, weight, values in found if row is not None]
    finally:
        engine.train()
    everyone = sorted(gather_lists(own))
    total = sum(weight for _, weight, _ in everyone) or 1.0
    return {
        f"{PREFIX}{name}": sum(weight * values[i] for _, weight, values in everyone) / total
        for i, name in enumerate(NAMES)
    }

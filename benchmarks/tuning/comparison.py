"""The gate's numbers: the same pairs by all three trainers. `python -m benchmarks.tuning.comparison FOLDER`.

Adapters are stirred first: fresh ones change nothing, and would make every loss log 2. Prints one line of JSON, a
`Gate`, as its last.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tuning.by_released import load, pair_loss
from benchmarks.tuning.gate import Gate
from benchmarks.tuning.shapes import BETA, Work
from sima_ray.loss import dpo_loss
from sima_ray.tuning.attention import attention_of
from sima_ray.tuning.choice import choose_forward
from sima_ray.tuning.dataset import EncodedPair, read_pairs
from sima_ray.tuning.forward import PairForward, PairLogps, base_of, concatenated
from sima_ray.tuning.lora import trainable
from sima_ray.tuning.shared import shared


def check(work: Work, *, with_trl: bool = True) -> Gate:
    """Compare on all pairs of a (small) folder."""
    exact = replace(work, shapes=replace(work.shapes, dtype="float64"))
    model, pairs = stirred(exact)
    tuned, attention = as_tuned(exact)
    ours = _numbers(tuned, pairs, dpo_by(shared))
    plain = _numbers(model, pairs, dpo_by(concatenated))
    released = _numbers(model, pairs, lambda model, pair: pair_loss(model, pair, true_dpo=True))
    fp64 = {
        "loss": _apart([ours[0]], [plain[0]]),
        "logps": _apart(_logps(shared, tuned, pairs), _logps(concatenated, model, pairs)),
        "grads": _apart(ours[1], plain[1]),
        "released_loss": _apart([ours[0]], [released[0]]),
        "released_grads": _apart(ours[1], released[1]),
    }
    trl_loss, same_rows = _trl(work) if with_trl else (None, None)
    return Gate(fp64, trl_loss, same_rows, ours[0].mean().item(), attention)


def stirred(work: Work) -> tuple[Any, list[EncodedPair]]:
    """The policy with adapters that are no longer without effect, and the pairs."""
    model, encoder = load(work)
    generator = torch.Generator().manual_seed(work.seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter) * 0.02)
    return model.train(), [encoder.encode(pair) for pair in read_pairs(work.pairs)]


def as_tuned(work: Work) -> tuple[Any, str]:
    """The same policy with the attention that the tuner chooses for it, and that attention's name."""
    model, pairs = stirred(work)
    choice = choose_forward(model.eval(), pairs)
    assert choice.forward is shared, choice.reason
    return model.train(), attention_of(base_of(model))


def dpo_by(forward: PairForward) -> Callable[[Any, EncodedPair], Tensor]:
    """The loss of one pair by a forward of ours, the reference computed with the adapters off."""

    def loss(model: Any, pair: EncodedPair) -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            reference = forward(base_of(model), [pair])
        policy = forward(base_of(model), [pair])
        sides = (policy.chosen_B, policy.rejected_B, reference.chosen_B, reference.rejected_B)
        return dpo_loss(*sides, beta=BETA).loss

    return loss


def _numbers(
    model: Any, pairs: Sequence[EncodedPair], loss_of: Callable[[Any, EncodedPair], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Each pair's loss, and the gradients of their mean."""
    adapters = list(trainable(model).values())
    losses: list[Tensor] = []
    total = [torch.zeros_like(parameter) for parameter in adapters]
    for pair in pairs:
        loss = loss_of(model, pair)
        for sum_of, gradient in zip(total, torch.autograd.grad(loss, adapters), strict=True):
            sum_of += gradient / len(pairs)
        losses.append(loss.detach())
    return torch.stack(losses), total


def _logps(forward: PairForward, model: Any, pairs: Sequence[EncodedPair]) -> list[Tensor]:
    with torch.no_grad():
        found: list[PairLogps] = [forward(base_of(model), [pair]) for pair in pairs]
    return [side for logps in found for side in (logps.chosen_B, logps.rejected_B)]


def _apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest absolute difference."""
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def _trl(work: Work) -> tuple[float, bool]:
    """How far TRL's loss is from ours at most, in float32, and whether its rows are ours."""
    from benchmarks.tuning.by_trl import collated, make_trainer

    single = replace(work, shapes=replace(work.shapes, dtype="float32"))
    _, pairs = stirred(single)
    model, _ = as_tuned(single)
    adapters = {name: p.detach().clone() for name, p in trainable(model).items()}
    trainer = make_trainer(single, adapters)
    theirs = trainer.model.to(work.device).train()
    distances: list[float] = []
    same = True
    for row, pair in enumerate(pairs):
        batch = collated(trainer, [row])
        same &= _rows(batch) == [
            torch.cat([pair.prompt_P, r]).tolist() for r in (pair.chosen_C, pair.rejected_R)
        ]
        loss = trainer.compute_loss(theirs, batch)
        distances.append(abs(loss.item() - dpo_by(shared)(model, pair).item()))
    return max(distances), same


def _rows(batch: dict[str, Any]) -> list[list[int]]:
    kept = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in kept]


if __name__ == "__main__":
    print(json.dumps(asdict(check(Work.read(Path(sys.argv[1]))))))

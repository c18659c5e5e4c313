"""One optimizer step, with a plain PyTorch engine in DeepSpeed's place."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from easy_pairs import easy_pairs

from sima_ray.config import LoraSettings, LossSettings
from sima_ray.errors import TrainingError
from sima_ray.loss import dpo_loss
from sima_ray.policy.checkpoint import load_policy
from sima_ray.tuning.batches import MicroBatch
from sima_ray.tuning.dataset import EncodedPair, PairEncoder
from sima_ray.tuning.forward import PairScorer, concatenated
from sima_ray.tuning.lora import add_lora, trainable
from sima_ray.tuning.step import learning_rate, train_step

DPO = LossSettings()


class PlainEngine:
    """What a step needs of an engine, in one process; `accumulation` backward passes make a step."""

    device = torch.device("cpu")

    def __init__(self, module: torch.nn.Module, accumulation: int) -> None:
        self.module = module
        self.optimizer = torch.optim.SGD(trainable(module).values(), lr=0.0)
        self._accumulation = accumulation
        self._boundary = False
        self.updates = 0

    def __call__(self, pairs: Sequence[EncodedPair]) -> Any:
        return self.module(pairs)

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas
        loss.backward()
        self._accumulation -= 1

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self._boundary = is_boundary

    def step(self) -> None:
        if self._boundary:
            assert self._accumulation == 0
            self.optimizer.step()
            self.updates += 1

    def zero_optimization(self) -> bool:
        return False

    def bfloat16_enabled(self) -> bool:
        return False


@pytest.fixture(scope="module")
def encoded(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> list[EncodedPair]:
    images = tmp_path_factory.mktemp("images")
    _, processor = load_policy(tiny_llava)
    encoder = PairEncoder(processor, str(images), 512)
    return [encoder.encode(pair) for pair in easy_pairs(images, 8)]


def engine_of(tiny_llava: Path, accumulation: int) -> PlainEngine:
    model, _ = load_policy(tiny_llava, "float64")
    return PlainEngine(
        PairScorer(add_lora(model, LoraSettings(r=4, alpha=8), 0), concatenated), accumulation
    )


def micro(pairs: list[EncodedPair], weights: list[float], reference: float = -30.0) -> MicroBatch:
    constant_B = torch.full((len(pairs),), reference, dtype=torch.float64)
    return MicroBatch(pairs, torch.tensor(weights), constant_B, constant_B - 1)


def take(
    engine: PlainEngine,
    batches: list[MicroBatch],
    total_weight: float,
    loss: LossSettings = DPO,
):
    return train_step(
        engine,
        batches,
        step=1,
        epoch=0.5,
        beta=0.1,
        loss=loss,
        rate=0.1,
        total_weight=total_weight,
        world=1,
    )


def weights_of(engine: PlainEngine) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainable(engine.module).values()])


def test_eight_micro_batches_of_one_are_one_of_eight(tiny_llava, encoded):
    weights = [1.0, 2.0, 1.0, 0.5, 0.0, 1.0, 3.0, 1.0]
    whole, parts = engine_of(tiny_llava, 1), engine_of(tiny_llava, 8)
    start = weights_of(whole)
    one = take(whole, [micro(encoded, weights)], sum(weights))
    eight = take(
        parts, [micro([p], [w]) for p, w in zip(encoded, weights, strict=True)], sum(weights)
    )
    assert (whole.updates, parts.updates) == (1, 1)
    assert not torch.equal(start, weights_of(whole))
    torch.testing.assert_close(weights_of(whole), weights_of(parts), rtol=0, atol=1e-12)
    assert one.loss == pytest.approx(eight.loss, abs=1e-12)
    assert one.grad_norm == pytest.approx(eight.grad_norm, rel=1e-9)
    assert one.accuracy == pytest.approx(eight.accuracy)


def test_a_weight_scales_a_pairs_loss_and_gradient(tiny_llava, encoded):
    """Plain SGD moves by the gradient: of weights 1 and 1/4 by (first + second / 4) / (5/4)."""

    def move(pairs: list[EncodedPair], weights: list[float]) -> tuple[float, torch.Tensor]:
        engine = engine_of(tiny_llava, 1)
        start = weights_of(engine)
        loss = take(engine, [micro(pairs, weights)], sum(weights)).loss
        return loss, weights_of(engine) - start

    (first, first_move), (second, second_move) = (move([pair], [1.0]) for pair in encoded[:2])
    both, both_move = move(encoded[:2], [1.0, 0.25])
    assert abs(first - second) > 1e-3
    assert both == pytest.approx((first + second / 4) / 1.25, abs=1e-12)
    expected = (first_move + second_move / 4) / 1.25
    assert both_move.abs().max() > 1e-3
    # The model's norms compute in float32, and round what is scaled otherwise.
    torch.testing.assert_close(both_move, expected, rtol=0, atol=1e-8)


def test_a_filler_of_weight_0_changes_nothing(tiny_llava, encoded):
    plain, filled = engine_of(tiny_llava, 1), engine_of(tiny_llava, 1)
    first = take(plain, [micro(encoded[:3], [1.0] * 3)], 3.0)
    second = take(filled, [micro([*encoded[:3], encoded[0]], [1.0] * 3 + [0.0])], 3.0)
    torch.testing.assert_close(weights_of(plain), weights_of(filled), rtol=0, atol=1e-12)
    assert first.loss == pytest.approx(second.loss, abs=1e-12)
    assert first.chosen_logp == pytest.approx(second.chosen_logp)


def test_a_loss_that_is_not_finite_stops_before_the_update(tiny_llava, encoded):
    engine = engine_of(tiny_llava, 2)
    start = weights_of(engine)
    good, bad = micro(encoded[:2], [1.0, 1.0]), micro(encoded[2:4], [1.0, 1.0], math.nan)
    with pytest.raises(TrainingError, match=r"step 1: .* 2 pairs \(r002, r003\)"):
        take(engine, [good, bad], 4.0)
    assert torch.equal(start, weights_of(engine))
    assert engine.updates == 0


def test_the_learning_rate_warms_up_and_falls():
    rates = [learning_rate(step, 100, 1e-3, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == pytest.approx(1e-3)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[55] == pytest.approx(5e-4)
    assert 0 < rates[99] < 1e-5
    assert learning_rate(0, 1, 1e-3, 0.0) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "loss",
    [
        LossSettings(kind="ipo"),
        LossSettings(label_smoothing=0.1, length_normalised=True),
        LossSettings(sft_weight=0.5),
    ],
    ids=["ipo", "smooth-per-token", "sft"],
)
def test_each_loss_reaches_the_step_with_its_token_counts(tiny_llava, encoded, loss):
    weights = [1.0, 2.0, 0.0, 1.0]
    whole, parts = engine_of(tiny_llava, 1), engine_of(tiny_llava, 4)
    with torch.no_grad():
        chosen_B, rejected_B = whole(encoded[:4])
    batch = micro(encoded[:4], weights)
    expected = dpo_loss(
        *(chosen_B, rejected_B, batch.reference_chosen_B, batch.reference_rejected_B),
        beta=0.1,
        settings=loss,
        chosen_tokens_B=torch.tensor([len(pair.chosen_C) for pair in encoded[:4]]),
        rejected_tokens_B=torch.tensor([len(pair.rejected_R) for pair in encoded[:4]]),
        weights_B=torch.tensor(weights),
    )
    one = take(whole, [batch], 4.0, loss)
    singles = [micro([p], [w]) for p, w in zip(encoded[:4], weights, strict=True)]
    four = take(parts, singles, 4.0, loss)
    assert one.loss == pytest.approx(expected.loss.item(), abs=1e-10)
    assert four.loss == pytest.approx(one.loss, abs=1e-10)
    torch.testing.assert_close(weights_of(whole), weights_of(parts), rtol=0, atol=1e-10)


def test_a_gradient_that_is_not_finite_stops_the_run(tiny_llava, encoded):
    engine = engine_of(tiny_llava, 1)
    start = weights_of(engine)
    next(iter(trainable(engine.module).values())).register_hook(lambda grad: grad * math.inf)
    with pytest.raises(TrainingError, match="step 1: the gradient is not finite"):
        take(engine, [micro(encoded[:2], [1.0, 1.0])], 2.0)
    assert torch.equal(start, weights_of(engine))


def test_a_step_reports_what_one_watches(tiny_llava, encoded):
    engine = engine_of(tiny_llava, 1)
    with torch.no_grad():
        chosen_B, _ = engine(encoded[:2])
    metrics = take(engine, [micro(encoded[:2], [1.0, 3.0])], 4.0)
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert metrics.chosen_logp == pytest.approx(float(weights @ chosen_B.double()), abs=1e-9)
    assert metrics.chosen_change == pytest.approx(metrics.chosen_logp + 30, abs=1e-9)
    assert metrics.chosen_reward == pytest.approx(0.1 * metrics.chosen_change, abs=1e-9)
    assert metrics.peak_memory_bytes > 50 * 2**20
    assert metrics.tokens_per_s > 0

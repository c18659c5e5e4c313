"""The other losses of a pair: by hand, and in float64 against formulas written another way."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sima_ray.config import LossSettings
from sima_ray.loss import DpoLoss, chosen_nll, dpo_loss, ipo_loss, sigmoid_loss, smoothed

IPO = LossSettings(kind="ipo")
SMOOTH = LossSettings(label_smoothing=0.25)
PER_TOKEN = LossSettings(length_normalised=True)
SFT = LossSettings(sft_weight=2.0)
KINDS = [
    LossSettings(kind=kind, label_smoothing=smoothing, length_normalised=normalised, sft_weight=sft)
    for kind, smoothing, normalised, sft in product(
        ("sigmoid", "ipo"), (0.0, 0.2), (False, True), (0.0, 0.7)
    )
]
LOG3 = math.log(3)


def tensor(*values: float, requires_grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=requires_grad)


def by_hand(settings: LossSettings, beta: float = 1.0) -> tuple[DpoLoss, float, float]:
    """The example of `dpo_loss`: policy 3/4 and 1/4, reference 1/2 and 1/2; loss and its two derivatives."""
    chosen, rejected = (tensor(math.log(p)).clone().requires_grad_() for p in (3 / 4, 1 / 4))
    half = tensor(math.log(1 / 2))
    one = tensor(1.0)
    result = dpo_loss(
        *(chosen, rejected, half, half),
        beta=beta,
        settings=settings,
        chosen_tokens_B=one,
        rejected_tokens_B=2 * one,
    )
    result.loss.backward()
    assert chosen.grad is not None and rejected.grad is not None
    return result, chosen.grad.item(), rejected.grad.item()


def test_ipo_by_hand() -> None:
    # beta = 1/2: h = log 3, the target 1/(2 · 1/2) = 1; d(h − 1)²/dh = 2 (h − 1).
    result, chosen, rejected = by_hand(IPO, beta=0.5)
    assert result.loss.item() == pytest.approx((LOG3 - 1) ** 2, abs=1e-12)
    assert chosen == pytest.approx(2 * (LOG3 - 1), abs=1e-12)
    assert rejected == pytest.approx(-2 * (LOG3 - 1), abs=1e-12)
    assert result.margins_B.item() == pytest.approx(LOG3 / 2, abs=1e-12)
    assert ipo_loss(tensor(0.5), 1.0).item() == 0  # h at its target


def test_smoothing_by_hand() -> None:
    # sigmoid(log 3) = 3/4 = 1 − ε: the lowest value, log 4 − 3/4 log 3, and no slope.
    result, chosen, rejected = by_hand(SMOOTH)
    assert result.loss.item() == pytest.approx(math.log(4) - 0.75 * LOG3, abs=1e-12)
    assert (chosen, rejected) == pytest.approx((0, 0), abs=1e-12)


def test_length_normalisation_by_hand() -> None:
    # Log ratios log(3/2) over 1 token and −log 2 over 2: margin log(3/2) + log(2)/2 = log(3/√2).
    result, chosen, rejected = by_hand(PER_TOKEN)
    odds = 3 / math.sqrt(2)
    assert result.loss.item() == pytest.approx(math.log(1 + 1 / odds), abs=1e-12)
    assert chosen == pytest.approx(-1 / (1 + odds), abs=1e-12)
    assert rejected == pytest.approx(0.5 / (1 + odds), abs=1e-12)
    assert result.rejected_rewards_B.item() == pytest.approx(-math.log(2) / 2, abs=1e-12)


def test_sft_by_hand() -> None:
    # log(4/3) of DPO, and 2 · log(4/3) for the chosen token's probability of 3/4.
    result, chosen, rejected = by_hand(SFT)
    assert result.loss.item() == pytest.approx(3 * math.log(4 / 3), abs=1e-12)
    assert chosen == pytest.approx(-1 / 4 - 2, abs=1e-12)
    assert rejected == pytest.approx(1 / 4, abs=1e-12)
    two = chosen_nll(tensor(math.log(1 / 2) + math.log(1 / 8)), torch.tensor([2]))
    assert two.item() == pytest.approx(2 * math.log(2), abs=1e-12)


def plain(
    row: tuple[float, float, float, float], lengths: tuple[int, int], beta: float, s: LossSettings
) -> float:
    """One pair's loss: ratios of probabilities first, logarithms of Bradley-Terry odds after."""
    c, r, reference_c, reference_r = row
    n, m = lengths if s.length_normalised else (1, 1)
    h = (c / n - r / m) - (reference_c / n - reference_r / m)

    def of(h: float) -> float:
        if s.kind == "ipo":  # expanded, so that nothing is subtracted twice in the same way
            return h * h - h / beta + 1 / (4 * beta * beta)
        return math.log1p(math.exp(-abs(beta * h))) + max(0.0, -beta * h)

    mixed = of(h) - s.label_smoothing * (of(h) - of(-h))
    return mixed - s.sft_weight * c / lengths[0]


logps = st.floats(-60, 0)
count = st.integers(1, 40)


@given(
    st.lists(
        st.tuples(
            st.tuples(logps, logps, logps, logps), st.tuples(count, count), st.floats(0.1, 3)
        ),
        min_size=1,
        max_size=6,
    ),
    st.floats(0.05, 2),
    st.sampled_from(KINDS),
)
def test_equals_an_independent_formula(rows, beta: float, settings: LossSettings) -> None:
    columns = [tensor(*column) for column in zip(*(row for row, _, _ in rows), strict=True)]
    tokens = [torch.tensor(side) for side in zip(*(lengths for _, lengths, _ in rows), strict=True)]
    weights = [weight for _, _, weight in rows]
    each = [plain(row, lengths, beta, settings) for row, lengths, _ in rows]
    result = dpo_loss(
        *columns,
        beta=beta,
        settings=settings,
        chosen_tokens_B=tokens[0],
        rejected_tokens_B=tokens[1],
        weights_B=tensor(*weights),
    )
    expected = sum(w * loss for w, loss in zip(weights, each, strict=True)) / sum(weights)
    assert result.losses_B.tolist() == pytest.approx(each, rel=1e-9, abs=1e-9)
    assert result.loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: "-".join(map(str, dict(s).values())))
def test_the_derivative_is_the_slope(settings: LossSettings) -> None:
    policy = tensor(-7.0, -5.0, -20.0, -9.0, requires_grad=True)

    def loss(policy: Tensor) -> Tensor:
        return dpo_loss(
            policy[:2],
            policy[2:],
            tensor(-8.0, -4.0),
            tensor(-19.0, -8.5),
            beta=0.3,
            settings=settings,
            chosen_tokens_B=torch.tensor([3, 5]),
            rejected_tokens_B=torch.tensor([7, 2]),
            weights_B=tensor(1.0, 0.25),
        ).loss

    assert torch.autograd.gradcheck(loss, policy)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("settings", KINDS, ids=lambda s: "-".join(map(str, dict(s).values())))
def test_weight_0_leaves_a_pair_out_of_each(settings: LossSettings, bad: float) -> None:
    policy = tensor(-1.0, bad, requires_grad=True)

    def result(policy: Tensor, rows: slice) -> DpoLoss:
        zero = torch.zeros_like(policy)
        tokens = torch.tensor([3, 4])[rows]
        return dpo_loss(
            *(policy, zero, zero, zero),
            beta=1.0,
            settings=settings,
            chosen_tokens_B=tokens,
            rejected_tokens_B=tokens,
            weights_B=tensor(2.0, 0.0)[rows],
        )

    both, alone = result(policy, slice(2)), result(policy[:1], slice(1))
    both.loss.backward()
    assert both.loss.item() == alone.loss.item()
    assert both.losses_B[1] == 0
    assert policy.grad is not None and policy.grad[1] == 0 and policy.grad.isfinite().all()


def test_infinities_and_nan_of_each() -> None:
    zero, inf, nan = tensor(0.0), tensor(math.inf), tensor(math.nan)
    for settings in (SMOOTH, IPO):
        for margin in (inf, -inf):
            assert dpo_loss(margin, zero, zero, zero, beta=0.1, settings=settings).loss == math.inf
        assert dpo_loss(nan, zero, zero, zero, beta=0.1, settings=settings).loss.isnan()
    assert smoothed(sigmoid_loss(inf), sigmoid_loss(-inf), 0.0) == 0


def test_token_counts_are_asked_for_where_needed() -> None:
    zero = tensor(0.0)
    for settings, name in ((PER_TOKEN, "length_normalised"), (SFT, "sft_weight")):
        with pytest.raises(ValueError, match=f"{name} needs the number of tokens"):
            dpo_loss(zero, zero, zero, zero, beta=0.1, settings=settings)


def test_token_counts_change_no_default() -> None:
    row = tuple(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)))
    lengths = torch.arange(1, 6)
    with_counts = dpo_loss(*row, beta=0.1, chosen_tokens_B=lengths, rejected_tokens_B=lengths)
    assert torch.equal(with_counts.losses_B, dpo_loss(*row, beta=0.1).losses_B)

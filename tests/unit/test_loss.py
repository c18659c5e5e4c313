"""The DPO loss against hand computations and an independent one in plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sima_ray.loss import dpo_loss, token_logps

logps = st.floats(-60, 0)
LOG2 = math.log(2)


def tensor(*values: float, requires_grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=requires_grad)


def test_two_tokens_by_hand() -> None:
    # The docstring's example: policy 3/4 and 1/4, reference 1/2 and 1/2, so the loss is log(4/3).
    chosen, rejected = (tensor(math.log(p)).clone().requires_grad_() for p in (3 / 4, 1 / 4))
    half = tensor(math.log(1 / 2))
    result = dpo_loss(chosen, rejected, half, half, beta=1.0)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(math.log(4 / 3), abs=1e-12)
    assert result.margins_B.item() == pytest.approx(math.log(3), abs=1e-12)
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-1 / 4, abs=1e-12)
    assert rejected.grad.item() == pytest.approx(1 / 4, abs=1e-12)
    assert result.accuracy.item() == 1.0


def test_from_logits_to_loss_by_hand() -> None:
    # Logits (log 3, 0) are probabilities 3/4 and 1/4; with beta 1/2, sigmoid(log √3) = √3/(1+√3).
    logits = tensor(math.log(3), 0.0).repeat(2, 1)
    chosen, rejected = token_logps(logits, torch.tensor([0, 1]))
    half = tensor(math.log(1 / 2))
    result = dpo_loss(chosen[None], rejected[None], half, half, beta=0.5)
    assert result.loss.item() == pytest.approx(math.log(1 + 1 / math.sqrt(3)), abs=1e-12)


@given(st.lists(st.tuples(logps, logps), min_size=1, max_size=8), st.floats(0.01, 5))
def test_log_2_where_policy_is_reference(pairs: list[tuple[float, float]], beta: float) -> None:
    chosen, rejected = (tensor(*side) for side in zip(*pairs, strict=True))
    result = dpo_loss(chosen, rejected, chosen, rejected, beta=beta)
    assert result.loss.item() == pytest.approx(LOG2, abs=1e-12)
    assert result.margins_B.abs().max() == 0
    assert result.accuracy == 0


def plain_loss(row: tuple[float, float, float, float], beta: float) -> float:
    """−log of the Bradley-Terry probability exp(r_c) / (exp(r_c) + exp(r_r))."""
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = row
    chosen = beta * policy_chosen - beta * reference_chosen
    rejected = beta * policy_rejected - beta * reference_rejected
    top = max(chosen, rejected)
    return top + math.log(math.exp(chosen - top) + math.exp(rejected - top)) - chosen


@given(
    st.lists(
        st.tuples(st.tuples(logps, logps, logps, logps), st.floats(0.1, 3)), min_size=1, max_size=8
    ),
    st.floats(0.01, 2),
)
def test_equals_an_independent_computation(
    rows: list[tuple[tuple[float, float, float, float], float]], beta: float
) -> None:
    columns = [tensor(*column) for column in zip(*(row for row, _ in rows), strict=True)]
    weights = [weight for _, weight in rows]
    each = [plain_loss(row, beta) for row, _ in rows]
    expected = sum(w * loss for w, loss in zip(weights, each, strict=True)) / sum(weights)
    result = dpo_loss(*columns, beta=beta, weights_B=tensor(*weights))
    assert result.loss.item() == pytest.approx(expected, abs=1e-10)
    assert result.losses_B.tolist() == pytest.approx(each, abs=1e-10)
    unweighted = dpo_loss(*columns, beta=beta).loss.item()
    assert unweighted == pytest.approx(sum(each) / len(each), abs=1e-10)


@given(logps, logps, logps, logps, st.floats(0.01, 2))
def test_a_step_downhill_lowers_the_rejected_token(
    chosen: float, rejected: float, ref_chosen: float, ref_rejected: float, beta: float
) -> None:
    policy_chosen = tensor(chosen, requires_grad=True)
    policy_rejected = tensor(rejected, requires_grad=True)
    result = dpo_loss(
        policy_chosen, policy_rejected, tensor(ref_chosen), tensor(ref_rejected), beta=beta
    )
    result.loss.backward()
    assert policy_chosen.grad is not None and policy_rejected.grad is not None
    assert policy_chosen.grad.item() < 0 < policy_rejected.grad.item()
    assert policy_chosen.grad.item() == -policy_rejected.grad.item()


def test_the_rejected_token_falls_and_not_the_top_one() -> None:
    # The rejected token is the model's third choice; it is its own log-probability that must fall.
    torch.manual_seed(0)
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]], requires_grad=True)
    labels = torch.tensor([1, 2])
    reference = token_logps(logits, labels).detach()
    before = token_logps(logits, labels)
    dpo_loss(before[:1], before[1:], reference[:1], reference[1:], beta=0.5).loss.backward()
    assert logits.grad is not None
    after = token_logps(logits.detach() - 0.1 * logits.grad, labels)
    assert after[0] > before[0]
    assert after[1] < before[1]


def test_swapping_the_sides_mirrors_the_rewards() -> None:
    a, b, c, d = (tensor(-3.0, -1.0), tensor(-2.0, -9.0), tensor(-4.0, -4.0), tensor(-5.0, -5.0))
    straight, swapped = dpo_loss(a, b, c, d, beta=0.3), dpo_loss(b, a, d, c, beta=0.3)
    assert torch.equal(straight.margins_B, -swapped.margins_B)
    assert torch.equal(straight.chosen_rewards_B, swapped.rejected_rewards_B)
    assert straight.accuracy + swapped.accuracy == 1
    assert not straight.margins_B.requires_grad


def test_extreme_margins_stay_finite() -> None:
    zero = tensor(0.0, 0.0)
    policy = tensor(1e4, -1e4, requires_grad=True)
    result = dpo_loss(policy, zero, zero, zero, beta=1.0)
    result.loss.backward()
    assert result.losses_B.tolist() == [0.0, 1e4]
    assert policy.grad is not None and policy.grad.tolist() == [0.0, -0.5]


def test_infinities_and_nan() -> None:
    zero = tensor(0.0)
    inf, nan = tensor(math.inf), tensor(math.nan)
    assert dpo_loss(zero, -inf, zero, zero, beta=0.1).loss == 0  # rejected is impossible
    assert dpo_loss(-inf, zero, zero, zero, beta=0.1).loss == math.inf
    assert dpo_loss(-inf, zero, -inf, zero, beta=0.1).loss.isnan()
    assert dpo_loss(nan, zero, zero, zero, beta=0.1).loss.isnan()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weight_0_leaves_a_pair_out(bad: float) -> None:
    zero = tensor(0.0, 0.0)
    policy = tensor(-1.0, bad, requires_grad=True)
    result = dpo_loss(policy, zero, zero, zero, beta=1.0, weights_B=tensor(2.0, 0.0))
    result.loss.backward()
    assert result.loss.item() == pytest.approx(math.log(1 + math.e), abs=1e-12)
    assert policy.grad is not None and policy.grad[1] == 0 and policy.grad.isfinite().all()
    assert dpo_loss(zero, zero, zero, zero, beta=1.0, weights_B=zero).loss.isnan()


def test_low_precision_is_raised() -> None:
    half = torch.tensor([-100.0, -3.0], dtype=torch.bfloat16)
    result = dpo_loss(half, half, half, half, beta=0.1)
    assert result.loss.dtype == torch.float32
    logits = torch.randn(4, 50).bfloat16()
    labels = torch.tensor([0, 7, 49, 7])
    found = token_logps(logits, labels)
    assert found.dtype == torch.float32
    exact = token_logps(logits.double(), labels)
    assert exact.dtype == torch.float64
    assert torch.allclose(found.double(), exact, atol=1e-5)


def test_token_logps_are_normalised() -> None:
    torch.manual_seed(0)
    logits = 30 * torch.randn(1, 20, dtype=torch.float64)
    each = token_logps(logits.expand(20, 20), torch.arange(20))
    assert each.exp().sum().item() == pytest.approx(1, abs=1e-12)
    shifted = token_logps(logits.expand(20, 20) + 1000, torch.arange(20))
    assert torch.allclose(each, shifted, atol=1e-9)

"""The losses of preference tuning and the token log-probabilities that they are made of.

Dimensions: B pairs, N tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sima_ray.config import LossSettings

_SIGMOID = LossSettings()


@dataclass(frozen=True, slots=True)
class DpoLoss:
    """The loss of a batch of pairs, and what to watch while it falls.

    Attributes:
        loss: Scalar, differentiable: the weighted mean of `losses_B`.
        losses_B: Each pair's own loss, unweighted, differentiable; 0 is no loss, and what a pair of weight 0 has.
        chosen_rewards_B, rejected_rewards_B: beta × (policy − reference log-probability), detached; of
            log-probabilities per token where the settings normalise by length.
        margins_B: Chosen minus rejected reward, detached.
        accuracy: Share of the pairs whose margin is above 0; detached scalar.
    """

    loss: Tensor
    losses_B: Tensor
    chosen_rewards_B: Tensor
    rejected_rewards_B: Tensor
    margins_B: Tensor
    accuracy: Tensor


def dpo_loss(
    policy_chosen_logps_B: Tensor,
    policy_rejected_logps_B: Tensor,
    reference_chosen_logps_B: Tensor,
    reference_rejected_logps_B: Tensor,
    *,
    beta: float,
    settings: LossSettings = _SIGMOID,
    chosen_tokens_B: Tensor | None = None,
    rejected_tokens_B: Tensor | None = None,
    weights_B: Tensor | None = None,
) -> DpoLoss:
    """Direct preference optimisation; by default with the sigmoid loss (Rafailov et al. 2023, equation 7).

        reward = beta · (policy − reference), of either side
        margin = chosen reward − rejected reward
        loss   = −log sigmoid(margin)

    By hand, for answers of one token and a vocabulary of two, {a, b}, a chosen and b rejected: let
    the policy say a with probability 3/4 and the reference with 1/2. Then the margin is beta ·
    (log(3/4 ÷ 1/2) − log(1/4 ÷ 1/2)) = beta · log 3. With beta = 1, sigmoid(log 3) = 3/4, and so
    the loss is log(4/3). Its derivative by the margin is −(1 − 3/4) = −1/4: by the chosen
    log-probability −1/4, by the rejected one +1/4, so that a step downhill raises the first and
    lowers the second. Where policy = reference the margin is 0 and the loss log 2.

    `settings` choose another loss of the margin (`ipo_loss`), soften the labels (`smoothed`), divide both
    log-probabilities of a response by its tokens (as Meng et al. 2024, SimPO, do; their loss has no
    reference, this one keeps it), and add `sft_weight` × `chosen_nll` (Pang et al. 2024, iterative RPO).

    Computed in float32 at least. A NaN stays NaN. A margin of +inf costs 0 and one of −inf costs inf;
    with smoothing or IPO either costs inf. A pair of weight 0 is left out of loss and gradients, whatever
    its log-probabilities are.

    Args:
        policy_chosen_logps_B, policy_rejected_logps_B: Sum of each response's token
            log-probabilities.
        reference_chosen_logps_B, reference_rejected_logps_B: The same under the reference policy.
        beta: Inverse temperature: how dear it is to leave the reference.
        settings: Which loss.
        chosen_tokens_B, rejected_tokens_B: Tokens of each response, the end included, at least 1;
            needed by `length_normalised` and `sft_weight` alone.
        weights_B: How much each pair counts, not negative; None counts all alike. If all are 0
            there is no mean, and the loss is NaN.

    Raises:
        ValueError: Settings that need token counts, without them.
    """
    dtype = torch.promote_types(policy_chosen_logps_B.dtype, torch.float32)
    chosen_B, rejected_B, reference_chosen_B, reference_rejected_B = (
        logps_B.to(dtype)
        for logps_B in (
            policy_chosen_logps_B,
            policy_rejected_logps_B,
            reference_chosen_logps_B,
            reference_rejected_logps_B,
        )
    )
    nll_B = None
    if settings.sft_weight:
        nll_B = chosen_nll(chosen_B, _needed(chosen_tokens_B, "sft_weight"))
    if settings.length_normalised:
        chosen_tokens_B = _needed(chosen_tokens_B, "length_normalised").to(chosen_B)
        rejected_tokens_B = _needed(rejected_tokens_B, "length_normalised").to(rejected_B)
        chosen_B, reference_chosen_B = (x / chosen_tokens_B for x in (chosen_B, reference_chosen_B))
        rejected_B, reference_rejected_B = (
            x / rejected_tokens_B for x in (rejected_B, reference_rejected_B)
        )
    chosen_rewards_B = beta * (chosen_B - reference_chosen_B)
    rejected_rewards_B = beta * (rejected_B - reference_rejected_B)
    margins_B = chosen_rewards_B - rejected_rewards_B
    if weights_B is None:
        losses_B = _losses(margins_B, nll_B, beta, settings)
        loss = losses_B.mean()
    else:
        weights_B = weights_B.to(margins_B)
        counts_B = weights_B > 0
        # Masked before the loss: masking after it alone would still send a NaN backwards.
        counted_B = torch.where(counts_B, margins_B, 0.0)
        nll_B = None if nll_B is None else torch.where(counts_B, nll_B, 0.0)
        losses_B = torch.where(counts_B, _losses(counted_B, nll_B, beta, settings), 0.0)
        loss = (weights_B * losses_B).sum() / weights_B.sum()
    return DpoLoss(
        loss=loss,
        losses_B=losses_B,
        chosen_rewards_B=chosen_rewards_B.detach(),
        rejected_rewards_B=rejected_rewards_B.detach(),
        margins_B=margins_B.detach(),
        accuracy=(margins_B.detach() > 0).to(dtype).mean(),
    )


def sigmoid_loss(margins_B: Tensor) -> Tensor:
    """−log sigmoid(margin): log 2 at 0, −margin far below it, 0 far above."""
    return -F.logsigmoid(margins_B)


def ipo_loss(margins_B: Tensor, beta: float) -> Tensor:
    """(h − 1 / 2β)² with h = margin ÷ beta (Azar et al. 2023, equation 17; their τ is beta).

    By hand: with beta = 1/2 and a margin of log 3 ÷ 2, h = log 3 and the loss (log 3 − 1)². It stops
    pulling at h = 1 / 2β, where the sigmoid loss never does. h is made of sums over tokens, as in the
    paper; with `length_normalised`, of means, which is how its authors' experiments were run.
    """
    return (margins_B / beta - 1 / (2 * beta)) ** 2


def smoothed(losses_B: Tensor, mirrored_B: Tensor, label_smoothing: float) -> Tensor:
    """(1 − ε) × the loss + ε × the loss with the sides swapped (Mitchell 2023, "conservative DPO").

    For labels of which a share ε is wrong. By hand, for margin log 3 and ε = 1/4: 3/4 · log(4/3) + 1/4 ·
    log 4 = log 4 − 3/4 · log 3; this is the lowest value that ε = 1/4 allows, since sigmoid(log 3) = 1 − ε.
    """
    if label_smoothing == 0:
        return losses_B  # 0 × inf would be NaN
    return (1 - label_smoothing) * losses_B + label_smoothing * mirrored_B


def chosen_nll(policy_chosen_logps_B: Tensor, chosen_tokens_B: Tensor) -> Tensor:
    """Negative log-likelihood of the chosen response, nats per token.

    By hand: two tokens of probability 1/2 and 1/8 cost (log 2 + log 8) ÷ 2 = 2 log 2.
    """
    return -policy_chosen_logps_B / chosen_tokens_B.to(policy_chosen_logps_B)


def _losses(margins_B: Tensor, nll_B: Tensor | None, beta: float, settings: LossSettings) -> Tensor:
    def of_margin(margins_B: Tensor) -> Tensor:
        return ipo_loss(margins_B, beta) if settings.kind == "ipo" else sigmoid_loss(margins_B)

    losses_B = smoothed(of_margin(margins_B), of_margin(-margins_B), settings.label_smoothing)
    return losses_B if nll_B is None else losses_B + settings.sft_weight * nll_B


def _needed(tokens_B: Tensor | None, setting: str) -> Tensor:
    if tokens_B is None:
        raise ValueError(f"{setting} needs the number of tokens of each response")
    return tokens_B


def token_logps(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Log-probability of each label under the logits that predict it.

    Computed in float32 at least: in bfloat16 the log-normaliser alone is wrong by more than DPO's
    margins.

    Args:
        logits_NV: One row of logits a response token, already shifted (row n predicts labels_N[n]).
        labels_N: Token ids, int64, all in the vocabulary.

    Returns:
        logps_N, natural logarithm; a response's log-probability is the sum over its tokens.
    """
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    return -F.cross_entropy(logits_NV.to(dtype), labels_N, reduction="none")

"""The DPO loss and the token log-probabilities that it is made of.

Dimensions: B pairs, N tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DpoLoss:
    """The loss of a batch of pairs, and what to watch while it falls.

    Attributes:
        loss: Scalar, differentiable: the weighted mean of `losses_B`.
        losses_B: Each pair's own loss, unweighted, differentiable; 0 is no loss.
        chosen_rewards_B, rejected_rewards_B: beta × (policy − reference log-probability), detached.
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
    weights_B: Tensor | None = None,
) -> DpoLoss:
    """Direct preference optimisation with the sigmoid loss (Rafailov et al. 2023, equation 7).

        reward = beta · (policy − reference), of either side
        margin = chosen reward − rejected reward
        loss   = −log sigmoid(margin)

    By hand, for answers of one token and a vocabulary of two, {a, b}, a chosen and b rejected: let
    the policy say a with probability 3/4 and the reference with 1/2. Then the margin is beta ·
    (log(3/4 ÷ 1/2) − log(1/4 ÷ 1/2)) = beta · log 3. With beta = 1, sigmoid(log 3) = 3/4, and so
    the loss is log(4/3). Its derivative by the margin is −(1 − 3/4) = −1/4: by the chosen
    log-probability −1/4, by the rejected one +1/4, so that a step downhill raises the first and
    lowers the second. Where policy = reference the margin is 0 and the loss log 2.

    Computed in float32 at least. A margin of +inf costs 0 and one of −inf costs inf; a NaN stays
    NaN. A pair of weight 0 is left out of loss and gradients, whatever its log-probabilities are.

    Args:
        policy_chosen_logps_B, policy_rejected_logps_B: Sum of each response's token
            log-probabilities.
        reference_chosen_logps_B, reference_rejected_logps_B: The same under the reference policy.
        beta: Inverse temperature: how dear it is to leave the reference.
        weights_B: How much each pair counts, not negative; None counts all alike. If all are 0
            there is no mean, and the loss is NaN.
    """
    dtype = torch.promote_types(policy_chosen_logps_B.dtype, torch.float32)
    chosen_rewards_B = beta * (policy_chosen_logps_B.to(dtype) - reference_chosen_logps_B.to(dtype))
    rejected_rewards_B = beta * (
        policy_rejected_logps_B.to(dtype) - reference_rejected_logps_B.to(dtype)
    )
    margins_B = chosen_rewards_B - rejected_rewards_B
    losses_B = -F.logsigmoid(margins_B)
    if weights_B is None:
        loss = losses_B.mean()
    else:
        weights_B = weights_B.to(margins_B)
        # Masked before the sigmoid: masking after it would still send a NaN backwards.
        counted_B = torch.where(weights_B > 0, margins_B, torch.zeros_like(margins_B))
        loss = -(weights_B * F.logsigmoid(counted_B)).sum() / weights_B.sum()
    return DpoLoss(
        loss=loss,
        losses_B=losses_B,
        chosen_rewards_B=chosen_rewards_B.detach(),
        rejected_rewards_B=rejected_rewards_B.detach(),
        margins_B=margins_B.detach(),
        accuracy=(margins_B.detach() > 0).to(dtype).mean(),
    )


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

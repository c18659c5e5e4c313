"""How sure a critic is: the probability of a preference, from the log-probabilities of the two verdicts.

Both functions are exact mirrors: what they give for one response and for the other adds up to 1, to the last bit.
"""

import math
from collections.abc import Iterable, Sequence

from sima_ray.critic.verdict import parse_verdict
from sima_ray.records import Order


def probability_of(order: Order, raw: str, alternatives: Sequence[float] | None) -> float | None:
    """The probability that candidate 0 is better: a softmax over the two verdicts.

    Args:
        order: Which candidate was shown first.
        raw: The critic's whole text.
        alternatives: Log-probabilities, in nats, of "1" and "2" where the critic last wrote one of them.

    Returns:
        None without log-probabilities, without a verdict, and where a 1 or a 2 follows the verdict: the
        log-probabilities are then not the verdict's.
    """
    if alternatives is None or parse_verdict(raw)[1] is None:
        return None
    after = raw.rpartition("[[")[2][1:]
    if "1" in after or "2" in after:
        return None
    first, second = alternatives
    margin = first - second if order == "12" else second - first
    return None if math.isnan(margin) else _sigmoid(margin)


def mean_probability(probabilities: Iterable[float | None]) -> float | None:
    """The mean over both orders; None unless both are known."""
    known = [p for p in probabilities if p is not None]
    if len(known) != 2:
        return None
    mean = sum(known) / 2
    # The lower half is made from the upper one, so that rounding cannot tell the responses apart.
    return mean if mean >= 0.5 else 1 - sum(1 - p for p in known) / 2


def _sigmoid(margin: float) -> float:
    upper = 1 / (1 + math.exp(-abs(margin)))
    return upper if margin >= 0 else 1 - upper

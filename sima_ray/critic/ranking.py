"""From comparisons of all pairs to a ranking of more than two responses."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two of several responses, by their indices.

    Attributes:
        first, second: The indices, from 0.
        winner: One of them; None is a tie, or no verdict.
        probability: That `first` is better; None where that is not known.
    """

    first: int
    second: int
    winner: int | None
    probability: float | None = None


def rank(responses: int, comparisons: Sequence[Comparison]) -> list[int]:
    """The indices of the responses, best first.

    By wins, a tie being half a win for both; then by the sum of the probabilities of being better, one that is
    not known being a half; then in the order that they were given in.

    Args:
        responses: How many there are.
        comparisons: Each pair once, in any sequence.
    """
    wins = [0.0] * responses
    probabilities: list[list[float]] = [[] for _ in range(responses)]
    for c in comparisons:
        p = 0.5 if c.probability is None else c.probability
        for index, probability in ((c.first, p), (c.second, 1 - p)):
            wins[index] += 0.5 if c.winner is None else float(c.winner == index)
            probabilities[index].append(probability)
    # fsum: the sum is the same in whatever sequence the comparisons come.
    return sorted(range(responses), key=lambda i: (-wins[i], -fsum(probabilities[i]), i))


def undisputed(responses: int, comparisons: Sequence[Comparison]) -> int | None:
    """The response that wins every comparison that it is in; None when there is none."""
    for index in range(responses):
        if all(c.winner == index for c in comparisons if index in (c.first, c.second)):
            return index
    return None

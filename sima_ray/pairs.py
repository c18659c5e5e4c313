"""From decided rows to preference pairs: what an inconsistent row is taken for, and which pairs the
length policy leaves out.

Length is counted in words: the pieces of a text between white space. Words need no tokenizer, and
so mean the same for every policy.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from sima_ray.config import PairsConfig
from sima_ray.critic.vote import preferred_candidate
from sima_ray.records import ORDERS, Candidate, Critique, Outcome, PreferencePair, Prompt


def to_pair(
    prompt: Prompt, candidates: Sequence[Candidate], outcome: Outcome, weight: float = 1.0
) -> PreferencePair:
    """The preference pair of a row whose outcome is a preference.

    Args:
        prompt: What was asked.
        candidates: The two responses, in the row's own order.
        outcome: PREFERRED_FIRST or PREFERRED_SECOND.
        weight: Scales the pair's loss.
    """
    assert outcome.is_preference, f"row {prompt.row_id}: {outcome} is not a preference"
    first, second = candidates
    chosen, rejected = (first, second) if outcome is Outcome.PREFERRED_FIRST else (second, first)
    return PreferencePair(
        row_id=prompt.row_id,
        image=prompt.image,
        prompt=prompt.text,
        chosen=chosen.text,
        rejected=rejected.text,
        chosen_from=chosen.kind,
        rejected_from=rejected.kind,
        weight=weight,
        chosen_logp=_logp_to_the_end(chosen),
        rejected_logp=_logp_to_the_end(rejected),
        chosen_tokens=chosen.tokens,
        rejected_tokens=rejected.tokens,
    )


def _logp_to_the_end(candidate: Candidate) -> float | None:
    """The log-probability of a response with its end; None where it was cut, and the end never generated."""
    return candidate.logprob if candidate.finish_reason == "stop" else None


def believed_preference(row_id: str, critiques: Sequence[Critique], seed: int) -> Outcome:
    """The preference that an inconsistent row stands for where it is kept: that of one order.

    Which order is believed is drawn from the seed and the row id alone, each order for half of the
    ids, so that a critic that likes a place does not carry this into the pairs. As the orders
    disagree, it is a fair coin between the candidates.

    Args:
        row_id: The row's.
        critiques: Of both orders, in any sequence, each with a choice.
        seed: The run's.

    Returns:
        PREFERRED_FIRST or PREFERRED_SECOND.
    """
    order = ORDERS[_draw(seed, f"{row_id}\0order")[0] % 2]
    (critique,) = (critique for critique in critiques if critique.order == order)
    candidate = preferred_candidate(critique)
    assert candidate is not None, f"row {row_id}: no choice in order {order}"
    return Outcome.PREFERRED_FIRST if candidate == 0 else Outcome.PREFERRED_SECOND


@dataclass(frozen=True, slots=True)
class PairLengths:
    """The lengths, in words, of a pair's two sides, and the pair's weight."""

    row_id: str
    chosen: int
    rejected: int
    weight: float = 1.0

    @classmethod
    def of(cls, row_id: str, chosen: str, rejected: str, weight: float = 1.0) -> Self:
        """Count the words of two texts."""
        return cls(row_id, count_words(chosen), count_words(rejected), weight)


def count_words(text: str) -> int:
    """Length of a text in words."""
    return len(text.split())


def apply_length_policy(pairs: Iterable[PairLengths], config: PairsConfig, seed: int) -> set[str]:
    """Choose the pairs that do not become training pairs (outcome `length_policy`).

    `max_length_ratio` leaves out pairs whose longer side has more than this many times the words of
    the shorter. `balance` then keeps equally many pairs with a shorter chosen side as with a longer
    one, and all pairs of equal lengths; which of the surplus go depends on the seed and the row ids
    alone, not on the rows' order. It does so for each weight by itself: equally many pairs of
    unequal weights would still teach a length.

    Args:
        pairs: Every pair of the run, or of the round.
        config: The policy.
        seed: Chooses among the surplus.

    Returns:
        The row ids left out.
    """
    pairs = list(pairs)
    left_out: set[str] = set()
    ratio = config.max_length_ratio
    if ratio is not None:
        left_out |= {
            p.row_id for p in pairs if max(p.chosen, p.rejected) > ratio * min(p.chosen, p.rejected)
        }
    if config.length_policy == "balance":
        kept = [p for p in pairs if p.row_id not in left_out]
        for weight in {p.weight for p in kept}:
            left_out |= _surplus([p for p in kept if p.weight == weight], seed)
    return left_out


def draw_earlier(
    row_ids: Iterable[str], share: float, seed: int, earlier: int, number: int
) -> set[str]:
    """Choose the pairs of an earlier round that a later one is trained on, too.

    Each later round draws anew, from the seed, the two rounds and the row ids alone.

    Args:
        row_ids: The pairs to choose from.
        share: Of them, rounded to a whole number of pairs.
        seed: The run's.
        earlier, number: The rounds.
    """
    ranked = sorted(row_ids, key=lambda row_id: _draw(seed, f"{row_id}\0{earlier} in {number}"))
    return set(ranked[: round(share * len(ranked))])


def _surplus(pairs: Sequence[PairLengths], seed: int) -> set[str]:
    """The pairs by which those with a shorter chosen side outnumber the others, or the reverse."""
    shorter = [p.row_id for p in pairs if p.chosen < p.rejected]
    longer = [p.row_id for p in pairs if p.chosen > p.rejected]
    surplus = abs(len(shorter) - len(longer))
    larger = max(shorter, longer, key=len)
    return set(sorted(larger, key=lambda row_id: _draw(seed, row_id))[:surplus])


def _draw(seed: int, row_id: str) -> bytes:
    """A pseudo-random rank of a row that no other row influences."""
    return hashlib.sha256(f"{seed}\0{row_id}".encode()).digest()

"""From decided rows to preference pairs, and which pairs the length policy leaves out.

Length is counted in words: the pieces of a text between white space. Words need no tokenizer, and
so mean the same for every policy.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from sima_ray.config import PairsConfig
from sima_ray.records import Candidate, Outcome, PreferencePair, Prompt


def to_pair(prompt: Prompt, candidates: Sequence[Candidate], outcome: Outcome) -> PreferencePair:
    """The preference pair of a row whose outcome is a preference.

    Args:
        prompt: What was asked.
        candidates: The two responses, in the row's own order.
        outcome: PREFERRED_FIRST or PREFERRED_SECOND.
    """
    assert outcome.is_pair, f"row {prompt.row_id}: {outcome} is not a preference"
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
    )


@dataclass(frozen=True, slots=True)
class PairLengths:
    """The lengths, in words, of a pair's two sides."""

    row_id: str
    chosen: int
    rejected: int

    @classmethod
    def of(cls, row_id: str, chosen: str, rejected: str) -> Self:
        """Count the words of two texts."""
        return cls(row_id, count_words(chosen), count_words(rejected))


def count_words(text: str) -> int:
    """Length of a text in words."""
    return len(text.split())


def apply_length_policy(pairs: Iterable[PairLengths], config: PairsConfig, seed: int) -> set[str]:
    """Choose the pairs that do not become training pairs (outcome `length_policy`).

    `max_length_ratio` leaves out pairs whose longer side has more than this many times the words of
    the shorter. `balance` then keeps equally many pairs with a shorter chosen side as with a longer
    one, and all pairs of equal lengths; which of the surplus go depends on the seed and the row ids
    alone, not on the rows' order.

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
        shorter = [p.row_id for p in kept if p.chosen < p.rejected]
        longer = [p.row_id for p in kept if p.chosen > p.rejected]
        surplus = abs(len(shorter) - len(longer))
        larger = max(shorter, longer, key=len)
        left_out |= set(sorted(larger, key=lambda row_id: _draw(seed, row_id))[:surplus])
    return left_out


def _draw(seed: int, row_id: str) -> bytes:
    """A pseudo-random rank of a row that no other row influences."""
    return hashlib.sha256(f"{seed}\0{row_id}".encode()).digest()

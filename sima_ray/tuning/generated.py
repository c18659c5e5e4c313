"""Reference log-probabilities that came with the pairs, from the engine that wrote the responses.

They are the reference's where the policy that answered is the one that is tuned, in the same precision, and a
response's text gives the same tokens again. The number of tokens tells the latter, a sample that is computed the
former.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sima_ray.records import PreferencePair
from sima_ray.tuning.choice import TOLERANCES
from sima_ray.tuning.dataset import EncodedPair, PairEncoder, UnusablePair
from sima_ray.tuning.forward import PairForward, base_of
from sima_ray.tuning.reference import Given, Reference, reference_of, score

SAMPLE = 16
"""Pairs that are computed, too, before any is believed."""


@dataclass(frozen=True, slots=True)
class Believed:
    """What need not be computed.

    Attributes:
        given: For `reference_pass`; None where all is computed.
        note: Why that is so although it was not asked for.
    """

    given: Given | None = None
    note: str | None = None


def came_with(pair: EncodedPair) -> tuple[float, float] | None:
    """The log-probabilities of (chosen, rejected) that a pair came with, in nats.

    None where one is missing or not finite, or is of another number of tokens than the response has here.
    """
    record = pair.pair
    chosen, rejected = record.chosen_logp, record.rejected_logp
    counts = (record.chosen_tokens, record.rejected_tokens)
    if chosen is None or rejected is None or counts != (len(pair.chosen_C), len(pair.rejected_R)):
        return None
    return (chosen, rejected) if math.isfinite(chosen + rejected) else None


def believe(
    model: Any,
    forward: PairForward,
    encoder: PairEncoder,
    pairs: Sequence[PreferencePair],
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    gather: Callable[[list[Any]], list[Any]] = list,
) -> Believed:
    """Compute a sample of the log-probabilities that came with the pairs, and believe all or none.

    All are believed where none of the sample is further from what is computed, in the mean of its tokens, than two
    ways to compute may be (`TOLERANCES`). Every worker must call this; each does its share of the sample, and all
    come to the same result.

    Args:
        model: With or without adapters; they are switched off here.
        forward: How pairs are scored.
        encoder: Turns pairs into tokens.
        pairs: All of them, in the same order on every worker.
        seed: Draws the sample, with the row ids.
        batch_size: Pairs a forward pass.
        rank, world: This worker, and how many there are.
        gather: The lists of all workers, joined.
    """
    drawn = sample(pairs, seed)
    found = gather(_distances(model, forward, encoder, drawn[rank::world], batch_size))
    if not drawn:
        return Believed(note="no pair came with the log-probabilities of its responses")
    if not found:
        return Believed(
            note=f"in none of {len(drawn)} sampled pairs the responses have as many tokens as were generated"
        )
    dtype = base_of(model).get_input_embeddings().weight.dtype
    distance, row_id = max(found)
    if distance <= TOLERANCES[dtype]:
        return Believed(came_with)
    return Believed(
        note=f"pair {row_id}: generated and computed log-probabilities differ by {distance:.2g} a token, over "
        f"{TOLERANCES[dtype]:.0e}: the policy that answered was another, or was not served in {dtype}"
    )


def sample(pairs: Sequence[PreferencePair], seed: int) -> list[PreferencePair]:
    """Up to SAMPLE of the pairs that came with log-probabilities, drawn from the seed and the row ids alone."""
    first = {pair.row_id: pair for pair in reversed(pairs)}
    having = [p for p in first.values() if None not in (p.chosen_logp, p.rejected_logp)]
    return sorted(having, key=lambda pair: _draw(seed, pair.row_id))[:SAMPLE]


def _distances(
    model: Any,
    forward: PairForward,
    encoder: PairEncoder,
    pairs: Sequence[PreferencePair],
    batch_size: int,
) -> list[tuple[float, str]]:
    """How far what came with these pairs is from what is computed, a token, and the pair; those that fit alone."""
    fitting = {pair.pair.row_id: pair for pair in _encoded(encoder, pairs) if came_with(pair)}
    ready = list(fitting.values())
    found: list[tuple[float, str]] = []
    with reference_of(model) as bare:
        for start in range(0, len(ready), batch_size):
            for computed in score(bare, forward, ready[start : start + batch_size]):
                found.append((_distance(fitting[computed.row_id], computed), computed.row_id))
    return found


def _encoded(encoder: PairEncoder, pairs: Sequence[PreferencePair]) -> Iterator[EncodedPair]:
    for pair in pairs:
        with suppress(UnusablePair):
            yield encoder.encode(pair)


def _distance(pair: EncodedPair, computed: Reference) -> float:
    """Of the response that is further off, in the mean of its tokens; infinite where it cannot be computed."""
    given = came_with(pair)
    if given is None or computed.chosen_logp is None or computed.rejected_logp is None:
        return math.inf
    chosen = abs(given[0] - computed.chosen_logp) / len(pair.chosen_C)
    rejected = abs(given[1] - computed.rejected_logp) / len(pair.rejected_R)
    return max(chosen, rejected)


def _draw(seed: int, row_id: str) -> bytes:
    return hashlib.sha256(f"{seed}\0reference\0{row_id}".encode()).digest()

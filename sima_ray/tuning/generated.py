"""Reference log-probabilities that came with the pairs, from the engine that wrote the responses.

They are the reference's where the policy that answered is the one that is tuned, in the same precision, and a
response's text gives the same tokens again. A sample that is computed tells the former; that a text gives as many
tokens as were generated makes the latter all but sure. A few pairs of another origin among many can escape it.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sima_ray.records import PreferencePair
from sima_ray.tuning.choice import TOLERANCES
from sima_ray.tuning.dataset import EncodedPair, Kind, PairEncoder, UnusablePair, kind_of
from sima_ray.tuning.forward import PairForward, base_of
from sima_ray.tuning.reference import Given, Reference, Scores, each_alone, reference_of

SAMPLE = 16
"""Pairs that are computed, too, before any is believed."""

LOOKED_AT = 64
"""Pairs among which these are looked for: not all came with as many tokens as their texts have here."""

MARGIN = 0.1
"""How far generated references may move the margins of the sample (DPO's, beta and all; root mean square).
Rounding moves them by a hundredth; a policy that is a round older or younger, by about one."""


@dataclass(frozen=True, slots=True)
class Believed:
    """What need not be computed.

    Attributes:
        given: For `reference_pass`; None where all is computed.
        note: Why that is so although it was not asked for.
    """

    given: Given | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """Gives `reference_pass` what came with a pair whose kind of image was computed in the sample.

    Of another kind it gives nothing: the forward pass shows whether the model finds as many features in such an
    image as the prompt has tokens for, which would else come to light in a training step.

    Attributes:
        kinds: See `kind_of`.
    """

    kinds: frozenset[Kind]

    def __call__(self, pair: EncodedPair) -> tuple[float, float] | None:
        return came_with(pair) if kind_of(pair) in self.kinds else None


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
    beta: float,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    gather: Callable[[list[Any]], list[Any]] = list,
    scores: Scores = each_alone,
) -> Believed:
    """Compute a sample of the log-probabilities that came with the pairs, and believe all or none.

    All are believed where none of the sample is further from what is computed, in the mean of its tokens, than two
    ways to compute may be (`TOLERANCES`), and where the margins of the sample stay where they are (`MARGIN`).
    Every worker must call this; each does its share of the sample, and all come to the same result.

    Args:
        model: With or without adapters; they are switched off here.
        forward: How pairs are scored.
        encoder: Turns pairs into tokens.
        pairs: All of them, in the same order on every worker.
        seed: Draws the sample, with the row ids.
        beta: Of the loss, for the margins.
        batch_size: Pairs a forward pass.
        rank, world: This worker, and how many there are.
        gather: The lists of all workers, joined.
        scores: How batches are scored.
    """
    drawn = sample(pairs, seed)
    ready = list(islice(_fitting(encoder, drawn[rank::world]), -(-SAMPLE // world)))
    batches = (ready[start : start + batch_size] for start in range(0, len(ready), batch_size))
    with reference_of(model) as bare:
        computed = list(scores(bare, forward, batches))
    found = gather(_distances(ready, computed))
    if not drawn:
        return Believed(note="no pair came with the log-probabilities of its responses")
    if not found:
        return Believed(
            note=f"in none of {len(drawn)} sampled pairs the responses have as many tokens as were generated"
        )
    dtype = base_of(model).get_input_embeddings().weight.dtype
    distance, row_id = max((distance, row_id) for distance, _, row_id, _ in found)
    margin = beta * math.sqrt(sum(moved**2 for _, moved, *_ in found) / len(found))
    if distance <= TOLERANCES[dtype] and margin <= MARGIN:
        return Believed(Taken(frozenset(kind for *_, kind in found)))
    apart = (
        f"pair {row_id}: generated and computed log-probabilities differ by {distance:.2g} a token, over "
        f"{TOLERANCES[dtype]:.0e}"
        if distance > TOLERANCES[dtype]
        else f"generated log-probabilities move the margins by {margin:.2g}, over {MARGIN}"
    )
    return Believed(
        note=f"{apart}: the policy that answered was another, or was not served in {dtype}"
    )


def sample(pairs: Sequence[PreferencePair], seed: int) -> list[PreferencePair]:
    """Up to LOOKED_AT of the pairs that came with log-probabilities, drawn from the seed and the row ids alone."""
    first = {pair.row_id: pair for pair in reversed(pairs)}
    having = [p for p in first.values() if None not in (p.chosen_logp, p.rejected_logp)]
    return sorted(having, key=lambda pair: _draw(seed, pair.row_id))[:LOOKED_AT]


def _distances(
    pairs: Sequence[EncodedPair], computed: Sequence[Reference]
) -> list[tuple[float, float, str, Kind]]:
    """Of pairs of the sample: the distance a token, what the margin is moved by, id and kind."""
    fitting = {pair.pair.row_id: pair for pair in pairs}
    found: list[tuple[float, float, str, Kind]] = []
    for reference in computed:
        pair = fitting[reference.row_id]
        found.append((*_apart(pair, reference), reference.row_id, kind_of(pair)))
    return found


def _fitting(encoder: PairEncoder, pairs: Sequence[PreferencePair]) -> Iterator[EncodedPair]:
    """Those of these pairs whose own log-probabilities could be taken."""
    for pair in pairs:
        with suppress(UnusablePair):
            encoded = encoder.encode(pair)
            if came_with(encoded):
                yield encoded


def _apart(pair: EncodedPair, computed: Reference) -> tuple[float, float]:
    """The distance of the response that is further off, in the mean of its tokens, and that of the margin.

    Infinite where they cannot be computed.
    """
    given = came_with(pair)
    if given is None or computed.chosen_logp is None or computed.rejected_logp is None:
        return math.inf, math.inf
    chosen, rejected = given[0] - computed.chosen_logp, given[1] - computed.rejected_logp
    distance = max(abs(chosen) / len(pair.chosen_C), abs(rejected) / len(pair.rejected_R))
    return distance, chosen - rejected


def _draw(seed: int, row_id: str) -> bytes:
    return hashlib.sha256(f"{seed}\0reference\0{row_id}".encode()).digest()

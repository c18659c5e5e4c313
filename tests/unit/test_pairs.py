"""Pairs from decided rows, and the length policy."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sima_ray.config import PairsConfig
from sima_ray.pairs import (
    PairLengths,
    apply_length_policy,
    believed_preference,
    count_words,
    to_pair,
)
from sima_ray.records import ORDERS, Candidate, Choice, Critique, Outcome, Prompt

PROMPT = Prompt("r1", "images/1.jpg", "What is there?", "a dog", "prompts.jsonl:1")
BALANCE = PairsConfig(length_policy="balance")

sizes = st.tuples(st.integers(0, 40), st.integers(0, 40))
lengths = st.lists(sizes, max_size=40).map(
    lambda sizes: [PairLengths(f"row-{n}", *size) for n, size in enumerate(sizes)]
)


def candidate(text: str, kind: str) -> Candidate:
    return Candidate(text, kind, 0.0, 1.0, None, 3, -1.5, "stop", "round-0")


def test_pair_follows_the_preference() -> None:
    greedy, sampled = candidate("a dog", "greedy"), candidate("two cats", "sampled")
    first = to_pair(PROMPT, [greedy, sampled], Outcome.PREFERRED_FIRST)
    assert (first.chosen, first.chosen_from) == ("a dog", "greedy")
    assert (first.rejected, first.rejected_from) == ("two cats", "sampled")
    assert (first.row_id, first.image, first.prompt) == ("r1", "images/1.jpg", "What is there?")
    assert first.weight == 1.0
    assert to_pair(PROMPT, [sampled, greedy], Outcome.PREFERRED_SECOND) == first


def test_a_pair_has_the_log_probabilities_of_responses_that_ended() -> None:
    ended = replace(candidate("a dog", "greedy"), tokens=4, logprob=-2.5)
    cut = replace(candidate("two ca", "sampled"), finish_reason="length")
    unknown = replace(candidate("two cats", "sampled"), logprob=None)
    for other in (cut, unknown):
        pair = to_pair(PROMPT, [other, ended], Outcome.PREFERRED_SECOND)
        assert (pair.chosen_logp, pair.chosen_tokens) == (-2.5, 4)
        assert (pair.rejected_logp, pair.rejected_tokens) == (None, 3)


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if not outcome.is_preference])
def test_other_outcomes_are_no_pairs(outcome: Outcome) -> None:
    with pytest.raises(AssertionError, match="r1"):
        to_pair(PROMPT, [candidate("a", "greedy"), candidate("b", "sampled")], outcome)


def both_orders(choice: Choice) -> list[Critique]:
    """A critic that takes the same place in either order."""
    return [Critique(order, "", "", choice) for order in ORDERS]


def believed(ids: list[str], choice: Choice, seed: int) -> list[Outcome]:
    return [believed_preference(row_id, both_orders(choice), seed) for row_id in ids]


def test_either_order_is_believed_for_half_of_the_rows() -> None:
    ids = [f"row-{n}" for n in range(1000)]
    for choice in (1, 2):
        for seed in (0, 1, 7):
            assert 450 < believed(ids, choice, seed).count(Outcome.PREFERRED_FIRST) < 550
    # A critic of the other place is believed in the same order, and so has the other candidate.
    assert all(a is not b for a, b in zip(believed(ids, 1, 7), believed(ids, 2, 7), strict=True))
    # Another seed draws anew: about half of the rows change.
    changed = sum(a is not b for a, b in zip(believed(ids, 1, 0), believed(ids, 1, 1), strict=True))
    assert 450 < changed < 550


def test_the_believed_order_of_a_row_is_fixed() -> None:
    """So that pairs made anew by another version are the same."""
    drawn = "".join("12"[o is Outcome.PREFERRED_SECOND] for o in believed(list("abcdefgh"), 1, 7))
    assert drawn == "12122222"
    for row_id in "abcdefgh":
        straight, swapped = both_orders(1)
        assert believed_preference(row_id, [straight, swapped], 7) is believed_preference(
            row_id, [swapped, straight], 7
        )


def test_the_balance_draws_apart_from_the_order() -> None:
    """Which of the surplus go says nothing about the order that was believed."""
    ids = [f"row-{n}" for n in range(1000)]
    out = apply_length_policy(
        [PairLengths(row_id, 3, 5) for row_id in ids]
        + [PairLengths(f"long-{n}", 5, 3) for n in range(500)],
        BALANCE,
        7,
    )
    first = believed(sorted(out), 1, 7).count(Outcome.PREFERRED_FIRST)
    assert len(out) == 500 and 210 < first < 290


def test_lengths_are_words() -> None:
    assert count_words("") == 0
    assert count_words("  a dog's\tbone, \n twice ") == 4
    assert PairLengths.of("r", "a dog", "a big dog") == PairLengths("r", 2, 3)


@given(lengths)
def test_no_policy_leaves_nothing_out(pairs: list[PairLengths]) -> None:
    assert apply_length_policy(pairs, PairsConfig(), seed=1) == set()


def test_ratio() -> None:
    pairs = [
        PairLengths("double", 10, 20),
        PairLengths("over", 10, 21),
        PairLengths("over-the-other-way", 21, 10),
        PairLengths("nothing-said", 0, 1),
        PairLengths("both-empty", 0, 0),
    ]
    left_out = apply_length_policy(pairs, PairsConfig(max_length_ratio=2), seed=1)
    assert left_out == {"over", "over-the-other-way", "nothing-said"}


@given(lengths, st.integers(0, 5), st.one_of(st.none(), st.floats(1.1, 4)), st.randoms())
def test_balance(
    pairs: list[PairLengths], seed: int, ratio: float | None, rng: random.Random
) -> None:
    config = PairsConfig(length_policy="balance", max_length_ratio=ratio)
    left_out = apply_length_policy(pairs, config, seed)
    kept = [pair for pair in pairs if pair.row_id not in left_out]
    assert sum(p.chosen < p.rejected for p in kept) == sum(p.chosen > p.rejected for p in kept)
    equal = {pair.row_id for pair in pairs if pair.chosen == pair.rejected}
    assert not left_out & equal
    # Nothing more than needed: what the ratio alone leaves out, and the surplus of one kind.
    by_ratio = apply_length_policy(pairs, PairsConfig(max_length_ratio=ratio), seed)
    surplus = [pair for pair in pairs if pair.row_id in left_out - by_ratio]
    assert len({pair.chosen < pair.rejected for pair in surplus}) <= 1
    # The rows' order does not matter.
    shuffled = rng.sample(pairs, len(pairs))
    assert apply_length_policy(shuffled, config, seed) == left_out


def test_seed_chooses_the_surplus() -> None:
    pairs = [PairLengths(f"row-{n}", 3, 5) for n in range(60)]
    pairs += [PairLengths(f"long-{n}", 5, 3) for n in range(30)]
    first, second = (apply_length_policy(pairs, BALANCE, seed) for seed in (1, 2))
    assert len(first) == len(second) == 30
    assert first != second
    assert first == apply_length_policy(pairs, BALANCE, 1)


@given(st.lists(st.tuples(sizes, st.sampled_from([1.0, 0.25])), max_size=40), st.integers(0, 5))
def test_each_weight_is_balanced_by_itself(
    rows: list[tuple[tuple[int, int], float]], seed: int
) -> None:
    pairs = [PairLengths(f"row-{n}", *size, weight) for n, (size, weight) in enumerate(rows)]
    left_out = apply_length_policy(pairs, BALANCE, seed)
    kept = [pair for pair in pairs if pair.row_id not in left_out]
    assert sum(p.weight for p in kept if p.chosen < p.rejected) == sum(
        p.weight for p in kept if p.chosen > p.rejected
    )
    # So that pairs of less weight cost none of the others.
    whole = [pair for pair in pairs if pair.weight == 1]
    assert {p.row_id for p in whole} & left_out == apply_length_policy(whole, BALANCE, seed)

"""The vote over both orders, and its symmetry."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sima_ray.critic.vote import decide, identical, preferred_candidate
from sima_ray.records import Choice, Critique, Order, Outcome

MIRROR = {
    Outcome.PREFERRED_FIRST: Outcome.PREFERRED_SECOND,
    Outcome.PREFERRED_SECOND: Outcome.PREFERRED_FIRST,
}
choices = st.sampled_from([1, 2, None])
texts = st.text(st.sampled_from("ab \n\u2003"))


def critique(order: Order, choice: Choice | None) -> Critique:
    return Critique(order=order, raw="", reason="", choice=choice)


def both(straight: Choice | None, swapped: Choice | None) -> list[Critique]:
    return [critique("12", straight), critique("21", swapped)]


@pytest.mark.parametrize(
    ("straight", "swapped", "outcome"),
    [
        (1, 2, Outcome.PREFERRED_FIRST),
        (2, 1, Outcome.PREFERRED_SECOND),
        (1, 1, Outcome.INCONSISTENT),  # always the first that it reads
        (2, 2, Outcome.INCONSISTENT),
        (None, 1, Outcome.UNPARSEABLE),
        (2, None, Outcome.UNPARSEABLE),
        (None, None, Outcome.UNPARSEABLE),
    ],
)
def test_outcomes(straight: Choice | None, swapped: Choice | None, outcome: Outcome) -> None:
    assert decide(["a dog", "a cat"], both(straight, swapped)) is outcome
    assert decide(["a dog", "a cat"], both(straight, swapped)[::-1]) is outcome


def test_choices_map_to_candidates() -> None:
    assert preferred_candidate(critique("12", 1)) == 0
    assert preferred_candidate(critique("12", 2)) == 1
    assert preferred_candidate(critique("21", 1)) == 1
    assert preferred_candidate(critique("21", 2)) == 0
    assert preferred_candidate(critique("21", None)) is None


def test_identical_needs_no_critique() -> None:
    assert decide(["a  dog\n", " a dog"], []) is Outcome.IDENTICAL
    assert decide(["a dog", "a dog"], both(1, 2)) is Outcome.IDENTICAL
    assert not identical("a dog", "A dog")
    assert not identical("a dog", "ad og")


@pytest.mark.parametrize("critiques", [[], [critique("12", 1)], [critique("12", 1)] * 2])
def test_both_orders_are_needed(critiques: list[Critique]) -> None:
    with pytest.raises(AssertionError, match="one critique an order"):
        decide(["a dog", "a cat"], critiques)


@given(texts, texts, choices, choices)
def test_swapping_candidates_mirrors_the_outcome(
    first: str, second: str, straight: Choice | None, swapped: Choice | None
) -> None:
    # The same critic on swapped candidates: what it read in order "12" it now reads in "21".
    outcome = decide([first, second], both(straight, swapped))
    mirrored = decide([second, first], both(swapped, straight))
    assert mirrored is MIRROR.get(outcome, outcome)


@given(texts, texts)
def test_identical_is_symmetric_and_ignores_white_space(first: str, second: str) -> None:
    assert identical(first, second) == identical(second, first)
    assert identical(first, f"\n {first}\t")

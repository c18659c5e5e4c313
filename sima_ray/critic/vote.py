"""The vote over both orders: a response is preferred only when it wins in either place."""

from collections.abc import Sequence

from sima_ray.records import ORDERS, Critique, Outcome


def decide(candidates: Sequence[str], critiques: Sequence[Critique]) -> Outcome:
    """The outcome of a row that was judged.

    Args:
        candidates: The two responses.
        critiques: One critique for each of the two orders, in any sequence; not looked at (and may
            be empty) when the responses are identical.

    Returns:
        IDENTICAL, else UNPARSEABLE when any critique has no choice, else INCONSISTENT when the
        orders prefer different candidates (a tie), else the preference.
    """
    first, second = candidates
    if identical(first, second):
        return Outcome.IDENTICAL
    assert sorted(critique.order for critique in critiques) == sorted(ORDERS), (
        "one critique an order"
    )
    preferred = {preferred_candidate(critique) for critique in critiques}
    if None in preferred:
        return Outcome.UNPARSEABLE
    if len(preferred) > 1:
        return Outcome.INCONSISTENT
    return Outcome.PREFERRED_FIRST if preferred == {0} else Outcome.PREFERRED_SECOND


def preferred_candidate(critique: Critique) -> int | None:
    """Index (0 or 1) of the candidate that a critique prefers; None when it has no choice."""
    if critique.choice is None:
        return None
    return critique.choice - 1 if critique.order == "12" else 2 - critique.choice


def identical(first: str, second: str) -> bool:
    """Whether two responses say the same, white space aside."""
    return first.split() == second.split()

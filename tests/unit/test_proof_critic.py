"""The proof's critic figures: single critiques by order and kind of pair, ties and unparseable ones."""

from typing import Any

import pytest

from benchmarks.proof.critic import Judged, count_objects, figures, judged
from benchmarks.proof.intervals import wilson
from sima_ray.demo.oracle import count_errors

TRUTH = "On a blue background: at the top left a small dog, in the center a large cat."
WORSE = "On a blue background: at the top left a small dog, in the center a large bus."
SHORT = "On a blue background: at the top left a small dog."


def row(texts: tuple[str, str], choices: tuple[int | None, int | None]) -> dict[str, Any]:
    critiques = [
        {"order": order, "raw": "", "reason": "", "choice": choice, "tokens": 1}
        for order, choice in zip(("12", "21"), choices, strict=True)
    ]
    # In either sequence: what counts is the order's name.
    return {
        "ground_truth": TRUTH,
        "candidates": [{"text": text} for text in texts],
        "critiques": critiques[::-1],
    }


def test_a_row_becomes_errors_objects_and_the_candidates_that_were_chosen() -> None:
    pair = judged(row((TRUTH, WORSE), (1, 2)), count_errors, count_objects)
    assert pair == Judged(errors=(0, 2), objects=(2, 2), chosen=(0, 0))
    assert (pair.better, pair.kind, pair.consistent) == (0, "equal_length", True)
    pair = judged(row((SHORT, TRUTH), (1, None)), count_errors, count_objects)
    assert pair == Judged(errors=(1, 0), objects=(1, 2), chosen=(0, None))
    assert (pair.better, pair.kind, pair.consistent) == (1, "longer_better", False)


@pytest.mark.parametrize(
    ("errors", "objects", "kind"),
    [
        ((1, 1), (1, 3), "tie"),
        ((0, 1), (2, 2), "equal_length"),
        ((0, 1), (3, 2), "longer_better"),
        ((2, 1), (3, 2), "shorter_better"),
    ],
)
def test_kinds_are_seen_from_the_better_candidate(
    errors: tuple[int, int], objects: tuple[int, int], kind: str
) -> None:
    assert Judged(errors, objects, (0, 0)).kind == kind


def test_each_order_is_counted_by_itself() -> None:
    equal, longer = (1, 1), (2, 1)
    found = figures(
        [
            Judged((0, 1), equal, (0, 0)),  # right in both orders
            Judged((0, 1), equal, (1, 0)),  # right in the second alone
            Judged((0, 1), longer, (0, None)),  # an unparseable critique is a wrong one
            Judged((1, 1), equal, (1, 1)),  # a tie of the judge: no right choice, but consistent
        ],
        confidence=0.95,
    )
    assert found["accuracy"] == [2 / 3, 2 / 3]
    assert found["equal_length"] == [1 / 2, 1.0]
    assert found["longer_better"] == [1.0, 0.0]
    assert found["consistent"] == 2 / 4
    assert found["consistent_without_ties"] == 1 / 3
    assert found["unparseable"] == 1 / 8
    assert found["counts"] == {
        "judged": 4,
        "ties": 1,
        "equal_length": 2,
        "longer_better": 1,
        "shorter_better": 0,
    }
    assert found["intervals"]["accuracy"][0]["of"] == 3
    assert found["intervals"]["shorter_better"][1]["of"] == 0


def test_wilsons_interval() -> None:
    # By hand: p = 0.8, n = 100, z² = 3.8415; middle (0.8 + 0.019207) / 1.038415 = 0.788902,
    # half 1.959964 · sqrt(0.0016 + 0.000096036) / 1.038415 = 0.077731.
    found = wilson(80, 100, 0.95)
    assert found["value"] == 0.8
    assert found["low"] == pytest.approx(0.711171, abs=2e-5)
    assert found["high"] == pytest.approx(0.866633, abs=2e-5)
    assert wilson(80, 100, 0.9)["low"] > found["low"]
    assert wilson(5, 5, 0.95)["high"] == 1.0
    assert wilson(0, 5, 0.95)["low"] == 0.0
    assert wilson(0, 0, 0.95) == {"value": 0.0, "low": 0.0, "high": 1.0, "hits": 0, "of": 0}

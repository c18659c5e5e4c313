"""The proof's gate: every line can fail by itself."""

import copy
from typing import Any

import pytest

from benchmarks.proof.gate import gate


def estimate(value: float, low: float | None = None, high: float | None = None) -> dict[str, float]:
    return {
        "value": value,
        "low": value if low is None else low,
        "high": value if high is None else high,
    }


def good() -> dict[str, Any]:
    """What a proof holds that passes every line."""
    right = [estimate(0.9), estimate(0.9)]
    kinds = dict.fromkeys(("accuracy", "equal_length", "longer_better"), right)
    difference = {"errors": estimate(-0.5, -0.6, -0.4), "recall": estimate(0.0, -0.009, 0.01)}
    pope = dict.fromkeys(("random", "popular", "adversarial"), estimate(0.8, 0.7, 0.9))
    return copy.deepcopy(
        {
            "critic": {
                "intervals": {
                    **kinds,
                    "consistent": estimate(0.8),
                    "unparseable": estimate(0.001),
                }
            },
            "pope_intervals": pope,
            "rounds": [{"pope": pope}],
            "differences": dict.fromkeys(("base", "random", "shorter", "greedy"), difference),
            "chair_s_change": estimate(-0.3, -0.4, -0.2),
            "share_of_oracle": estimate(0.85),
            "round_seconds": {"round-0-evaluate": 200.0, "round-1-train": 100.0},
        }
    )


def fails(proof: dict[str, Any]) -> list[str]:
    return [line["what"] for line in gate(proof) if not line["holds"]]


def test_a_good_result_passes_every_line() -> None:
    lines = gate(good())
    assert all(line["holds"] for line in lines)
    assert len(lines) == 24
    assert all({"what", "must", "measured", "holds"} <= line.keys() for line in lines)


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (
            ("critic", "intervals", "longer_better", 1),
            0.7,
            "critic, the better has more objects, order 21",
        ),
        (("critic", "intervals", "unparseable"), 0.01, "critic, unparseable"),
        (("critic", "intervals", "consistent"), 0.79, "critic, both orders agree"),
        (("pope_intervals", "popular"), 0.79, "POPE, popular, base"),
        (("rounds", 0, "pope", "random"), 0.79, "POPE, random, after one round"),
        (("chair_s_change",), -0.24, "CHAIR_s, critic / base − 1"),
        (("share_of_oracle",), 0.79, "share of the oracle's gain"),
    ],
)
def test_each_demand_can_fail_by_itself(path: tuple[Any, ...], value: float, line: str) -> None:
    proof = good()
    *way, last = path
    inner = proof
    for key in way:
        inner = inner[key]
    inner[last] = estimate(value)
    assert line in fails(proof)


def test_a_control_must_be_worse_in_errors_beyond_chance() -> None:
    proof = good()
    proof["differences"]["greedy"] = {
        "errors": estimate(-0.1, -0.2, 0.001),
        "recall": estimate(0.1),
    }
    assert fails(proof) == ["errors, critic − greedy"]


@pytest.mark.parametrize("arm", ["base", "random", "shorter", "greedy"])
def test_recall_must_be_shown_not_to_fall(arm: str) -> None:
    proof = good()
    errors = {"errors": estimate(-0.5)}
    # Too wide an interval is no evidence of no loss, wherever its middle lies.
    proof["differences"][arm] = errors | {"recall": estimate(0.005, -0.02, 0.03)}
    assert fails(proof) == [f"recall, critic − {arm}"]
    proof["differences"][arm] = errors | {"recall": estimate(-0.005, -0.01, -0.001)}
    assert fails(proof) == []


def test_a_round_fits_in_the_demos_time() -> None:
    proof = good()
    proof["round_seconds"]["round-1-merge"] = 181.0
    (line,) = (line for line in gate(proof) if not line["holds"])
    assert (line["measured"], line["must"]) == (481.0, "≤ 480")


def test_what_was_left_out_does_not_hold() -> None:
    proof = good()
    del proof["share_of_oracle"], proof["differences"]["shorter"]
    lines = [line for line in gate(proof) if not line["holds"]]
    assert len(lines) == 3
    assert all(line["measured"] is None for line in lines)

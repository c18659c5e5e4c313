"""What must hold, from the JSON alone."""

from benchmarks.proof.settings import BASE, CONTROLS, POPE_KINDS
from sima_ray.ports import JsonDict

RECALL_MARGIN = 0.01
"""What recall may lose: the whole interval must lie above it, so that too few images cannot pass for no loss."""

DEMO_S = 480


def gate(proof: JsonDict) -> list[JsonDict]:
    """What must hold, line by line: {what, must, measured, holds} and, where there is one, the interval.

    A line holds by its value, or by its interval where `must` says so; one of an arm that was left out does not.

    Args:
        proof: The whole JSON, but for the gate.
    """
    return [
        *_critic_lines(proof["critic"]["intervals"]),
        *(
            _at_least(f"POPE, {kind}, {when}", pope[kind], 0.80)
            for when, pope in (
                ("base", proof["pope_intervals"]),
                ("after one round", proof["rounds"][0]["pope"]),
            )
            for kind in POPE_KINDS
        ),
        *(line for control in CONTROLS for line in _control_lines(control.name, proof)),
        _base_line(proof["chair_s_change"]),
        _recall_line(BASE, proof),
        _at_least("share of the oracle's gain", proof.get("share_of_oracle"), 0.80),
        _demo_line(proof["round_seconds"]),
    ]


def _critic_lines(intervals: JsonDict) -> list[JsonDict]:
    kinds = {
        "accuracy": ("critic's accuracy", 0.80),
        "equal_length": ("critic, equally many objects", 0.75),
        "longer_better": ("critic, the better has more objects", 0.75),
    }
    lines = [
        _at_least(f"{what}, order {order}", intervals[key][at], least)
        for key, (what, least) in kinds.items()
        for at, order in enumerate(("12", "21"))
    ]
    lines.append(_at_least("critic, both orders agree", intervals["consistent"], 0.80))
    answer = intervals["unparseable"]
    return [*lines, _line("critic, unparseable", "< 0.01", answer, answer["value"] < 0.01)]


def _control_lines(control: str, proof: JsonDict) -> list[JsonDict]:
    """The critic's arm against a control, after one round."""
    errors = proof["differences"].get(control, {}).get("errors")
    less = errors is not None and errors["high"] < 0
    return [
        _line(f"errors, critic − {control}", "interval below 0", errors, less),
        _recall_line(control, proof),
    ]


def _recall_line(arm: str, proof: JsonDict) -> JsonDict:
    recall = proof["differences"].get(arm, {}).get("recall")
    kept = recall is not None and recall["low"] >= -RECALL_MARGIN
    must = f"interval's low end ≥ -{RECALL_MARGIN:g}"
    return _line(f"recall, critic − {arm}", must, recall, kept)


def _base_line(change: JsonDict) -> JsonDict:
    return _line("CHAIR_s, critic / base − 1", "≤ -0.25", change, change["value"] <= -0.25)


def _demo_line(seconds: JsonDict) -> JsonDict:
    total = sum(seconds.values())
    what = "one round's stages, s (POPE included, start-up not; another run beside it)"
    return _line(what, f"≤ {DEMO_S}", {"value": total}, total <= DEMO_S)


def _at_least(what: str, figure: JsonDict | None, least: float) -> JsonDict:
    holds = figure is not None and figure["value"] >= least
    return _line(what, f"≥ {least:.2f}", figure, holds)


def _line(what: str, must: str, figure: JsonDict | None, holds: bool) -> JsonDict:
    found = figure or {"value": None}
    ends = {key: found[key] for key in ("low", "high") if key in found}
    return {"what": what, "must": must, "measured": found["value"], **ends, "holds": holds}

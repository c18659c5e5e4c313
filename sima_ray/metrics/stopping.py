"""When rounds end before their number is up, and which of them was the best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sima_ray.config import EarlyStoppingConfig

_ROUNDING = 1e-9  # 0.30 - 0.25 is below 0.05 in binary


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a rule makes of the rounds so far.

    Attributes:
        last: The round that decided: the one that ended the run, else the latest.
        best: The round whose policy is kept; 0 is the model that the run began with.
        stopped: Whether no round follows.
        reason: What decided, in words.
    """

    last: int
    best: int
    stopped: bool
    reason: str

    def __str__(self) -> str:
        end = f"end after {self.last}: " if self.stopped else ""
        return f"{end}{self.reason}; the best is {_name(self.best)}"


def judge(figures: Sequence[Mapping[str, float]], rule: EarlyStoppingConfig) -> Verdict:
    """Apply a rule to the figures of all rounds that were evaluated, and to nothing else.

    A round is a gain when its monitored figure is below the best round's, by `min_delta` at least.
    A round that leaves the bounds of recall or length ends the run whatever it gained, for the next
    one would start from it; it is never the best. What comes after the end is not looked at, so
    that the same rounds give the same verdict whenever it is asked for.

    Args:
        figures: The monitored figure, `recall` and `length` of each round, the base model's first.
        rule: The bounds.
    """
    base, *rounds = figures
    best, waited = 0, 0
    reason = "the base model is evaluated"
    for number, round_ in enumerate(rounds, 1):
        if breach := _breach(base, round_, rule):
            return Verdict(number, best, True, f"round {number}: {breach}")
        before, after = figures[best][rule.monitor], round_[rule.monitor]
        gained = after < before and before - after >= rule.min_delta - _ROUNDING
        change = f"round {number}: {rule.monitor} {before:.3f} of {_name(best)} → {after:.3f}"
        best, waited = (number, 0) if gained else (best, waited + 1)
        reason = f"{change}, {'a gain' if gained else 'no gain'}"
        if waited == rule.patience:
            return Verdict(number, best, True, reason)
    return Verdict(len(rounds), best, False, reason)


def _breach(
    base: Mapping[str, float], now: Mapping[str, float], rule: EarlyStoppingConfig
) -> str | None:
    """The bound that a round leaves, in words."""
    if base["recall"] - now["recall"] > rule.max_recall_drop + _ROUNDING:
        return (
            f"recall fell from {base['recall']:.3f} to {now['recall']:.3f}, "
            f"by more than {rule.max_recall_drop:g}"
        )
    allowed = rule.max_length_drift * base["length"]
    if abs(now["length"] - base["length"]) > allowed + _ROUNDING:
        return (
            f"words a caption went from {base['length']:.1f} to {now['length']:.1f}, "
            f"by more than {rule.max_length_drift:.0%}"
        )
    return None


def _name(number: int) -> str:
    return f"round {number}" if number else "the base model"

"""A plan as a worksheet: every figure with the arithmetic that gave it."""

from dataclasses import asdict, dataclass, field
from typing import Any

GB = 1e9
"""Bytes: a plan counts in 10⁹, which is a little less than the GiB that a "24 GB" GPU has."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One line.

    Attributes:
        label: What it is.
        value: How much, in `unit`.
        unit: "GB", "h", "tokens", …; empty for a plain number.
        how: The arithmetic, with the numbers in it.
    """

    label: str
    value: float
    unit: str
    how: str = ""

    def __str__(self) -> str:
        return f"  {self.label:<28}{_number(self.value, self.unit):>15}   {self.how}".rstrip()


@dataclass(frozen=True, slots=True)
class Section:
    """One stage.

    Attributes:
        title: Its name, and where it runs.
        figures: The lines; the last one is the sum or the result.
        problems: What does not fit, each with its numbers.
        notes: What fits, and should be known.
    """

    title: str
    figures: list[Figure]
    problems: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])

    def value(self, label: str) -> float:
        """The value of the figure with that label."""
        return next(figure.value for figure in self.figures if figure.label == label)

    def lines(self) -> list[str]:
        """As a person reads it."""
        said = [f"  note: {note}" for note in self.notes]
        said += [f"  DOES NOT FIT: {problem}" for problem in self.problems]
        return [self.title, *map(str, self.figures), *said, ""]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def gigabytes(label: str, size: float, how: str) -> Figure:
    """A figure of so many bytes."""
    return Figure(label, size / GB, "GB", how)


def total(label: str, figures: list[Figure]) -> Figure:
    """The sum of figures of one unit."""
    how = " + ".join(_number(figure.value, "").strip() for figure in figures)
    return Figure(label, sum(figure.value for figure in figures), figures[0].unit, how)


def millions(count: float) -> str:
    """A number of parameters in words."""
    return f"{count / 1e9:,.3f}e9" if count >= 1e9 else f"{count / 1e6:,.1f}e6"


def _number(value: float, unit: str) -> str:
    whole = unit in ("tokens", "requests", "prompts", "pairs", "steps", "GPUs")
    text = f"{value:,.0f}" if whole else f"{value:,.2f}"
    return f"{text} {unit}"

"""A run's ledger: every row read is a pair, a counted outcome, or quarantined with a reason."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from sima_ray.errors import LedgerError
from sima_ray.records import Outcome, Quarantine


@dataclass(frozen=True)
class Ledger:
    """Counts of a run, a round or a block; ledgers of parts add up with `+`.

    Attributes:
        rows: Rows read, counted apart from the outcomes so that the two can be held against each
            other.
        outcomes: Rows by outcome; every outcome is a key, zero where it did not occur.
        quarantined: Quarantined rows by reason; every reason is a key.
    """

    rows: int
    outcomes: Mapping[Outcome, int] = field(default_factory=dict[Outcome, int])
    quarantined: Mapping[Quarantine, int] = field(default_factory=dict[Quarantine, int])

    def __post_init__(self) -> None:
        object.__setattr__(self, "outcomes", {o: self.outcomes.get(o, 0) for o in Outcome})
        object.__setattr__(self, "quarantined", {q: self.quarantined.get(q, 0) for q in Quarantine})

    @classmethod
    def count(
        cls, outcomes: Iterable[str], reasons: Iterable[str] = (), *, rows: int | None = None
    ) -> Self:
        """Count outcomes, one a row, and quarantine reasons, one a quarantined row.

        Args:
            outcomes: Names of `Outcome`.
            reasons: Names of `Quarantine`.
            rows: Rows read, where that is known from elsewhere; None takes the number of outcomes.
        """
        by_outcome = Counter(Outcome(outcome) for outcome in outcomes)
        by_reason = Counter(Quarantine(reason) for reason in reasons)
        return cls(by_outcome.total() if rows is None else rows, by_outcome, by_reason)

    @property
    def pairs(self) -> int:
        """Rows that became preference pairs."""
        return sum(count for outcome, count in self.outcomes.items() if outcome.is_pair)

    def __add__(self, other: "Ledger") -> "Ledger":
        return Ledger(
            self.rows + other.rows,
            {o: self.outcomes[o] + other.outcomes[o] for o in Outcome},
            {q: self.quarantined[q] + other.quarantined[q] for q in Quarantine},
        )

    def check(self) -> None:
        """Hold the counts against each other.

        Raises:
            LedgerError: Rows that no outcome or no reason accounts for, or a negative count; says
                which numbers.
        """
        problems: list[str] = []
        counted = sum(self.outcomes.values())
        if counted != self.rows:
            parts = ", ".join(f"{outcome} {n}" for outcome, n in self.outcomes.items() if n)
            problems.append(
                f"{self.rows} rows read but {counted} accounted for ({parts or 'none'})"
            )
        set_aside = self.outcomes[Outcome.QUARANTINED]
        explained = sum(self.quarantined.values())
        if explained != set_aside:
            parts = ", ".join(f"{reason} {n}" for reason, n in self.quarantined.items() if n)
            problems.append(
                f"{set_aside} rows quarantined but {explained} with a reason ({parts or 'none'})"
            )
        counts = {"rows": self.rows, **self.outcomes, **self.quarantined}
        problems += [f"{name} is {n}" for name, n in counts.items() if n < 0]
        if problems:
            raise LedgerError(f"the ledger does not add up: {'; '.join(problems)}")

    def equation(self) -> str:
        """Rows in and where each ended, as people read it: "800 prompts = 394 pairs + 43 inconsistent".

        A run that began with given pairs has those in: "900 given pairs = 880 pairs + 20 length policy".
        """
        rows = "given pairs" if self.outcomes[Outcome.GIVEN] else "prompts"
        pairs = f"{self.pairs:,} pairs"
        if kept := self.outcomes[Outcome.INCONSISTENT_KEPT]:
            pairs += f" ({kept:,} of inconsistent verdicts)"
        rest = [
            f"{count:,} {outcome.value.replace('_', ' ')}"
            for outcome, count in self.outcomes.items()
            if count and not outcome.is_pair
        ]
        return f"{self.rows:,} {rows} = " + " + ".join([pairs, *rest])

    def to_json(self) -> dict[str, Any]:
        """The ledger as plain values.

        At the top level `rows` = `pairs` + `quarantined` + the other outcomes, each under its own
        name; below, `outcomes` and `quarantine_reasons` hold every count.
        """
        unused = [o for o in Outcome if not o.is_pair]
        return {
            "rows": self.rows,
            "pairs": self.pairs,
            **{outcome.value: self.outcomes[outcome] for outcome in unused},
            "outcomes": {outcome.value: n for outcome, n in self.outcomes.items()},
            "quarantine_reasons": {reason.value: n for reason, n in self.quarantined.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            LedgerError: A missing key, or an outcome or reason that does not exist.
        """
        try:
            return cls(
                int(values["rows"]),
                {Outcome(name): int(n) for name, n in values["outcomes"].items()},
                {Quarantine(name): int(n) for name, n in values["quarantine_reasons"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LedgerError(f"not a ledger: {error!r}") from error

"""What comes back. Fields that a service does not send are None or empty; those unknown here stay in `report`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any

from sima_ray.client.errors import CriticFailed

REAL = int | float


@dataclass(frozen=True, slots=True)
class OrderResult:
    """The verdict in one order: "12" shows the first response first, "21" the second.

    Attributes:
        choice: The place, 1 or 2, under which the chosen response was shown; None: no verdict.
        reason: In words; it numbers the responses as they were shown.
        raw: The critic's whole text.
        probability: That response 1 (of the pair, wherever it was shown) is better.
        findings: The reason's parts by metric, where it is written so.
    """

    order: str
    choice: int | None
    reason: str = ""
    raw: str = ""
    probability: float | None = None
    findings: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)

    @property
    def winner(self) -> int | None:
        """The chosen response's number in the pair, wherever it was shown."""
        if self.choice is None:
            return None
        return self.choice if self.order == "12" else 3 - self.choice


@dataclass(frozen=True, slots=True)
class ComparisonResult:
    """Two of more than two responses: `responses` are their numbers, from 1."""

    responses: tuple[int, int]
    winner: int | None
    consistent: bool
    outcome: str
    probability: float | None = None
    orders: tuple[OrderResult, ...] = ()


@dataclass(frozen=True, slots=True)
class CritiqueResult:
    """The verdict on a case.

    Attributes:
        winner: The better response's number, from 1; None is a tie.
        consistent: Whether both orders agree.
        outcome: As in "preferred_first", "inconsistent", "identical".
        orders: One for each order of two responses.
        probability: That response 1 is better than 2, over both orders.
        ranking: All numbers, best first.
        agreement: The share of pairs whose two orders agree.
        comparisons: Of more than two responses: every pair.
        request_id: Under which the service's log has it.
        report: The answer as it came.
    """

    winner: int | None
    consistent: bool
    outcome: str
    orders: tuple[OrderResult, ...] = ()
    probability: float | None = None
    ranking: tuple[int, ...] | None = None
    agreement: float | None = None
    comparisons: tuple[ComparisonResult, ...] = ()
    model_version: str = ""
    prompt_version: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    request_id: str | None = None
    report: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False, compare=False)


def read_result(answer: Any, request_id: str | None = None) -> CritiqueResult:
    """A result from the service's JSON.

    Raises:
        CriticFailed: It is not one; the message says which field.
    """
    fields = _Fields(answer, "answer")
    return CritiqueResult(
        winner=fields.get("winner", int, None),
        consistent=fields.get("consistent", bool, False),
        outcome=fields.needed("outcome", str),
        orders=_orders(fields),
        probability=_number(fields.get("probability", REAL, None)),
        ranking=fields.numbers("ranking"),
        agreement=_number(fields.get("agreement", REAL, None)),
        comparisons=tuple(_comparison(part) for part in fields.parts("comparisons")),
        model_version=fields.get("model_version", str, ""),
        prompt_version=fields.get("prompt_version", str, ""),
        tokens=fields.get("tokens", int, 0),
        prompt_tokens=fields.get("prompt_tokens", int, 0),
        cached_tokens=fields.get("cached_tokens", int, 0),
        seconds=float(fields.get("seconds", REAL, 0.0)),
        request_id=request_id,
        report=answer,
    )


class _Fields:
    """A JSON object whose fields are of the types that are asked for; null is as good as missing."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise _unreadable(where)
        self._values: dict[str, Any] = values
        self._where = where

    def get(self, name: str, kind: type | UnionType, default: Any) -> Any:
        value = self._values.get(name)
        if value is None:
            return default
        as_number = isinstance(value, bool) and kind is not bool  # a bool is an int to Python
        if as_number or not isinstance(value, kind):
            raise _unreadable(f"{self._where}.{name}")
        return value

    def needed(self, name: str, kind: type | UnionType) -> Any:
        value = self.get(name, kind, None)
        if value is None:
            raise _unreadable(f"{self._where}.{name}")
        return value

    def parts(self, name: str) -> "list[_Fields]":
        """A list of objects; empty without one."""
        parts = self.get(name, list, None) or []
        return [_Fields(part, f"{self._where}.{name}.{n}") for n, part in enumerate(parts)]

    def texts(self, name: str) -> dict[str, str]:
        """An object of texts; empty without one."""
        found = self.get(name, dict, None) or {}
        if not all(isinstance(text, str) for text in found.values()):
            raise _unreadable(f"{self._where}.{name}")
        return found

    def numbers(self, name: str) -> tuple[int, ...] | None:
        """A list of whole numbers."""
        found = self.get(name, list, None)
        if found is None:
            return None
        if not all(type(number) is int for number in found):
            raise _unreadable(f"{self._where}.{name}")
        return tuple(found)


def _orders(fields: _Fields) -> tuple[OrderResult, ...]:
    return tuple(
        OrderResult(
            order=part.needed("order", str),
            choice=part.get("choice", int, None),
            reason=part.get("reason", str, ""),
            raw=part.get("raw", str, ""),
            probability=_number(part.get("probability", REAL, None)),
            findings=part.texts("findings"),
        )
        for part in fields.parts("orders")
    )


def _comparison(part: _Fields) -> ComparisonResult:
    pair = part.numbers("responses")
    if pair is None or len(pair) != 2:
        raise _unreadable("answer.comparisons.responses")
    return ComparisonResult(
        responses=(pair[0], pair[1]),
        winner=part.get("winner", int, None),
        consistent=part.get("consistent", bool, False),
        outcome=part.get("outcome", str, ""),
        probability=_number(part.get("probability", REAL, None)),
        orders=_orders(part),
    )


def _number(value: int | float | None) -> float | None:
    return None if value is None else float(value)


def _unreadable(where: str) -> CriticFailed:
    return CriticFailed(
        f"{where}: not what a critic answers: is the URL a critic's, and of this version?",
        code="unreadable_answer",
    )

"""Who may ask how often, and how much at once: the bookkeeping, with the time as an argument."""

from dataclasses import dataclass, field
from typing import Self

from sima_ray.config import ServiceConfig

SLOT_S = 10.0
"""A place that nobody has renewed for so long is free again: its holder is dead."""


class OverQuota(Exception):
    """No place now; `seconds` until it is worth asking again."""

    def __init__(self, seconds: float, message: str) -> None:
        super().__init__(message)
        self.seconds = seconds


@dataclass(frozen=True)
class Allowance:
    """What one token may do; None is no limit.

    Attributes:
        per_minute: Requests. A token that has not asked for a minute may send so many in a row; from then on they
            come back evenly, one every 60 / per_minute seconds.
        at_once: Requests that are being answered.
    """

    per_minute: int | None
    at_once: int | None

    @classmethod
    def of(cls, service: ServiceConfig) -> Self | None:
        """What a service's settings name, if they name a limit."""
        allowance = cls(service.requests_per_minute, service.concurrent_per_token)
        return None if allowance == cls(None, None) else allowance


@dataclass
class Quotas:
    """Every token's bucket, and the places that are taken.

    A token is told by its hash. A place has a name of its own, and the time at which it falls free unless renewed.
    """

    allowance: Allowance
    _buckets: dict[str, tuple[float, float]] = field(default_factory=dict)  # (requests left, when)
    _places: dict[str, dict[str, float]] = field(default_factory=dict)  # token → place → until

    def take(self, token: str, place: str, now: float) -> None:
        """Take a place and one of the minute's requests.

        Raises:
            OverQuota: One of the two is not to be had; nothing was taken.
        """
        places = {name: t for name, t in self._places.get(token, {}).items() if t > now}
        self._places[token] = places
        if self.allowance.at_once is not None and len(places) >= self.allowance.at_once:
            # When another request ends is not known.
            raise OverQuota(1.0, f"over the {self.allowance.at_once} requests at once of a token")
        self._count(token, 1, now, wanted=1)
        if self.allowance.at_once is not None:
            places[place] = now + SLOT_S

    def charge(self, token: str, requests: int, now: float) -> None:
        """Take so many more of the minute's requests, for one that was let in already.

        Raises:
            OverQuota: There are fewer; none was taken. Its seconds are enough for that one and these together, as
                it will ask for a place again.
        """
        self._count(token, requests, now, wanted=requests + 1)

    def _count(self, token: str, requests: int, now: float, wanted: int) -> None:
        per_minute = self.allowance.per_minute
        if per_minute is None:
            return
        left, when = self._buckets.get(token, (float(per_minute), now))
        left = min(float(per_minute), left + max(0.0, now - when) * per_minute / 60)
        if left < requests:
            seconds = (min(wanted, per_minute) - left) * 60 / per_minute
            raise OverQuota(seconds, f"over the {per_minute} requests a minute of a token")
        self._buckets[token] = (left - requests, now)

    def renew(self, held: dict[str, str], now: float) -> None:
        """Keep places (name → token) taken for `SLOT_S` more; one that is not known here becomes so."""
        for place, token in held.items():
            self._places.setdefault(token, {})[place] = now + SLOT_S

    def give_back(self, token: str, place: str) -> None:
        """Free a place; no harm where it is free already."""
        self._places.get(token, {}).pop(place, None)

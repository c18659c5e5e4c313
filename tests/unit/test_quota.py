"""Quotas: the bookkeeping at given times, and what the guard makes of it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_guard import OPEN, SMALL, Echo, ask

from serve_apps.guard import Guard
from serve_apps.quota import SLOT_S, Allowance, OverQuota, Quotas
from sima_ray.config import ServiceConfig


def taken(quotas: Quotas, token: str, place: str, now: float) -> bool:
    try:
        quotas.take(token, place, now)
    except OverQuota:
        return False
    return True


def test_a_minutes_requests_then_evenly() -> None:
    quotas = Quotas(Allowance(per_minute=30, at_once=None))
    assert [taken(quotas, "a", "", 100.0) for _ in range(31)] == [True] * 30 + [False]
    assert taken(quotas, "b", "", 100.0), "another token has its own"
    with pytest.raises(OverQuota, match="30 requests a minute") as over:
        quotas.take("a", "", 100.5)
    assert over.value.seconds == pytest.approx(1.5)
    assert not taken(quotas, "a", "", 101.9) and taken(quotas, "a", "", 102.1)
    assert sum(taken(quotas, "a", "", 1000.0) for _ in range(99)) == 30, "no more is saved up"


@given(st.lists(st.floats(0, 300), min_size=1), st.integers(1, 60))
def test_never_over_the_rate(times: list[float], per_minute: int) -> None:
    """In any time t at most per_minute · (1 + t / 60) pass, and after the seconds named one does."""
    quotas = Quotas(Allowance(per_minute, None))
    passed: list[float] = []
    for now in sorted(times):
        try:
            quotas.take("a", "", now)
        except OverQuota as over:
            assert 0 < over.seconds <= 60 / per_minute + 1e-6
        else:
            passed.append(now)
    for i, start in enumerate(passed):
        for j in range(i, len(passed)):
            assert j - i + 1 <= per_minute * (1 + (passed[j] - start) / 60) + 1e-6


def test_places_are_given_back_by_hand_or_by_time() -> None:
    quotas = Quotas(Allowance(None, at_once=2))
    assert taken(quotas, "a", "1", 0) and taken(quotas, "a", "2", 0)
    assert not taken(quotas, "a", "3", 1) and taken(quotas, "b", "4", 1)
    quotas.give_back("a", "1")
    quotas.give_back("a", "1")
    assert taken(quotas, "a", "3", 1)
    quotas.renew({"2": "a"}, SLOT_S - 1)
    assert not taken(quotas, "a", "5", SLOT_S)
    assert taken(quotas, "a", "5", SLOT_S + 1), "3 was never renewed: its holder is dead"


def test_a_new_keeper_learns_of_places_from_those_who_hold_them() -> None:
    quotas = Quotas(Allowance(None, at_once=1))
    quotas.renew({"1": "a"}, 0)
    assert not taken(quotas, "a", "2", 1)
    quotas.give_back("a", "1")
    assert taken(quotas, "a", "2", 1)


def test_a_refused_place_costs_no_request() -> None:
    quotas = Quotas(Allowance(per_minute=2, at_once=1))
    assert taken(quotas, "a", "1", 0)
    assert not any(taken(quotas, "a", "2", 0) for _ in range(5))
    quotas.give_back("a", "1")
    assert taken(quotas, "a", "2", 0)


def test_one_request_may_cost_several_or_none_of_them() -> None:
    quotas = Quotas(Allowance(per_minute=10, at_once=None))
    quotas.charge("a", 7, 0)
    with pytest.raises(OverQuota) as over:
        quotas.charge("a", 5, 0)
    assert over.value.seconds == pytest.approx(18), "for the request that asks again, too"
    again = over.value.seconds
    assert taken(quotas, "a", "", again)
    quotas.charge("a", 5, again)
    quotas = Quotas(Allowance(per_minute=10, at_once=None))
    quotas.charge("a", 10, 0)
    quotas.charge("b", 10, 0)
    assert not taken(quotas, "a", "", 0)


def test_no_settings_no_quota() -> None:
    assert Allowance.of(ServiceConfig()) is None
    assert Allowance.of(ServiceConfig(requests_per_minute=3)) == Allowance(3, None)


class OnePlace:
    """A quota of one request at once, and a wait of 2.2 s."""

    def __init__(self) -> None:
        self.free = True

    @asynccontextmanager
    async def place(self, token: str) -> AsyncIterator[None]:
        if not self.free:
            raise OverQuota(2.2, "one at a time")
        self.free = False
        try:
            yield
        finally:
            self.free = True

    async def charge(self, token: str, requests: int) -> None:
        raise OverQuota(7, f"no {requests} more")


async def test_over_quota_is_a_429_with_the_seconds_to_wait() -> None:
    echo = Echo()
    echo.go.clear()
    guard = Guard(echo, OPEN, SMALL, OnePlace())
    first = asyncio.create_task(ask(guard))
    while not echo.bodies:
        await asyncio.sleep(0)
    reply = await ask(guard)
    assert (reply.status, reply.error["code"]) == (429, "over_quota")
    assert reply.headers["retry-after"] == "3" and len(echo.bodies) == 1
    echo.go.set()
    assert (await first).status == 200
    assert (await ask(guard, path="/fail")).status == 500
    assert (await ask(guard)).status == 200, "a failure gives its place back"


async def test_a_route_may_charge_for_more() -> None:
    async def three(scope: Any, receive: Any, send: Any) -> None:
        await scope["state"]["charge"](2)

    reply = await ask(Guard(three, OPEN, SMALL, OnePlace()))
    assert (reply.status, reply.headers["retry-after"]) == (429, "7")
    assert reply.error["message"] == "no 2 more"

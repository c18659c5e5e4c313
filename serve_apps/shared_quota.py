"""Quotas that hold over all replicas of an application: one small actor keeps the books, every replica asks it.

A request costs one call to it, about a millisecond, before its body is read. The alternatives: a share of the
limit for each replica is wrong as soon as the load is uneven, and a deployment of Serve's answers more slowly.

The actor is made by the first replica that needs it, and belongs to that replica: it ends with it, and none is
left behind when the application is removed. Whoever misses it makes it anew. Meanwhile, and whenever it does not
answer in time, each replica goes by what it has let in itself, so that nobody is turned away for the actor's death
and nobody gets more than the limit times the number of replicas. A new actor starts with full buckets; the places
that are taken it learns from the replicas, which renew theirs every few seconds. Places of a dead replica are not
renewed, and so fall free after `SLOT_S`.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorDiedError, RayError

from serve_apps.quota import SLOT_S, Allowance, OverQuota, Quotas
from sima_ray.config import ServiceConfig

logger = logging.getLogger("ray.serve")

NAMESPACE = "sima-ray"

ANSWER_S = 1.0
"""For the actor to answer; then the replica decides alone."""

PAUSE_S = 2.0
"""After a failure, until it is asked again."""


class QuotaKeeper:
    """The actor. One call at a time, in the order in which a replica sent them."""

    def __init__(self, allowance: Allowance) -> None:
        self._quotas = Quotas(allowance)

    def take(self, token: str, place: str) -> tuple[float, str] | None:
        """None when the place is taken; else the seconds to wait, and why."""
        try:
            self._quotas.take(token, place, time.monotonic())
        except OverQuota as over:
            return over.seconds, str(over)
        return None

    def charge(self, token: str, requests: int) -> tuple[float, str] | None:
        """As `take`, without a place."""
        try:
            self._quotas.charge(token, requests, time.monotonic())
        except OverQuota as over:
            return over.seconds, str(over)
        return None

    def renew(self, held: dict[str, str]) -> None:
        self._quotas.renew(held, time.monotonic())

    def give_back(self, token: str, place: str) -> None:
        self._quotas.give_back(token, place)


class SharedQuota:
    """One replica's side. It may be made elsewhere and travel: nothing is asked before the first use."""

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self._alone = Quotas(allowance)
        self._held: dict[str, str] = {}
        self._keeper: Any = None
        self._connecting: asyncio.Task[None] | None = None
        self._pause_until = 0.0
        self._renewing: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def place(self, token: str) -> AsyncIterator[None]:
        """A place for one request of this token (a hash).

        Raises:
            OverQuota: There is none.
        """
        place = uuid.uuid4().hex
        await self._asked("take", token, place)
        if self._allowance.at_once is None:
            yield
            return
        self._held[place] = token
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew())
        try:
            yield
        finally:
            del self._held[place]
            self._alone.give_back(token, place)
            if self._keeper is not None:
                self._keeper.give_back.remote(token, place)

    async def charge(self, token: str, requests: int) -> None:
        """Count so many more requests of a minute, for one request that stands for several.

        Raises:
            OverQuota: There are fewer left.
        """
        await self._asked("charge", token, requests)

    async def _asked(self, method: str, *arguments: Any) -> None:
        """Do to the common books what `Quotas.method` does, or, where they are out of reach, to this replica's.

        Raises:
            OverQuota: As that does.
        """
        alone = getattr(self._alone, method)
        if time.monotonic() >= self._pause_until:
            try:
                async with asyncio.timeout(ANSWER_S):
                    if self._keeper is None:
                        await self._connected()
                    keeper: Any = self._keeper
                    refusal = await getattr(keeper, method).remote(*arguments)
            except (RayError, TimeoutError) as error:
                logger.warning("The keeper of quotas does not answer: %s", type(error).__name__)
                self._pause_until = time.monotonic() + PAUSE_S
                if isinstance(error, ActorDiedError):  # else it may be starting, or busy
                    self._keeper = None
            else:
                if refusal is not None:
                    raise OverQuota(*refusal)
                with contextlib.suppress(OverQuota):  # noted, for when the keeper is gone
                    alone(*arguments, time.monotonic())
                return
        alone(*arguments, time.monotonic())

    async def _connected(self) -> None:
        """Once, however many requests wait or give up waiting: the keeper ends with its maker's handle."""
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.create_task(self._connect_in_thread())
        await asyncio.shield(self._connecting)

    async def _connect_in_thread(self) -> None:
        self._keeper = await asyncio.to_thread(self._connect)

    def _connect(self) -> Any:
        """Find the keeper of this application, or make it."""
        app = serve.get_replica_context().app_name
        limits = self._allowance
        actor: Any = ray.remote(QuotaKeeper)
        return actor.options(
            name=f"quotas of {app}: {limits.per_minute} a minute, {limits.at_once} at once",
            namespace=NAMESPACE,
            get_if_exists=True,
            num_cpus=0,
        ).remote(limits)

    async def _renew(self) -> None:
        """Say that the places held here still are, for as long as there are any."""
        while self._held:
            await asyncio.sleep(SLOT_S / 4)
            self._alone.renew(self._held, time.monotonic())
            if self._keeper is not None:
                with contextlib.suppress(RayError):
                    self._keeper.renew.remote(dict(self._held))


def shared_quota(service: ServiceConfig) -> SharedQuota | None:
    """What a service's settings ask for; None where they set no limit."""
    allowance = Allowance.of(service)
    return None if allowance is None else SharedQuota(allowance)

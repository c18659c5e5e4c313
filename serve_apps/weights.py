"""The weights of one replica: which answer, and how others take their place between two requests.

Knows no engine: loading and checking are given, so that a fake engine swaps by these very rules.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from serve_apps.gate import Gate
from sima_ray.errors import last_line
from sima_ray.ports import JsonDict

logger = logging.getLogger("ray.serve")

Load = Callable[[str], Awaitable[None]]
"""Load the weights of a folder; requests are held back meanwhile."""
Check = Callable[[JsonDict], Awaitable[float]]
"""How far the weights are from a sample (see `sima_ray.policy.sample`); raises when that is too far."""


class Weights:
    """One replica's weights.

    Args:
        model: The folder of the weights that are loaded now.
        load: See `Load`.
        check: See `Check`.
    """

    def __init__(self, model: str, load: Load, check: Check) -> None:
        self._gate = Gate()
        self._load, self._check = load, check
        self._loaded = model
        self._version = ""  # empty while the replica starts
        self._difference: float | None = None
        self._swap_error = ""
        self._broken = ""

    @asynccontextmanager
    async def answering(self) -> AsyncIterator[str]:
        """For the time of one request: the version that answers it, all of it."""
        async with self._gate.together():
            yield self._version

    async def swap(self, model: str, version: str, sample: JsonDict | None = None) -> None:
        """Put other weights in place between two requests.

        Weights that do not load or that fail the sample answer nobody: the former ones are loaded again, and
        `state` tells why. When even this fails the replica is unhealthy, and Serve replaces it.

        Args:
            model: The folder.
            version: Their name in every answer.
            sample: What they must compute. With one they are loaded anew even from the same folder.
        """
        async with self._gate.alone():
            self._swap_error = ""
            starting = not self._version
            try:
                if model != self._loaded or (sample and not starting):
                    await self._load(model)
                difference = await self._check(sample) if sample else None
            except Exception as error:
                if starting:  # nothing to fall back to
                    raise
                self._swap_error = last_line(error).removeprefix(
                    "Call to collective_rpc method failed: "
                )
                logger.exception("The weights of %r are not taken", version)
                await self._fall_back()
                return
            self._loaded, self._version, self._difference = model, version, difference

    def state(self) -> JsonDict:
        """The version that answers, how far it is from its sample, and why the last swap failed, if it did."""
        return {
            "version": self._version,
            "difference": self._difference,
            "swap_error": self._swap_error,
        }

    def check_health(self) -> None:
        """Raises when it is in doubt which weights are loaded."""
        if self._broken:
            raise RuntimeError(self._broken)

    async def _fall_back(self) -> None:
        try:
            await self._load(self._loaded)
        except Exception as error:
            self._broken = f"weights in doubt after a failed swap: {last_line(error)}"
            logger.exception("Loading the former weights failed")

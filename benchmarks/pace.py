"""Keeping requests in flight."""

import asyncio
import time
from collections.abc import Awaitable, Callable


async def rate(ask: Callable[[], Awaitable[object]], in_flight: int, seconds: float) -> float:
    """Answers a second while so many requests are in flight."""
    start, answered = time.perf_counter(), 0

    async def worker() -> None:
        nonlocal answered
        while time.perf_counter() - start < seconds:
            await ask()
            answered += 1

    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return answered / (time.perf_counter() - start)

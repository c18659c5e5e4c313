"""Awaiting several things at once, of which none goes on for nothing."""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, in order.

    Raises:
        Exception: The first error of any, itself and not in a group, once the others are cancelled and have
            ended: `asyncio.gather` would leave them running, and an engine computing.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]

"""Signals of a command that has started a cluster: whatever ends it must end the cluster too."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def terminable() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and a closed terminal end the block alike, so that clusters are ended too."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # Ctrl-C too: a library may have put a handler of its own in Python's place.
    with _handled(interrupt, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let no signal end the block: a second Ctrl-C must not leave half a cluster behind."""
    with _handled(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield


@contextmanager
def _handled(handler: Any, *signals: signal.Signals) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)

"""Progress lines: written by a job to its log, read back and shown by whoever follows it.

A job's log also holds what Ray, vLLM and the others say. The lines for people start with `MARK`; `show` passes
only those on, so that a terminal stays readable and the full log stays complete.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

MARK = "[sima] "
UPDATE = "… "  # after the stage's name: a line that the next one of the same stage replaces
_NAME_WIDTH = 12
_UPDATE_EVERY_S = 2.0


class Out(Protocol):
    """Where lines go: a text stream, or anything with these two."""

    def write(self, text: str, /) -> int: ...

    def flush(self) -> None: ...


class Stage:
    """One stage's lines: any number of updates, then its result."""

    def __init__(self, name: str, out: Out) -> None:
        self.name = name
        self.started = time.monotonic()
        self._out = out
        self._last = float("-inf")
        self._result: str | None = None

    @property
    def seconds(self) -> float:
        """Wall time since the stage began."""
        return time.monotonic() - self.started

    def update(self, text: str) -> None:
        """Say how far the stage is; dropped when the last update was a moment ago."""
        now = time.monotonic()
        if now - self._last >= _UPDATE_EVERY_S:
            self._last = now
            _write(self._out, f"{self.name:<{_NAME_WIDTH}} {UPDATE}{text}")

    def result(self, text: str) -> None:
        """Set what the stage's last line says."""
        self._result = text

    def finish(self) -> None:
        """Write the stage's last line, with its wall time."""
        text = f" · {self._result}" if self._result else ""
        _write(self._out, f"{self.name:<{_NAME_WIDTH}} {duration(self.seconds)}{text}")


class Progress:
    """Writes stages to a stream, standard output unless told otherwise."""

    def __init__(self, out: Out | None = None) -> None:
        self._out = out or sys.stdout

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """A stage: its last line is written when the block ends without an error."""
        stage = Stage(name, self._out)
        yield stage
        stage.finish()

    def say(self, text: str) -> None:
        """A line of its own."""
        _write(self._out, text)


class Screen:
    """Shows the marked lines of a log: on a terminal, updates of a stage replace one another.

    A stage can write to one, too: that of a command which works in this very process.
    """

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._terminal = self._out.isatty()
        self._pending = False
        self._last_update = float("-inf")

    def write(self, text: str, /) -> int:
        """Show a line, as `line` does."""
        self.line(text)
        return len(text)

    def flush(self) -> None:
        """What was written is shown already."""

    def line(self, raw: str) -> None:
        """Show one line of a job's log, if it is meant for people."""
        if not raw.startswith(MARK):
            return
        text = raw[len(MARK) :].rstrip()
        if _is_update(text):
            self._update(text)
        else:
            self._out.write(("\r\033[K" if self._pending else "") + text + "\n")
            self._pending = False
        self._out.flush()

    def _update(self, text: str) -> None:
        if self._terminal:
            self._out.write(f"\r\033[K{text}")
            self._pending = True
        elif time.monotonic() - self._last_update >= 5 * _UPDATE_EVERY_S:
            self._last_update = time.monotonic()
            self._out.write(text + "\n")


def shown(log: Iterable[str]) -> list[str]:
    """The lines for people of a log that is read as a whole: an update only where nothing came after it."""
    lines = [line[len(MARK) :].rstrip() for line in log if line.startswith(MARK)]
    return [line for line in lines[:-1] if not _is_update(line)] + lines[-1:]


def duration(seconds: float) -> str:
    """Seconds as a person reads them: "0.4 s", "73 s", "4 min 05 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _is_update(line: str) -> bool:
    return line[_NAME_WIDTH + 1 :].startswith(UPDATE)


def _write(out: Out, text: str) -> None:
    out.write(f"{MARK}{text}\n")
    out.flush()

"""The process in which lmms-eval runs, on our side: orders go in, replies and progress come out."""

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sima_ray.errors import ClusterError, ConfigError, why
from sima_ray.runtime import lmms_runner

Progress = Callable[[str, int, int], None]
"""Called with what is counted ("answers", "scores"), how many are done, and of how many."""

_COUNTED = {"Model Responding": "answers", "Postprocessing": "scores"}
_BAR = re.compile(rf"({'|'.join(_COUNTED)}):.*?(\d+)/(\d+) \[")
_NOT_FOR_IT = ("HF_HUB_OFFLINE", "VIRTUAL_ENV")
"""A job of ours asks no model hub; lmms-eval's datasets come from there."""

_END_TIMEOUT_S = 10.0


class LmmsProcess:
    """lmms-eval in its own environment, for task after task; starts with the first, and again where it died."""

    def __init__(
        self,
        python: Path | str,
        token: str,
        variables: Sequence[str] = (),
        on_line: Callable[[str], None] = print,
    ) -> None:
        """
        Args:
            python: Of the environment that has lmms-eval.
            token: Of the endpoint; it goes through the environment, never over a command line.
            variables: "NAME" must be set here and is passed on; "NAME=VALUE" is set.
            on_line: Takes what lmms-eval says.

        Raises:
            ConfigError: A variable that is not set here; or no such Python.
        """
        if not Path(python).exists():
            raise ConfigError(f"--python {python}: no such file on the cluster's head node")
        self.command = (str(python), "-I", "-u", lmms_runner.__file__)
        self._environment = environment(os.environ, variables) | {lmms_runner.TOKEN: token}
        self._on_line = on_line
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin and kind is None:
            process.stdin.close()
        else:
            process.kill()
        try:
            process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @property
    def pid(self) -> int | None:
        """Of the process; None where none runs."""
        return self._process and self._process.pid

    def order(self, order: Mapping[str, Any], on_progress: Progress | None = None) -> str | None:
        """Have an order of `lmms_runner` carried out; what went wrong, or None.

        Raises:
            ClusterError: The environment's Python cannot be started.
        """
        process = self._running()
        assert process.stdin and process.stdout
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words say why
        last = ""
        for line in _lines(process.stdout.fileno()):
            if line.startswith(lmms_runner.REPLY):
                return json.loads(line.removeprefix(lmms_runner.REPLY))["error"]
            if bar := bar_of(line):
                if on_progress is not None:
                    on_progress(*bar)
            elif line.strip():
                last = line.strip()
                self._on_line(line)
        self._process = None
        return f"lmms-eval's process ended with {process.wait()}: {last[:300]}"

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            try:
                self._process = subprocess.Popen(
                    self.command,
                    env=self._environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            except OSError as error:
                raise ClusterError(f"{self.command[0]}: cannot be started: {why(error)}") from error
        return self._process


def environment(ours: Mapping[str, str], variables: Sequence[str]) -> dict[str, str]:
    """The variables of lmms-eval's process: ours without those that are for jobs alone, and what was asked for.

    Raises:
        ConfigError: A variable that is to be passed on and is not set.
    """
    theirs = {name: value for name, value in ours.items() if name not in _NOT_FOR_IT}
    for variable in variables:
        name, given, value = variable.partition("=")
        if not given and name not in ours:
            raise ConfigError(
                f"--env {name}: not set on the cluster's head node, where lmms-eval runs"
            )
        theirs[name] = value if given else ours[name]
    return theirs


def bar_of(line: str) -> tuple[str, int, int] | None:
    """What a progress bar of lmms-eval counts, how many are done, and of how many; None for any other line."""
    bar = _BAR.search(line)
    return bar and (_COUNTED[bar[1]], int(bar[2]), int(bar[3]))


def _lines(descriptor: int) -> Iterator[str]:
    """What is written to a pipe, split where a line or a progress bar begins anew."""
    rest = b""
    while chunk := os.read(descriptor, 1 << 16):
        *lines, rest = re.split(rb"[\r\n]", rest + chunk)
        yield from (line.decode(errors="replace") for line in lines)
    if rest:
        yield rest.decode(errors="replace")

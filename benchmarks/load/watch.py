"""Looks at the memory and the file descriptors of every process of a service, from a thread."""

import re
import threading
import time
from types import TracebackType
from typing import Self

import psutil

from benchmarks.load.figures import Sample

ROLES = {
    "critic": r"ray::ServeReplica:critic:",
    "policy": r"ray::ServeReplica:policy:",
    "engine": r"VLLM::EngineCore",
    "proxy": r"ray::ProxyActor",
    "controller": r"ray::ServeController",
    "quotas": r"ray::QuotaKeeper",
    "raylet": r"\S+/raylet ",
    "gcs": r"\S+/gcs_server ",
}
"""Who does what, by how a process calls itself."""


class Watch:
    """Samples until the block ends.

    Attributes:
        samples: By process; one that takes another's place has a name of its own ("critic", "critic 2").
        replaced: After the block: those that have ended in it, or took another's place.
    """

    def __init__(self, root: int, every_s: float) -> None:
        """
        Args:
            root: The process whose descendants are looked at.
            every_s: Between two looks.
        """
        self.samples: dict[str, list[Sample]] = {}
        self.replaced: list[str] = []
        self._root, self._every_s = psutil.Process(root), every_s
        self._names: dict[psutil.Process, str] = {}
        self._start = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        ended = {name for process, name in self._names.items() if not process.is_running()}
        self.replaced = sorted(ended | {name for name in self.samples if " " in name})

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self._look()

    def _look(self) -> None:
        for process in self._root.children(recursive=True):
            try:
                name = self._name(process)
                if name is None:
                    continue
                with process.oneshot():
                    sample = Sample(
                        time.monotonic() - self._start,
                        process.memory_info().rss,
                        process.num_fds(),
                    )
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            self.samples.setdefault(name, []).append(sample)

    def _name(self, process: psutil.Process) -> str | None:
        if process in self._names:
            return self._names[process]
        title = " ".join(process.cmdline())
        role = next((role for role, words in ROLES.items() if re.match(words, title)), None)
        if role is None:
            return None
        others = sum(name.split()[0] == role for name in self._names.values())
        name = role if not others else f"{role} {others + 1}"
        self._names[process] = name
        return name

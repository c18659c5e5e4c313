"""Processes that change Serve's declared applications at once lose none of their changes."""

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from sima_ray.config import ServiceConfig
from sima_ray.errors import ServiceError

PROCESSES, APPS = 4, 2


@pytest.fixture(scope="module", autouse=True)
def serve_running(ray_cluster: None) -> Iterator[None]:
    from ray import serve

    from sima_ray.runtime.serving import start_serve

    start_serve(port=0)
    yield
    serve.shutdown()


def declared(name: str) -> dict[str, Any]:
    """An application without replicas: only its declaration matters here."""
    from serve_apps.fixed_time import FixedTime, declaration
    from sima_ray.runtime.deployment import scaling_options

    scaling = scaling_options(ServiceConfig(min_replicas=0))
    scaling["autoscaling_config"]["initial_replicas"] = 0
    return declaration(name, FixedTime(), scaling)


def work(process: int, declarations: list[dict[str, Any]]) -> int:
    """Add all applications, and remove the first again."""
    from sima_ray.runtime.applications import apply, withdraw

    for app in declarations:
        apply(app)
    assert withdraw(declarations[0]["name"])
    return os.getpid()


def test_changes_from_many_processes_are_all_kept() -> None:
    from ray import cloudpickle

    from sima_ray.runtime.applications import applications

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    task: Any = ray.remote(num_cpus=1)(work)
    names = [[f"app-{p}-{k}" for k in range(APPS)] for p in range(PROCESSES)]
    started = time.monotonic()
    running = [task.remote(p, [declared(name) for name in mine]) for p, mine in enumerate(names)]
    pids = ray.get(running, timeout=400)
    seconds = time.monotonic() - started
    print(f"{PROCESSES * (APPS + 1)} changes of {PROCESSES} processes in {seconds:.1f} s")
    assert len(set(pids)) == PROCESSES
    assert set(applications()) == {name for mine in names for name in mine[1:]}


def test_a_change_is_made_anew_where_others_were_faster() -> None:
    from sima_ray.runtime.applications import applications, apply, change, withdraw

    apply(declared("raced"))
    calls: list[str] = []

    def slow(app: dict[str, Any]) -> dict[str, Any]:
        calls.append("slow")
        if len(calls) == 1:  # another process is faster
            apply(declared("faster"))
        return app | {"args": app["args"] | {"seconds": 0.5}}

    before, after = change("raced", slow)
    assert calls == ["slow", "slow"]
    assert (before["args"]["seconds"], after["args"]["seconds"]) == (0.1, 0.5)
    assert applications()["raced"] == after and "faster" in applications()
    assert withdraw("raced") and not withdraw("raced")


def test_no_change_where_it_cannot_be_made() -> None:
    from sima_ray.runtime.applications import applications, change

    before = applications()
    with pytest.raises(ServiceError, match="no application 'none' is deployed; there are: app-0-1"):
        change("none", dict)
    assert applications() == before

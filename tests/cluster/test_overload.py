"""Ten times as many requests as the service and its queue take: refused in our own words, and well soon after."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.load.clients import Door
from benchmarks.load.overload import LIMITS, missed, overload, well_after
from benchmarks.load.service import Engine, deployed
from sima_ray.config import RunConfig

SECONDS = 8.0


@pytest.fixture
def door(ray_cluster: None) -> Iterator[Door]:
    from ray import serve

    from sima_ray.runtime.serving import start_serve

    start_serve(port=0)
    run = RunConfig.load(Path("configs/demo.yaml"))
    with deployed(Engine("fixed", run, seconds=0.2), LIMITS) as service:
        yield service.door
    serve.shutdown()


def test_an_overload_is_refused_and_passes(door: Door) -> None:
    load = overload(door, SECONDS)
    print(f"{dict(load.statuses)} in {load.seconds:.1f} s")
    assert missed(load, well_after(door, load.ended)) == []
    assert load.statuses[200] and load.statuses[503]

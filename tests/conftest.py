"""Fixtures that all tests share: one local Ray a session, and one untrained tiny LLaVA."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sima_ray.runtime.cluster import SERVE_ENVIRONMENT  # imports no ray

# Before ray, torch or transformers are imported anywhere.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray on loopback only, as `sima up` starts it (see sima_ray/runtime/cluster.py).
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
for name, value in SERVE_ENVIRONMENT.items():
    os.environ.setdefault(name, value)
# A shell that starts the tests in the background has them ignore it, and so would what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray of its own, with more logical CPUs than this machine has: tests wait more than they compute."""
    import ray

    with tempfile.TemporaryDirectory(
        prefix="sima-ray-", dir="/tmp", ignore_cleanup_errors=True
    ) as temp:
        ray.init(num_cpus=8, include_dashboard=False, _temp_dir=temp, configure_logging=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tiny LLaVA: the published layout, in a few MB."""
    from sima_ray.policy.tiny import make_tiny_llava

    return make_tiny_llava(tmp_path_factory.mktemp("tiny-llava"))

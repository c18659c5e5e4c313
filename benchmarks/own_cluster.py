"""A local cluster with Serve for one benchmark, ended with it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from sima_ray.runtime import cluster


@contextmanager
def own_cluster(cpus: int = 4) -> Iterator[cluster.LocalCluster]:
    """Start it, connect this process to it, and start Serve on a free port."""
    running = cluster.start(cpus=cpus)
    try:
        # A thread of Serve's that outlives the connection would start another Ray on this machine.
        os.environ.update(running.environment | {"RAY_ENABLE_AUTO_CONNECT": "0"})
        import ray
        from ray import serve

        from sima_ray.runtime.serving import start_serve

        ray.init(address=running.gcs, log_to_driver=False)
        try:
            start_serve(port=cluster.free_port())
            yield running
        finally:
            serve.shutdown()
            ray.shutdown()
    finally:
        cluster.stop(running)

"""Run by test_elastic_nodes.py in a process of its own: a cluster that grows and shrinks by simulated nodes.

Ray's own `AutoscalingCluster` would end every Ray on the machine; this one starts and ends only its own processes.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from constant_load import Load, wait_for

from sima_ray.config import ServiceConfig
from sima_ray.runtime import cluster

HEAD_ID = "0" * 55 + "1"
SERVICE = ServiceConfig(
    max_replicas=3,
    target_ongoing_requests=2,
    max_ongoing_requests=8,
    upscale_delay_s=0.5,
    downscale_delay_s=1,
)


def config(gcs: str) -> dict[str, Any]:
    """A head with one CPU, and at most two workers with one each."""
    lists = ("initialization_commands", "setup_commands", "head_setup_commands", "rsync_filter")
    more = ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    node: dict[str, Any] = {"resources": {"CPU": 1}, "node_config": {}}
    return {
        "cluster_name": "simulated",
        "max_workers": 2,
        "upscaling_speed": 10,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": gcs,
        },
        "available_node_types": {
            "ray.head.default": node | {"max_workers": 0},
            "worker": node | {"min_workers": 0, "max_workers": 2},
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        **{name: [] for name in (*lists, *more)},
    }


@contextlib.contextmanager
def elastic_cluster() -> Iterator[str]:
    """Its address."""
    with tempfile.TemporaryDirectory(
        prefix="sima-", dir="/tmp", ignore_cleanup_errors=True
    ) as temp:
        port = cluster.free_port()
        gcs = f"127.0.0.1:{port}"
        file = Path(temp) / "autoscaler.json"
        file.write_text(json.dumps(config(gcs)))
        environment = {
            **os.environ,
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *("--node-ip-address", "127.0.0.1", "--port", str(port), "--num-cpus", "1"),
            *("--include-dashboard", "false", "--temp-dir", f"{temp}/ray"),
            *("--ray-client-server-port", str(cluster.free_port())),
            *("--disable-usage-stats", f"--autoscaling-config={file}"),
        ]
        process = subprocess.Popen(
            command, env=environment, stdout=sys.stderr, start_new_session=True
        )
        try:
            yield gcs
        finally:
            family = [psutil.Process(process.pid)]
            family += family[0].children(recursive=True)
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.terminate()
            _, alive = psutil.wait_procs(family, timeout=5)
            for member in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()


def connect(gcs: str) -> None:
    """Connect as soon as the cluster answers."""
    import ray

    def answers() -> bool:
        try:
            ray.init(address=gcs, log_to_driver=False, configure_logging=False)
        except Exception:  # not yet: Ray raises many kinds
            return False
        return True

    wait_for(answers, 60)


def main() -> None:
    """Load up, nodes join, load down, nodes go; print what happened."""
    with elastic_cluster() as gcs:
        connect(gcs)
        import ray
        from ray import serve

        from serve_apps.fixed_time import FixedTime, declaration
        from sima_ray.runtime.applications import apply, wait
        from sima_ray.runtime.client import connect_policy
        from sima_ray.runtime.deployment import scaling_options
        from sima_ray.runtime.serving import running_replicas, start_serve

        def nodes() -> int:
            return sum(node["Alive"] for node in ray.nodes())

        def replicas() -> int:
            return len(running_replicas("policy"))

        start_serve(port=0)
        apply(declaration("policy", FixedTime(cpus=1), scaling_options(SERVICE)))
        wait("policy", 60)
        before = nodes()
        with Load(connect_policy(retries=5, timeout_s=60), 16) as load:
            up = wait_for(lambda: replicas() == 3, 120)
            most = nodes()
            load.wait_for_more(50)
        down = wait_for(lambda: replicas() == 1 and nodes() == 1, 120)
        found = {
            "nodes": [before, most, nodes()],
            "seconds": [round(up, 1), round(down, 1)],
            "answers": len(load.answers),
            "failures": [str(failure) for failure in load.failures],
        }
        print(json.dumps(found))
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    # Before Ray is imported: loopback stays loopback (see sima_ray/runtime/cluster.py).
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    main()

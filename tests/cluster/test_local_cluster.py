"""`sima up`'s cluster: on loopback only, closed to those without the token, gone when ended."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from constant_load import wait_for

from sima_ray.config import RunConfig
from sima_ray.errors import ClusterError, JobFailed
from sima_ray.runtime import cluster, submission

DASHBOARD = (
    *("/api/jobs/", "/api/version", "/api/serve/applications/", "/nodes?view=summary"),
    *("/logical/actors", "/api/v0/tasks", "/api/v0/logs", "/metrics", "/events"),
    *("/worker/traceback", "/api/cluster_status", "/api/packages/gcs/x"),
)
"""Routes of Ray's dashboard that tell or do something; its empty page and its health are open."""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.LocalCluster]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIMA_HOME", str(home))
        running = cluster.up(cpus=2, gpus=0)
        yield running
        if cluster.running():
            cluster.down()


def family(running: cluster.LocalCluster) -> list[psutil.Process]:
    root = psutil.Process(running.pid)
    return [root, *root.children(recursive=True)]


def agents(running: cluster.LocalCluster) -> list[int]:
    """Ports of a node's agents that take jobs or commands over HTTP, once they are there."""

    def found() -> list[int]:
        return [
            connection.laddr.port
            for process in family(running)
            for connection in process.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
            and any("Agent" in part for part in process.cmdline())
            and answers_http(connection.laddr.port)
        ]

    wait_for(lambda: len(found()) >= 2)
    return found()


def answers_http(port: int) -> bool:
    """Whether it is a port of HTTP, other than that of figures for Prometheus, which is open (on loopback)."""
    try:
        return not httpx.get(f"http://127.0.0.1:{port}/").text.startswith("# HELP")
    except httpx.HTTPError:
        return False


def test_listens_on_loopback_only(local: cluster.LocalCluster) -> None:
    outward = [
        (process.name(), connection.laddr)
        for process in family(local)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
        and not connection.laddr.ip.removeprefix("::ffff:").startswith("127.")
    ]
    assert not outward


def test_wants_the_token_at_every_door(local: cluster.LocalCluster) -> None:
    """No token, a wrong one, one of a cluster that was; at the dashboard, the job port and the agents."""
    posted = {"entrypoint": "echo"}
    doors = [
        ("POST", f"{local.address}/api/jobs/"),
        ("PUT", f"{local.address}/api/serve/applications/"),
    ]
    doors += [("GET", f"{local.address}{path}") for path in DASHBOARD]
    doors += [
        (method, f"http://127.0.0.1:{port}/api/job_agent/jobs/")
        for port in agents(local)
        for method in ("GET", "POST")
    ]
    for method, url in doors:
        assert httpx.request(method, url, json=posted).status_code in (401, 403), url
        for wrong in ("0" * 64, "0"):
            headers = {"Authorization": f"Bearer {wrong}"}
            reply = httpx.request(method, url, json=posted, headers=headers)
            assert reply.status_code in (401, 403), (url, wrong)
    right = {"Authorization": f"Bearer {Path(local.token_file).read_text()}"}
    assert httpx.get(f"{local.address}/api/jobs/", headers=right).json() == []


def test_no_stranger_joins(local: cluster.LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0" * 64)
    environment = os.environ | local.environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    join = f"import ray; ray.init({local.gcs!r}); print('inside')"
    done = subprocess.run(
        [sys.executable, "-c", join], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode != 0 and "inside" not in done.stdout
    assert "authentic" in done.stderr.lower()


def test_is_found_and_not_started_twice(local: cluster.LocalCluster) -> None:
    assert cluster.running() == local
    assert submission.find_cluster(None).address == local.address
    with pytest.raises(ClusterError, match="up already"):
        cluster.up(cpus=2)


def test_a_failing_job_fails_the_command(local: cluster.LocalCluster, tmp_path: Path) -> None:
    config = RunConfig.parse(
        {
            "name": "failing",
            "runs": str(tmp_path),
            "data": {"prompts": str(tmp_path / "none.jsonl"), "images": str(tmp_path)},
            "policy": {"model": str(tmp_path / "model")},
        }
    )
    target = submission.find_cluster(None)
    job = submission.submit("preferences", config, target)
    lines: list[str] = []
    with pytest.raises(JobFailed, match=job):
        submission.follow(job, target, lines.append)
    assert any(line.startswith("[sima] error: ") and "none.jsonl" in line for line in lines)


def test_nothing_is_left_when_it_ends(local: cluster.LocalCluster) -> None:
    processes = family(local)
    cluster.down()
    assert [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert not Path(local.temp_dir).exists()
    assert cluster.running() is None
    with pytest.raises(ClusterError, match="no local cluster is up"):
        cluster.down()

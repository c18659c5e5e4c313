"""`sima up`'s cluster: on loopback only, closed to those without the token, gone when ended."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from sima_ray.config import RunConfig
from sima_ray.errors import ClusterError, JobFailed
from sima_ray.runtime import cluster, submission


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


def test_listens_on_loopback_only(local: cluster.LocalCluster) -> None:
    outward = [
        (process.name(), connection.laddr)
        for process in family(local)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
        and not connection.laddr.ip.removeprefix("::ffff:").startswith("127.")
    ]
    assert not outward


def test_wants_the_token(local: cluster.LocalCluster) -> None:
    url = f"{local.address}/api/jobs/"
    assert httpx.get(url).status_code == httpx.codes.UNAUTHORIZED
    wrong = {"Authorization": f"Bearer {'0' * 64}"}
    assert httpx.get(url, headers=wrong).status_code in (401, 403)
    right = {"Authorization": f"Bearer {Path(local.token_file).read_text()}"}
    assert httpx.get(url, headers=right).status_code == httpx.codes.OK


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

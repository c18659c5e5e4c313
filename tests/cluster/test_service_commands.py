"""`sima scale`, `promote`, `unserve` against a cluster of `sima up`, as jobs: what they print, how they exit."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import grpc
import psutil
import pytest

from sima_ray.policy.checkpoint import fingerprint
from sima_ray.policy.sample import VERSION_FILE
from sima_ray.runtime import cluster

Sima = Callable[..., "subprocess.CompletedProcess[str]"]

DEPLOY = """
import sys
import ray
from serve_apps.fixed_time import FixedTime, declaration
from sima_ray.config import ServiceConfig
from sima_ray.runtime import applications, deployment, serving
ray.init(address="auto", log_to_driver=False)
serving.start_serve(port=0)
scaling = deployment.scaling_options(ServiceConfig(max_replicas=2))
applications.apply(declaration(sys.argv[1], FixedTime(cpus=1), scaling))
applications.wait(sys.argv[1], 60)
"""


def deploy(name: str) -> None:
    running = cluster.running()
    assert running
    environment = {**os.environ, **running.environment, "RAY_ADDRESS": running.gcs}
    subprocess.run([sys.executable, "-c", DEPLOY, name], env=environment, check=True, timeout=400)


@pytest.fixture(scope="module")
def sima(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sima]:
    """The command line, beside a cluster with a fake policy on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIMA_HOME", str(tmp_path_factory.mktemp("home")))
        cluster.up(cpus=4, gpus=0)

        def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
            command = [str(Path(sys.executable).parent / "sima"), *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)

        try:
            deploy("fake")
            yield run
        finally:
            cluster.down()


def test_replicas_want_the_clusters_token(sima: Sima) -> None:
    """Each listens for Serve's own calls, which carry pickles."""
    running = cluster.running()
    assert running
    ports = [
        connection.laddr.port
        for process in psutil.Process(running.pid).children(recursive=True)
        if "ServeReplica" in "".join(process.cmdline())
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.ip == "::"
    ]
    assert ports
    token = Path(running.token_file).read_text()
    for port, (sent, refused) in product(ports, ((None, True), ("0" * 64, True), (token, False))):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            metadata = () if sent is None else (("authorization", f"Bearer {sent}"),)
            with pytest.raises(grpc.RpcError) as error:  # the request is empty
                call(b"", metadata=metadata, timeout=10)
        assert (error.value.code() == grpc.StatusCode.UNAUTHENTICATED) == refused  # pyright: ignore[reportAttributeAccessIssue]


def test_scale(sima: Sima) -> None:
    done = sima("scale", "2", "--app", "fake", "--wait")
    assert done.returncode == 0, done
    assert "fake: 1 to 2 → 2 replicas" in done.stdout and "2 running" in done.stdout
    done = sima("scale", "--app", "fake", "--min", "1", "--max", "3")
    assert (done.returncode, "fake: 2 → 1 to 3 replicas" in done.stdout) == (0, True), done


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (
            ("9", "--app", "fake"),
            "9 replicas of 1 CPU each are asked for; the cluster's 1 nodes",
            1,
        ),
        (
            ("1", "--app", "nobody"),
            "no policy application 'nobody' is deployed; there are: fake",
            1,
        ),
        (("--min", "4", "--app", "fake"), "at least 4 and at most 3 replicas cannot be", 2),
        ((), "give a number of replicas, or --min and --max", 2),
        (("1", "--app", "a; rm"), "--app a; rm: letters", 2),
    ],
)
def test_scale_refused(sima: Sima, arguments: tuple[str, ...], words: str, code: int) -> None:
    done = sima("scale", *arguments)
    assert words in done.stdout + done.stderr
    assert done.returncode == code


def test_promote(sima: Sima, tiny_llava: Path, tmp_path: Path) -> None:
    good = tmp_path / "run" / "round-1" / "policy"
    shutil.copytree(tiny_llava, good)
    sample = {"cases": 1, "logprobs": []}
    written = {"version": fingerprint(good), "sample": sample}
    (good / VERSION_FILE).write_text(json.dumps(written))
    done = sima("promote", str(good), "--app", "fake")
    assert done.returncode == 0, done
    assert "fake: base → run-round-1 on " in done.stdout
    assert "a token from the sample written when they were merged" in done.stdout

    bad = Path(shutil.copytree(good, tmp_path / "bad"))
    written["sample"] = {**sample, "held": ["something else"]}
    (bad / VERSION_FILE).write_text(json.dumps(written))
    done = sima("promote", str(bad), "--app", "fake")
    assert done.returncode == 1, done
    assert "'bad' could not be loaded: the weights compute something else" in done.stdout
    assert "'run-round-1' answers again, on all" in done.stdout

    done = sima("promote", str(tmp_path / "none"), "--app", "fake")
    assert (done.returncode, "no such model folder" in done.stdout) == (1, True), done


def test_unserve(sima: Sima) -> None:
    deploy("other")
    deploy("critic-fake")  # what is looked at is its name
    done = sima("unserve", "--app", "nobody")
    words = "no application 'nobody' is deployed; there are: critic-fake, fake, other"
    assert (done.returncode, words in done.stdout) == (1, True), done
    done = sima("unserve", "--app", "fake")
    assert (done.returncode, "removed critic-fake and fake" in done.stdout) == (0, True), done
    done = sima("unserve", "--app", "fake")
    words = "no application 'fake' is deployed; there are: other"
    assert (done.returncode, words in done.stdout) == (1, True), done

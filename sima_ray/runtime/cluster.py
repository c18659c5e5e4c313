"""A local Ray cluster of our own: token on, loopback only, free ports, ended by process id.

`sima up`/`sima down` and the demo use it. A cluster that is up is described by one JSON file, so that later
commands find it without being told an address.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil

from sima_ray.errors import ClusterError
from sima_ray.runtime.sockets import free_ports, is_free

LOOPBACK = "127.0.0.1"

SERVE_ENVIRONMENT = {
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 * 2**20),
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}
"""Of every process of a cluster: Serve's HTTP proxy calls replicas straight, and not through Ray's task machinery,
which would cost the critic a quarter of its throughput (`benchmarks.load`). Calls through handles stay as they
are: over gRPC a router learns a replica's queue at the end of a call only (Ray 2.60), and misplaces requests.
An answer is one message, 4 MiB at most by Ray's default: a batch of critiques may be longer.
A proxy that is not up in three times this long is ended, and with it what waits for it: a busy machine takes more
than Ray's three times 5 s.
The controller asks for the cluster's state twice a second, not ten times, which two cores shared with an engine
feel: of 136 s of a run it and the GCS computed 8 s, and now 4.
"""

_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """A running local cluster.

    Attributes:
        address: The dashboard's URL, where jobs are submitted.
        gcs: "HOST:PORT" of the cluster itself, for `ray.init`.
        pid: The process that holds the cluster; ending it ends all of it.
        temp_dir: Ray's own temp folder, with its logs.
        token_file: The bearer token that every request must carry.
    """

    address: str
    gcs: str
    pid: int
    temp_dir: str
    token_file: str

    @property
    def environment(self) -> dict[str, str]:
        """Variables that let a process talk to this cluster."""
        return _environment(self.token_file)

    @property
    def alive(self) -> bool:
        """Whether the process that holds the cluster runs and is still ours."""
        try:
            return self.temp_dir in " ".join(psutil.Process(self.pid).cmdline())
        except psutil.Error:
            return False


def home() -> Path:
    """Where the state of local clusters is kept: $SIMA_HOME, or ~/.sima."""
    return Path(os.environ.get("SIMA_HOME", "~/.sima")).expanduser()


def state_file() -> Path:
    """The description of the cluster that `sima up` started."""
    return home() / "cluster.json"


def running() -> LocalCluster | None:
    """The cluster that `sima up` started, if it still runs."""
    try:
        cluster = LocalCluster(**json.loads(state_file().read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return cluster if cluster.alive else None


def up(cpus: int, gpus: int | None = None, port: int | None = None) -> LocalCluster:
    """Start a cluster and remember it.

    Raises:
        ClusterError: One is up already, the port is taken, or Ray does not start.
    """
    if found := running():
        raise ClusterError(f"a local cluster is up already at {found.address}: `sima down` ends it")
    cluster = start(cpus, gpus, port)
    home().mkdir(parents=True, exist_ok=True)
    state_file().write_text(json.dumps(asdict(cluster), indent=2) + "\n")
    return cluster


def down() -> LocalCluster:
    """End the cluster that `sima up` started.

    Raises:
        ClusterError: None is up.
    """
    cluster = running()
    if cluster is None:
        state_file().unlink(missing_ok=True)
        raise ClusterError("no local cluster is up: `sima up` starts one")
    stop(cluster)
    state_file().unlink(missing_ok=True)
    return cluster


def start(cpus: int, gpus: int | None = None, port: int | None = None) -> LocalCluster:
    """Start a cluster and wait until it takes jobs.

    Args:
        cpus: Logical CPUs that Ray hands out; may be above the real number.
        gpus: GPUs; None lets Ray look.
        port: The dashboard's port; None takes a free one.

    Raises:
        ClusterError: The port is taken, or Ray does not start within 180 s.
    """
    if port is not None and not is_free(LOOPBACK, port):
        raise ClusterError(f"port {port} is in use: choose another, or leave it out for a free one")
    # Short, because the paths of Ray's sockets must stay under 108 bytes.
    temp = Path(tempfile.mkdtemp(prefix="sima-", dir="/tmp" if os.path.isdir("/tmp") else None))
    token_file = temp / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(secrets.token_hex(32))
    ports = free_ports(6)
    dashboard = port or ports.pop()
    log = temp / "start.log"
    environment = {
        **os.environ,
        # A job's entry point is `python …`: it must be this one.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        **_environment(str(token_file)),
    }
    command = _start_command(cpus, gpus, dashboard, ports, temp)
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    cluster = LocalCluster(
        address=f"http://{LOOPBACK}:{dashboard}",
        gcs=f"{LOOPBACK}:{ports[0]}",
        pid=process.pid,
        temp_dir=str(temp),
        token_file=str(token_file),
    )
    try:
        _wait_until_ready(cluster, process, log)
    except BaseException:
        stop(cluster)
        raise
    return cluster


def stop(cluster: LocalCluster) -> None:
    """End a cluster: its own process first, then whatever that left, each by id."""
    try:
        if not cluster.alive:  # a process id may have gone to a stranger
            raise psutil.NoSuchProcess(cluster.pid)
        root = psutil.Process(cluster.pid)
    except psutil.NoSuchProcess:
        shutil.rmtree(cluster.temp_dir, ignore_errors=True)
        return
    family = [root, *root.children(recursive=True)]
    _signal([root], psutil.Process.terminate)
    _, alive = psutil.wait_procs([root], timeout=_STOP_TIMEOUT_S)
    _signal(alive, psutil.Process.kill)
    _, alive = psutil.wait_procs(family, timeout=3)
    _signal(alive, psutil.Process.kill)
    psutil.wait_procs(alive, timeout=3)
    shutil.rmtree(cluster.temp_dir, ignore_errors=True)


def _environment(token_file: str) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": token_file,
        # Ray turns 127.0.0.1 into the machine's outward address unless multi-node clusters are switched off,
        # which on Linux has no other effect than that.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        **SERVE_ENVIRONMENT,
    }


def _start_command(
    cpus: int, gpus: int | None, dashboard: int, ports: list[int], temp: Path
) -> list[str]:
    gcs, client, agent_http, agent_grpc, metrics = ports[:5]
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *("--node-ip-address", LOOPBACK, "--port", str(gcs)),
        *("--include-dashboard", "true", "--dashboard-host", LOOPBACK),
        *("--dashboard-port", str(dashboard), "--ray-client-server-port", str(client)),
        *("--dashboard-agent-listen-port", str(agent_http)),
        *("--dashboard-agent-grpc-port", str(agent_grpc), "--metrics-export-port", str(metrics)),
        *("--num-cpus", str(cpus), *(() if gpus is None else ("--num-gpus", str(gpus)))),
        *("--temp-dir", str(temp / "ray"), "--disable-usage-stats"),
    ]


def _wait_until_ready(cluster: LocalCluster, process: subprocess.Popen[bytes], log: Path) -> None:
    headers = {"Authorization": f"Bearer {Path(cluster.token_file).read_text()}"}
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise ClusterError(f"Ray did not start: {' '.join(last) or 'no output'}")
        try:
            # Answered once the head node's agent is there, which is what runs jobs.
            answer = httpx.get(f"{cluster.address}/api/jobs/", headers=headers, timeout=5)
            if answer.status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise ClusterError(f"Ray did not answer at {cluster.address} within {_START_TIMEOUT_S:.0f} s")


def _signal(processes: list[psutil.Process], send: object) -> None:
    for process in processes:
        try:
            send(process)  # type: ignore[operator]
        except psutil.NoSuchProcess:
            continue


def free_port() -> int:
    """A port of the loopback interface that nobody listens on at this moment."""
    return free_ports(1)[0]

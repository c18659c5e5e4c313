"""Run by test_stages_kills.py in a process of its own: the stages over a Serve policy on three simulated nodes.

A clean run first; then one that loses a replica, and after that a whole node with the other replica, a Data worker
of each stage and the blocks that it held.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

ROWS, BATCH = 300, 10


def main(root: Path) -> None:
    """Print what happened as a line of JSON."""
    import ray
    from ray.cluster_utils import Cluster

    # CPUs are counted, not bound. The driver's node has none: all work is done on the other two.
    cluster = Cluster()
    with contextlib.ExitStack() as stack:
        stack.callback(cluster.shutdown)
        soon = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
        driver: dict[str, Any] = {"num_cpus": 0, "resources": {"driver": 1}}
        cluster.add_node(**driver, include_dashboard=False, _system_config=soon)
        stack.callback(ray.shutdown)
        ray.init(cluster.address, log_to_driver=False, configure_logging=False)
        nodes = {node.node_id: node for node in (cluster.add_node(num_cpus=2) for _ in range(2))}
        cluster.wait_for_nodes()
        print(json.dumps(_runs(root, cluster, nodes)))


def _runs(root: Path, cluster: Any, nodes: dict[str, Any]) -> dict[str, Any]:
    from constant_load import wait_for
    from fake_policy import SharedBook, book_actor
    from ray import serve

    from sima_ray.config import DataConfig
    from sima_ray.data.blocks import committed_rows
    from sima_ray.data.prompts import index_prompts

    data = DataConfig(prompts=str(root / "prompts.jsonl"), images=str(root / "images"))
    _write_prompts(data)
    index = str(root / "prompts.parquet")
    index_prompts(data, index)
    book = SharedBook(book_actor(resources={"driver": 0.1}))
    _deploy(book)
    clean, killed = str(root / "clean"), str(root / "killed")
    _run(data, index, clean)
    once = _asked(book)
    replicas = _replicas(book)
    assert len({node for _, node in replicas}) == 2

    run = threading.Thread(target=_run, args=(data, index, killed))
    begun = time.monotonic()
    run.start()
    wait_for(lambda: committed_rows(killed) >= ROWS // 6, 120)
    (victim, survivor), (_, lost) = replicas
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: committed_rows(killed) >= ROWS // 3, 120)
    cluster.remove_node(nodes[lost], allow_graceful=False)
    at = committed_rows(killed)
    run.join()
    asked = _asked(book)
    serve.shutdown()
    return {
        "seconds": time.monotonic() - begun,
        "committed_at_node_loss": at,
        "replicas": len(_replicas(book)),
        "nodes": [survivor, lost],
        "once": max(once.values()),
        # The clean run asked once for each; the other for what it lost, once more.
        "again": sum((asked - once - once).values()),
        "hashes": [_hash(clean), _hash(killed)],
        "rows": [committed_rows(clean), committed_rows(killed)],
    }


def _write_prompts(data: Any) -> None:
    from fake_policy import ask

    Path(data.images).mkdir()
    Image.new("RGB", (16, 16)).save(Path(data.images, "a.png"))
    ways = ["plain", "same", "tie", "plain", "mumble"]
    with open(data.prompts, "w", encoding="utf-8") as file:
        for number in range(ROWS):
            way = ways[number % len(ways)]
            line = {"id": f"r{number}", "image": "a.png", "text": ask(number, way)}
            file.write(json.dumps(line | {"ground_truth": f"It is {number}."}) + "\n")


def _deploy(book: Any) -> None:
    """Two replicas, one on each node, that say where they are."""
    import ray
    from fake_policy import FakePolicy
    from ray import serve

    from sima_ray.runtime.client import DEPLOYMENT
    from sima_ray.runtime.serving import start_serve

    class Replica(FakePolicy):
        def __init__(self, book: Any) -> None:
            super().__init__(book)
            node = ray.get_runtime_context().get_node_id()
            where = {"row": None, "kind": "replica", "pid": os.getpid(), "node": node}
            ray.get(book.actor.add.remote(where))

    start_serve(port=0)
    deployment: Any = serve.deployment(
        Replica,
        name=DEPLOYMENT,
        num_replicas=2,
        max_replicas_per_node=1,
        ray_actor_options={"num_cpus": 0.1},
        health_check_period_s=1,
        max_ongoing_requests=100,
    )
    serve.run(deployment.bind(book), name="policy", route_prefix=None)


def _run(data: Any, index: str, folder: str) -> None:
    from sima_ray.config import CriticConfig, GenerationConfig
    from sima_ray.data.sinks import write_preferences
    from sima_ray.data.stages import critique, generate, outcome, read_prompts
    from sima_ray.runtime.client import connect_policy

    generation = GenerationConfig(concurrency=4, batch_size=BATCH, workers=2)
    with_policy = {
        "data": data,
        "generation": generation,
        "connect": connect_policy(retries=8, timeout_s=10),
    }
    rows = generate(read_prompts(index, rows_per_block=BATCH, done=folder), seed=7, **with_policy)
    rows = critique(rows, critic=CriticConfig(), **with_policy)
    write_preferences(outcome(rows), folder)


def _asked(book: Any) -> Counter[tuple[Any, ...]]:
    return Counter(
        (entry["row"], entry["kind"], entry["seed"])
        for entry in book.entries
        if entry["kind"] != "replica"
    )


def _replicas(book: Any) -> list[tuple[int, str]]:
    return [(e["pid"], e["node"]) for e in book.entries if e["kind"] == "replica"]


def _hash(folder: str) -> str:
    """Of all rows, in the order of their ids."""
    import pyarrow.parquet as pq

    from sima_ray.data.blocks import committed_files

    rows = [row for path in committed_files(folder) for row in pq.read_table(path).to_pylist()]
    rows.sort(key=lambda row: row["row_id"])
    assert len({row["row_id"] for row in rows}) == len(rows)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


if __name__ == "__main__":
    # Before Ray is imported: loopback stays loopback (see sima_ray/runtime/cluster.py).
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    main(Path(sys.argv[1]))

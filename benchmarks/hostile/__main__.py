"""Hostile requests against the critic's HTTP application, counted: `python -m benchmarks.hostile`.

The application runs in a process of its own under uvicorn, with a policy that answers at once; all requests go
over real HTTP. A tenth is drawn by schemathesis from the OpenAPI document, the rest are attacks of our own;
meanwhile slow clients hold connections. Exits with 1 for any 5xx but 503, any answer in another shape or with a
word of the inside, any image fetched, or a server whose memory grew by 5 % or more after the first fifth.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.hostile.attacks import TOKEN, attacks
from benchmarks.hostile.generated import send_generated
from benchmarks.hostile.run import Canary, Findings, send_all, send_wire, slow_clients
from benchmarks.hostile.server import SERVICE

AT_ONCE = 16
SLOW_CLIENTS = 32
WIRE_ROUNDS = 5
MEMORY_GROWTH = 0.05
"""Allowed, of what the server held after the first fifth of the requests."""


def main(arguments: list[str] | None = None) -> int:
    """Run, print the figures, and write them where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    figures = run(options.requests, options.seed)
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        options.json.write_text(f"{text}\n", encoding="utf-8")
    return 0 if figures["holds"] else 1


def run(requests: int, seed: int = 0) -> dict[str, Any]:
    """All of it, against a server that is started and ended here."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.hostile.server"],
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            return asyncio.run(_attack(int(server.stdout.readline()), server.pid, requests, seed))
        finally:
            server.terminate()


async def _attack(port: int, pid: int, requests: int, seed: int) -> dict[str, Any]:
    url, findings, canary = f"http://127.0.0.1:{port}", Findings(), Canary()
    process, start = psutil.Process(pid), time.perf_counter()
    generated = requests // 10
    document = httpx.get(f"{url}/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}).json()
    async with canary as fetch_url, slow_clients(port, SLOW_CLIENTS) as slow:
        own = attacks(seed, requests - generated, SERVICE.max_body_bytes, fetch_url)
        first = [attack for attack, _ in zip(own, range(requests // 10), strict=False)]
        await send_all(url, first, findings, AT_ONCE)
        await asyncio.to_thread(send_generated, url, document, generated, findings)
        before = process.memory_info().rss
        await send_all(url, own, findings, AT_ONCE)
        await send_wire(port, WIRE_ROUNDS, findings)
        after = process.memory_info().rss
        timed_out = sum(answer.startswith(b"HTTP/1.1 408") for answer in slow)
    growth = after / before - 1
    figures = findings.report()
    holds = not findings.problems and not canary.asked and growth < MEMORY_GROWTH
    return figures | {
        "images_fetched": canary.asked,
        "slow_clients": {"connections": SLOW_CLIENTS, "answered_408": timed_out},
        "server_memory_mb": {"before": round(before / 2**20, 1), "after": round(after / 2**20, 1)},
        "server_memory_growth": round(growth, 4),
        "seconds": round(time.perf_counter() - start, 1),
        "holds": holds,
    }


if __name__ == "__main__":
    sys.exit(main())

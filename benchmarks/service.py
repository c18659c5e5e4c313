"""How long the policy service takes to deploy, to answer first, to swap weights, and what it answers a second.

`python -m benchmarks.service [--config CONFIG] [--repeats N] [--json FILE]`, on a local cluster of its own.
"""

import argparse
import asyncio
import io
import json
import statistics
import time
from pathlib import Path

from PIL import Image

from benchmarks.own_cluster import own_cluster
from sima_ray.config import PolicyConfig, RunConfig
from sima_ray.ports import CompletionRequest, Policy, image_part, text_part

REQUESTS = 128
"""For the throughput: half greedy, half sampled, each with an image of its own."""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the figures where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    policy = RunConfig.load(options.config).policy

    with own_cluster():
        runs = _measure(policy, options.repeats)
    figures = {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name in runs[0]
        if (values := [run[name] for run in runs])
    }
    for name, figure in figures.items():
        print(f"{name:<24} {figure['median']:8.2f}   [{figure['min']:.2f}, {figure['max']:.2f}]")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _measure(policy: PolicyConfig, repeats: int) -> list[dict[str, float]]:
    from sima_ray.runtime.client import connect_policy
    from sima_ray.runtime.serving import deploy_policy, remove, swap_policy

    runs: list[dict[str, float]] = []
    for number in range(repeats):
        run: dict[str, float] = {}
        started = time.perf_counter()
        deploy_policy(policy)
        run["deploy_s"] = time.perf_counter() - started
        client = connect_policy()
        run["first_sampled_answer_s"] = asyncio.run(_timed(client(), [_request(0, 0.8)]))
        requests = [_request(k, 0.8 * (k % 2)) for k in range(REQUESTS)]
        run["requests_per_s"] = REQUESTS / asyncio.run(_timed(client(), requests))
        started = time.perf_counter()
        swap_policy(policy.model, f"swapped-{number}")
        run["swap_s"] = time.perf_counter() - started
        run["first_answer_after_swap_s"] = asyncio.run(_timed(client(), [_request(0, 0.8)]))
        remove("policy")
        runs.append(run)
    return runs


async def _timed(policy: Policy, requests: list[CompletionRequest]) -> float:
    started = time.perf_counter()
    answers = await asyncio.gather(*map(policy.complete, requests))
    seconds = time.perf_counter() - started
    if failed := [answer["error"] for answer in answers if "error" in answer]:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
    return seconds


def _request(number: int, temperature: float) -> CompletionRequest:
    buffer = io.BytesIO()
    Image.new("RGB", (96, 96), (number % 256, 80, 160)).save(buffer, "PNG")
    return {
        "content": [image_part(buffer.getvalue()), text_part("Describe the image.")],
        "max_tokens": 64,
        "temperature": temperature,
        "top_p": 0.9,
        "seed": number,
    }


if __name__ == "__main__":
    main()

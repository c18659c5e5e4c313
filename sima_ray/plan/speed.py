"""How fast the policy answers: the replicas that calls in flight ask for, and what a step of each takes."""

import math
from dataclasses import dataclass

from sima_ray.config import RunConfig
from sima_ray.data.work import REQUESTS
from sima_ray.plan.architecture import Architecture
from sima_ray.plan.serving import DTYPE_BYTES, kv_bytes
from sima_ray.plan.workload import Assumptions, Workload
from sima_ray.plan.worksheet import GB


@dataclass(frozen=True, slots=True)
class Flow:
    """How a stage asks the policy.

    Attributes:
        calls: Serve calls in flight, of all who ask.
        requests: That each call brings to the engine.
        tokens: Of an ordinary request at its end.
        written: Those of them that are written.
    """

    calls: int
    requests: int
    tokens: int
    written: int


@dataclass(frozen=True, slots=True)
class Speed:
    """What all replicas do together.

    Attributes:
        replicas: How many there are.
        at_once: Requests that all of them compute at a time, and `at_once_how` says why.
        reads: Floating-point operations a second on prompts.
        writes: Tokens a second, and `how` says why.
    """

    replicas: int
    at_once: int
    at_once_how: str
    reads: float
    writes: float
    how: str


def of_preferences(config: RunConfig, load: Workload) -> Flow:
    """A call has a row's requests. Critiques are asked while candidates are: the stage of these is always full,
    and beside it are as many critiques as their shorter time allows, which goes by the tokens written.
    """
    rows = config.generation.in_flight
    critiques = min(rows, rows * load.reason // load.response)
    return Flow(rows + critiques, REQUESTS, load.critique + load.reason, load.reason)


def of_evaluation(config: RunConfig, load: Workload, answer: int) -> Flow:
    """One process asks, a question a call; `answer` is its tokens."""
    return Flow(config.generation.in_flight, 1, load.prompt + answer, answer)


def speed(
    config: RunConfig, model: Architecture, flow: Flow, cached: float, assume: Assumptions
) -> Speed:
    """Tokens that are read and written: a step reads the weights once, and every request's cache.

    Args:
        config: The run's.
        model: The policy.
        flow: What is asked.
        cached: Tokens that the KV cache of a replica holds.
        assume: Utilisations.
    """
    engine, service, hardware = config.policy.engine, config.policy.service, config.hardware
    parallel, size = engine.tensor_parallel_size, DTYPE_BYTES.get(engine.dtype, 2)
    replicas = _replicas(config, flow.calls)
    calls = max(1, min(flow.calls // replicas, service.max_ongoing_requests))
    room = int(cached / flow.tokens)
    batch = max(1, min(calls * flow.requests, engine.max_num_seqs, room))
    cache = kv_bytes(model, size, parallel) * batch * (flow.tokens - flow.written / 2)
    weights = model.language.parameters * size / parallel
    reading = (weights + cache) / (hardware.gpu_bandwidth_gb_s * GB * assume.bandwidth)
    prefill = hardware.gpu_tflops * 1e12 * assume.mfu_prefill
    step = max(reading, 2 * model.language.parameters * batch / parallel / prefill)
    return Speed(
        replicas=replicas,
        at_once=replicas * batch,
        at_once_how=(
            f"{replicas} × the least of {calls:,} calls × {flow.requests}, max_num_seqs "
            f"{engine.max_num_seqs:,}, and {room:,} that the KV cache holds"
        ),
        reads=replicas * parallel * prefill,
        writes=replicas * batch / step,
        how=(
            f"{replicas} × {batch} requests ÷ {step * 1e3:.1f} ms a step: "
            f"({weights / GB:.1f} GB of weights + {cache / GB:.1f} GB of cache) ÷ "
            f"({hardware.gpu_bandwidth_gb_s:,.0f} GB/s × {assume.bandwidth:g})"
        ),
    )


def _replicas(config: RunConfig, calls: int) -> int:
    """As many as Serve starts for the calls in flight, within the bounds, and as there are GPUs for."""
    service = config.policy.service
    wanted = math.ceil(calls / service.target_ongoing_requests)
    allowed = max(service.min_replicas, min(service.max_replicas, wanted))
    return max(1, min(allowed, config.hardware.gpus // config.policy.engine.tensor_parallel_size))

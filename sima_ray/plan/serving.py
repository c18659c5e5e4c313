"""Memory of a policy replica: weights, what the engine computes with, and what is left for the KV cache."""

from sima_ray.config import RunConfig
from sima_ray.plan.architecture import Architecture
from sima_ray.plan.workload import Workload
from sima_ray.plan.worksheet import GB, Figure, Section, gigabytes, millions, total

DTYPE_BYTES = {"float32": 4, "float": 4}
"""Of a number, by vLLM's and torch's names; 2 for all others."""

_BATCHED_TOKENS = 8192
"""Tokens that vLLM reads in one step, at most."""
_GRAPHS = 1.0 * GB
"""CUDA graphs and the context of a process."""


def kv_bytes(model: Architecture, dtype: int, parallel: int) -> float:
    """Of one token, on one GPU of a replica."""
    text = model.language
    heads = max(text.kv_heads / parallel, 1)  # fewer heads than GPUs: copies
    return 2 * text.layers * heads * text.head_width * dtype


def plan_serving(config: RunConfig, model: Architecture, load: Workload) -> Section:
    """One replica, GPU by GPU, and how many requests fit at a time."""
    engine, hardware, text = config.policy.engine, config.hardware, model.language
    parallel, size = engine.tensor_parallel_size, DTYPE_BYTES.get(engine.dtype, 2)
    usable = hardware.gpu_memory_gb * engine.gpu_memory_utilization
    memory = _memory(config, model)
    needed = total("needed before any request", memory)
    left = usable - needed.value
    token = kv_bytes(model, size, parallel)
    cached = max(0.0, left * GB / token)
    full = cached / engine.max_model_len
    typical = min(cached / (load.critique + load.reason), engine.max_num_seqs)
    heads = f"{text.kv_heads} heads" + (f" ÷ {parallel}" if parallel > 1 else "")
    figures = [
        *memory,
        needed,
        Figure(
            "usable",
            usable,
            "GB",
            f"{hardware.gpu_memory_gb:g} × gpu_memory_utilization {engine.gpu_memory_utilization:g}",
        ),
        Figure(
            "KV cache of a token",
            token / 1e6,
            "MB",
            f"2 × {text.layers} layers × {heads} × {text.head_width} × {size} B",
        ),
        Figure(
            "KV cache", cached, "tokens", f"({usable:.2f} − {needed.value:.2f}) GB ÷ {token:,.0f} B"
        ),
        Figure(
            "longest requests at once",
            int(full),
            "requests",
            f"{cached:,.0f} ÷ max_model_len {engine.max_model_len:,}",
        ),
        Figure(
            "ordinary critiques at once",
            int(typical),
            "requests",
            f"{cached:,.0f} ÷ ({load.critique:,} read + {load.reason} written), "
            f"max_num_seqs {engine.max_num_seqs}",
        ),
    ]
    gpus = f"{parallel} GPU{'s' * (parallel > 1)} of {hardware.gpu_memory_gb:g} GB"
    return Section(
        f"serve: a replica on {gpus}, of each",
        figures,
        _problems(config, model, load, full, usable, needed.value),
        _notes(config, model, load),
    )


def _memory(config: RunConfig, model: Architecture) -> list[Figure]:
    engine, text = config.policy.engine, model.language
    parallel, size = engine.tensor_parallel_size, DTYPE_BYTES.get(engine.dtype, 2)
    share = f" ÷ {parallel}" if parallel > 1 else ""
    width = 4 * text.width + 3 * text.inner / parallel
    return [
        gigabytes(
            "weights",
            model.parameters * size / parallel,
            f"{millions(model.parameters)} × {size} B{share}",
        ),
        gigabytes(
            "activations",
            _BATCHED_TOKENS * width * size,
            f"{_BATCHED_TOKENS:,} tokens × (4 × {text.width} + 3 × {text.inner}{share}) × {size} B",
        ),
        gigabytes(
            "logits",
            engine.max_num_seqs * text.vocabulary * 4 * 2,
            f"{engine.max_num_seqs} requests × {text.vocabulary:,} × 4 B × 2",
        ),
        gigabytes("CUDA graphs and context", _GRAPHS, "assumed"),
    ]


def _problems(
    config: RunConfig,
    model: Architecture,
    load: Workload,
    full: float,
    usable: float,
    needed: float,
) -> list[str]:
    engine, service, gpus = config.policy.engine, config.policy.service, config.hardware.gpus
    text, parallel = model.language, engine.tensor_parallel_size
    problems: list[str] = []
    if full < 1:
        lack = needed + kv_bytes(model, DTYPE_BYTES.get(engine.dtype, 2), parallel) * (
            engine.max_model_len / GB
        )
        problems.append(
            f"a request of max_model_len {engine.max_model_len:,} needs {lack:.1f} GB, {usable:.1f} are usable"
        )
    if text.heads % parallel:
        problems.append(f"{text.heads} attention heads cannot be shared by {parallel} GPUs")
    if max(1, service.min_replicas) * parallel > gpus:
        problems.append(
            f"min_replicas {service.min_replicas} × tensor_parallel_size {parallel} are more than {gpus} GPUs"
        )
    if engine.max_model_len > text.context:
        problems.append(
            f"max_model_len {engine.max_model_len:,} is above the model's own {text.context:,} tokens"
        )
    longest = load.critique + load.largest_image_tokens - load.image_tokens + load.reason
    if config.data.pairs is None and longest > engine.max_model_len:
        problems.append(
            f"an ordinary critique has {longest:,} tokens, max_model_len is {engine.max_model_len:,}"
        )
    return problems


def _notes(config: RunConfig, model: Architecture, load: Workload) -> list[str]:
    engine = config.policy.engine
    room = engine.max_model_len - load.static - load.largest_image_tokens - load.case
    each = (room - config.critic.max_tokens) // 2
    longest = config.generation.max_tokens
    if each >= longest:
        return []
    return [
        f"two responses of over {max(each, 0):,} tokens each (generation.max_tokens: {longest:,}) do not fit "
        f"max_model_len {engine.max_model_len:,} in the critic's prompt; such a row is set aside and counted"
    ]

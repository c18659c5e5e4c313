"""How long a run takes and what it leaves on disk: tokens and floating-point operations, by stated assumptions."""

import math

from sima_ray.config import RunConfig
from sima_ray.plan.architecture import Architecture
from sima_ray.plan.serving import DTYPE_BYTES, kv_bytes
from sima_ray.plan.training import trained
from sima_ray.plan.workload import Assumptions, Workload
from sima_ray.plan.worksheet import GB, Figure, Section, gigabytes, millions, total

_SECONDS = 3600.0


def plan_hours(
    config: RunConfig, model: Architecture, load: Workload, assume: Assumptions, at_once: int
) -> Section:
    """Expected hours of each stage.

    Args:
        config: The run's.
        model: What is served and tuned.
        load: How much there is to do.
        assume: Utilisations.
        at_once: Ordinary requests that fit a replica.
    """
    replicas = _replicas(config)
    writes, write_how = _written_a_second(config, model, load, assume, replicas, at_once)
    reads = (
        replicas
        * config.policy.engine.tensor_parallel_size
        * config.hardware.gpu_tflops
        * 1e12
        * assume.mfu_prefill
    )
    preferences, counts = _preferences(config, model, load, reads, writes)
    evaluation = _evaluation(config, model, load, reads, writes)
    training, steps = _training(config, model, load, assume)
    rounds = config.rounds
    figures = [
        Figure("prompts", load.prompts, "prompts", load.prompts_from),
        Figure("writing speed", writes, "tokens/s", write_how),
        *counts,
        Figure(
            "preferences",
            preferences + (assume.start_hours if config.data.pairs is None else 0.0),
            "h",
            f"reading at {reads / 1e12:,.0f} TFLOP/s, writing at {writes:,.0f} tokens/s, "
            f"{assume.start_hours:g} h to start; {replicas} replica{'s' * (replicas > 1)}",
        ),
        steps,
        Figure(
            "train",
            training.value + assume.start_hours,
            "h",
            f"{training.how}; {assume.start_hours:g} h to start",
        ),
    ]
    hours = rounds * sum(f.value for f in figures if f.unit == "h")
    if config.evaluation is not None:
        figures.append(
            Figure(
                "evaluate",
                evaluation,
                "h",
                f"{load.captions:,} captions and {load.questions:,} questions; {rounds + 1} times"
                + (f"; not counted: {', '.join(load.uncounted)}" if load.uncounted else ""),
            )
        )
        hours += evaluation * (rounds + 1)
    gpus = config.hardware.gpus
    figures.append(Figure("whole run", hours, "h", f"{rounds} round{'s' * (rounds > 1)}"))
    figures.append(
        Figure("GPU hours", hours * gpus, "GPU h", f"{hours:.2f} h × {gpus} GPUs, idle ones too")
    )
    return Section("hours", figures)


def plan_disk(config: RunConfig, model: Architecture, load: Workload) -> Section:
    """What the run folder and the model take, on the volume that all nodes mount."""
    size = 2 if config.training.dtype == "bfloat16" else 4
    lora, rounds = trained(config.training, model), config.rounds
    figures = [
        gigabytes("model", model.parameters * 2, f"{millions(model.parameters)} × 2 B"),
        gigabytes(
            "merged policies",
            rounds * model.parameters * 2,
            f"{rounds} × {millions(model.parameters)} × 2 B",
        ),
        gigabytes("adapters", rounds * lora * size, f"{rounds} × {millions(lora)} × {size} B"),
        gigabytes(
            "a checkpoint of training",
            2 * lora * (size + 12),
            f"{millions(lora)} × ({size} + 12) B, the next one beside it",
        ),
        gigabytes(
            "rows", rounds * load.prompts * 12_000, f"{rounds} × {load.prompts:,} × 12 kB, about"
        ),
    ]
    return Section("disk, images apart", [*figures, total("together", figures)])


def _replicas(config: RunConfig) -> int:
    """As many as are allowed, have GPUs, and are called for by the requests in flight."""
    service, generation = config.policy.service, config.generation
    room = config.hardware.gpus // config.policy.engine.tensor_parallel_size
    wanted = math.ceil(
        generation.workers * generation.concurrency / service.target_ongoing_requests
    )
    return max(1, min(service.max_replicas, room, wanted))


def _written_a_second(
    config: RunConfig,
    model: Architecture,
    load: Workload,
    assume: Assumptions,
    replicas: int,
    at_once: int,
) -> tuple[float, str]:
    """Tokens that all replicas write together: a step reads the weights once, and every request's cache."""
    engine, hardware, generation = config.policy.engine, config.hardware, config.generation
    parallel, size = engine.tensor_parallel_size, DTYPE_BYTES.get(engine.dtype, 2)
    flight = max(1, generation.workers * generation.concurrency // replicas)
    batch = max(1, min(at_once, flight, config.policy.service.max_ongoing_requests))
    cache = kv_bytes(model, size, parallel) * batch * (load.critique + load.reason / 2)
    weights = model.language.parameters * size / parallel
    reading = (weights + cache) / (hardware.gpu_bandwidth_gb_s * GB * assume.bandwidth)
    computing = 2 * model.language.parameters * batch / parallel
    step = max(reading, computing / (hardware.gpu_tflops * 1e12 * assume.mfu_prefill))
    how = (
        f"{replicas} × {batch} requests ÷ {step * 1e3:.1f} ms a step: "
        f"({weights / GB:.1f} GB of weights + {cache / GB:.1f} GB of cache) ÷ "
        f"({hardware.gpu_bandwidth_gb_s:,.0f} GB/s × {assume.bandwidth:g})"
    )
    return replicas * batch / step, how


def _preferences(
    config: RunConfig, model: Architecture, load: Workload, reads: float, writes: float
) -> tuple[float, list[Figure]]:
    """Hours, and the tokens that they are of."""
    first = config.critic.layout == "examples_first"
    # What both orders have in common is read once; the criteria, where they come first, once for all rows.
    common = load.image_tokens + load.case + (0 if first else load.static)
    read = load.prompts * (load.prompt + common + 2 * 2 * load.response)
    written = load.prompts * (2 * load.response + 2 * load.reason)
    flops = 2 * model.language.body * read + 2 * 2 * model.vision * load.patches * load.prompts
    hours = (flops / reads + written / writes) / _SECONDS
    layout = "criteria from the cache" if first else f"{load.static:,} of criteria"
    return hours, [
        Figure(
            "tokens read",
            read,
            "tokens",
            f"{load.prompts:,} × ({load.prompt:,} to answer + {common:,} to judge, {layout}, "
            f"+ 4 × {load.response} of responses)",
        ),
        Figure(
            "tokens written",
            written,
            "tokens",
            f"{load.prompts:,} × (2 × {load.response} + 2 × {load.reason})",
        ),
    ]


def _evaluation(
    config: RunConfig, model: Architecture, load: Workload, reads: float, writes: float
) -> float:
    """Hours of one evaluation; an answer to a yes-or-no question is some five tokens."""
    if config.evaluation is None:
        return 0.0
    asked = load.captions + load.questions
    flops = asked * (2 * model.language.body * load.prompt + 2 * model.vision * load.patches)
    written = load.captions * load.response + load.questions * 5
    return (flops / reads + written / writes) / _SECONDS


def _training(
    config: RunConfig, model: Architecture, load: Workload, assume: Assumptions
) -> tuple[Figure, Figure]:
    """(hours, steps): 2ND a forward pass; as much for the gradients of what the frozen weights multiply."""
    training, hardware = config.training, config.hardware
    per_epoch = math.ceil(load.pairs / training.batch_size)
    steps = Figure(
        "steps",
        per_epoch * training.epochs,
        "steps",
        f"{load.pairs:,} pairs ÷ batch_size {training.batch_size} × {training.epochs} epochs",
    )
    again = training.gradient_checkpointing
    passes = 2 + again
    lora = trained(training, model)
    row = 2 * passes * model.language.body * load.row + 6 * lora * load.row
    row += 2 * model.vision * load.patches
    reference = load.pairs * 2 * (model.language.body * load.row + model.vision * load.patches)
    flops = load.pairs * training.epochs * row + reference
    speed = training.workers * hardware.gpu_tflops * 1e12 * assume.mfu_training
    gathering, gathered = _gathering(config, model, load)
    recomputed = ", recomputation among them" * again
    how = (
        f"{load.pairs:,} × ({training.epochs} × {row / 1e12:,.1f} TFLOP + reference "
        f"{reference / load.pairs / 1e12:,.1f}) ÷ ({training.workers} × {hardware.gpu_tflops:g} TFLOP/s × "
        f"{assume.mfu_training:g}); a row of {load.row:,} tokens is 2 × {passes} × "
        f"{model.language.body / 1e9:.2f}e9 each{recomputed}{gathered}"
    )
    return Figure("", (flops / speed + gathering) / _SECONDS, "h", how), steps


def _gathering(config: RunConfig, model: Architecture, load: Workload) -> tuple[float, str]:
    """(seconds, how): ZeRO 3 gathers all weights for a forward and for a backward pass; none of it overlaps."""
    training, link = config.training, config.hardware.gpu_link_gb_s
    workers, budget = training.workers, training.tokens_per_micro_batch
    if training.zero_stage < 3 or workers == 1:
        return 0.0, ""
    pairs = training.micro_batch_size
    if budget is not None:
        pairs = max(1, budget // (2 * (load.prompt + load.response)))
    pairs = min(pairs, math.ceil(training.batch_size / workers))
    passes = math.ceil(load.pairs / workers / pairs) * (2 * training.epochs + 1)
    size = model.parameters * (2 if training.dtype == "bfloat16" else 4) * (1 - 1 / workers)
    how = (
        f"; gathering weights: {passes:,} passes over {pairs} pair{'s' * (pairs > 1)} a worker, the reference "
        f"among them, × {size / GB:.1f} GB ÷ {link:g} GB/s"
    )
    return passes * size / GB / link, how

"""How long a run takes and what it leaves on disk: tokens and floating-point operations, by stated assumptions."""

import math
from collections import Counter

from sima_ray.config import RunConfig
from sima_ray.config.evaluation import SuiteName
from sima_ray.plan.architecture import Architecture
from sima_ray.plan.asked import JUDGED, Asked
from sima_ray.plan.speed import Speed, of_evaluation, of_preferences, speed
from sima_ray.plan.training import trained
from sima_ray.plan.workload import Assumptions, Workload
from sima_ray.plan.worksheet import GB, Figure, Section, gigabytes, millions, total

_SECONDS = 3600.0


def plan_hours(
    config: RunConfig, model: Architecture, load: Workload, assume: Assumptions, cached: float
) -> Section:
    """Expected hours of each stage.

    Args:
        config: The run's.
        model: What is served and tuned.
        load: How much there is to do.
        assume: Utilisations.
        cached: Tokens that the KV cache of a replica holds.
    """
    rounds, gpus = config.rounds, config.hardware.gpus
    preferences = _preferences(config, model, load, assume, cached)
    training = _training(config, model, load, assume)
    evaluation = _evaluation(config, model, load, assume, cached)
    prompts = Figure("prompts", load.prompts, "prompts", load.prompts_from)
    section = Section("hours", [prompts, *preferences, *training, *evaluation])
    hours = rounds * (section.value("preferences") + section.value("train"))
    if evaluation:
        hours += (rounds + 1) * section.value("evaluate")
    whole = [
        Figure("whole run", hours, "h", f"{rounds} round{'s' * (rounds > 1)}"),
        Figure("GPU hours", hours * gpus, "GPU h", f"{hours:.2f} h × {gpus} GPUs, idle ones too"),
    ]
    return Section(section.title, [*section.figures, *whole])


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


def _preferences(
    config: RunConfig, model: Architecture, load: Workload, assume: Assumptions, cached: float
) -> list[Figure]:
    """The last one is the hours; none are taken where a run begins with given pairs."""
    rate = speed(config, model, of_preferences(config, load), cached, assume)
    first = config.critic.layout == "examples_first"
    # What both orders have in common is read once; the criteria, where they come first, once for all rows.
    common = load.image_tokens + load.case + (0 if first else load.static)
    read = load.prompts * (load.prompt + common + 2 * 2 * load.response)
    written = load.prompts * (2 * load.response + 2 * load.reason)
    flops = 2 * model.language.body * read + 2 * 2 * model.vision * load.patches * load.prompts
    hours = (flops / rate.reads + written / rate.writes) / _SECONDS
    layout = "criteria from the cache" if first else f"{load.static:,} of criteria"
    return [
        Figure("requests at once", rate.at_once, "requests", rate.at_once_how),
        Figure("writing speed", rate.writes, "tokens/s", rate.how),
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
        Figure(
            "preferences",
            hours + (assume.start_hours if config.data.pairs is None else 0.0),
            "h",
            f"{_rates(rate)}; {assume.start_hours:g} h to start",
        ),
    ]


def _rates(rate: Speed) -> str:
    return (
        f"reading at {rate.reads / 1e12:,.0f} TFLOP/s, writing at {rate.writes:,.0f} tokens/s; "
        f"{rate.replicas} replica{'s' * (rate.replicas > 1)}"
    )


def _evaluation(
    config: RunConfig, model: Architecture, load: Workload, assume: Assumptions, cached: float
) -> list[Figure]:
    """What each suite asks, the judge's calls, and the hours of a policy; empty without an evaluation."""
    settings = config.evaluation
    if settings is None:
        return []
    figures: list[Figure] = []
    hours: dict[SuiteName, float] = {}
    for suite in settings.suites:
        parts = [one for one in load.asked if one.suite == suite]
        hours[suite] = sum(_answering(config, model, load, assume, cached, one) for one in parts)
        count = sum(one.count for one in parts)
        how = f"{_answers(parts)}; {hours[suite]:.2f} h"
        figures.append(Figure(f"asked by {suite}", count, "requests", how))
    if judged := [one for one in load.asked if one.suite in JUDGED]:
        count = sum(one.count for one in judged)
        how = "one for each answer of mmhal and mementos; of another endpoint, not timed"
        figures.append(Figure("judge's calls", count, "requests", how))
    rate = speed(config, model, of_evaluation(config, load, load.response), cached, assume)
    chosen = settings.suites_of_rounds
    how = f"{', '.join(chosen) or 'no suite'}; captions: {_rates(rate)}; {config.rounds + 1} times"
    figures.append(Figure("evaluate", sum(hours[suite] for suite in chosen), "h", how))
    others: list[SuiteName] = [suite for suite in settings.suites if suite not in chosen]
    if others:
        how = f"{', '.join(others)}: a policy, by sima evaluate; not in the whole run"
        figures.append(Figure("evaluate the others", sum(hours[s] for s in others), "h", how))
    return figures


def _answers(parts: list[Asked]) -> str:
    """How many answers of which length, files of one kind together."""
    counts = Counter[tuple[int, str]]()
    for one in parts:
        counts[one.answer, one.source] += one.count
    return " + ".join(
        f"{count:,} answers of {tokens} tokens ({source})"
        for (tokens, source), count in counts.items()
    )


def _answering(
    config: RunConfig,
    model: Architecture,
    load: Workload,
    assume: Assumptions,
    cached: float,
    asked: Asked,
) -> float:
    """Hours that one policy takes for questions, each of which reads its image."""
    rate = speed(config, model, of_evaluation(config, load, asked.answer), cached, assume)
    flops = 2 * model.language.body * load.prompt + 2 * model.vision * load.patches
    return asked.count * (flops / rate.reads + asked.answer / rate.writes) / _SECONDS


def _training(
    config: RunConfig, model: Architecture, load: Workload, assume: Assumptions
) -> list[Figure]:
    """Steps and hours: 2ND a forward pass; as much for the gradients of what the frozen weights multiply."""
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
    rate = training.workers * hardware.gpu_tflops * 1e12 * assume.mfu_training
    gathering, gathered = _gathering(config, model, load)
    recomputed = ", recomputation among them" * again
    how = (
        f"{load.pairs:,} × ({training.epochs} × {row / 1e12:,.1f} TFLOP + reference "
        f"{reference / load.pairs / 1e12:,.1f}) ÷ ({training.workers} × {hardware.gpu_tflops:g} TFLOP/s × "
        f"{assume.mfu_training:g}); a row of {load.row:,} tokens is 2 × {passes} × "
        f"{model.language.body / 1e9:.2f}e9 each{recomputed}{gathered}"
    )
    hours = (flops / rate + gathering) / _SECONDS + assume.start_hours
    return [steps, Figure("train", hours, "h", f"{how}; {assume.start_hours:g} h to start")]


def _gathering(config: RunConfig, model: Architecture, load: Workload) -> tuple[float, str]:
    """(seconds, how): ZeRO 3 gathers all weights for a forward and for a backward pass; none of it overlaps."""
    training, link = config.training, config.hardware.gpu_link_gb_s
    workers, budget = training.workers, training.tokens_per_micro_batch
    if training.zero_stage < 3 or workers == 1:
        return 0.0, ""
    pairs = training.micro_batch_size
    if budget is not None:
        pairs = max(1, budget // (2 * (load.prompt + load.response)))
    own = math.ceil(training.batch_size / workers)
    pairs = min(pairs, own)
    steps = math.ceil(load.pairs / training.batch_size) * training.epochs
    passes = 2 * steps * math.ceil(own / pairs) + math.ceil(load.pairs / workers / pairs)
    size = model.parameters * (2 if training.dtype == "bfloat16" else 4) * (1 - 1 / workers)
    how = (
        f"; gathering weights: {passes:,} passes over {pairs} pair{'s' * (pairs > 1)} a worker, the reference "
        f"among them, × {size / GB:.1f} GB ÷ {link:g} GB/s"
    )
    return passes * size / GB / link, how

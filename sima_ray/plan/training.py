"""Memory of a training worker: weights, adapters, optimizer by ZeRO stage, activations of a micro batch."""

from sima_ray.config import RunConfig, TrainingConfig
from sima_ray.plan.architecture import Architecture, Language
from sima_ray.plan.workload import Workload
from sima_ray.plan.worksheet import GB, Figure, Section, gigabytes, millions, total
from sima_ray.tuning.limits import MOST_LOGITS, MOST_REDUCED

_RESERVE = 1.5 * GB
"""A process's CUDA context, and memory that the allocator cannot use."""
_LIVE = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at a time, at most; DeepSpeed's default."""
_HALF_LAYER_NORMS = 2
"""Widths that RMSNorm keeps more in bfloat16: it computes in float32."""


def activations(text: Language, config: TrainingConfig) -> int:
    """Bytes that a layer keeps of one token for its backward pass.

    The residual stream, the norms and what they are of; queries, keys and values before and after rotation, and
    the attention's output; gate, up, the activation and the product; what each adapter has between its matrices.
    """
    size = _size(config)
    half = size == 2
    queries, keys = text.heads * text.head_width, text.kv_heads * text.head_width
    norms = (2 if half else 1) * (queries + keys) * text.qk_norm
    stream = (4 + _HALF_LAYER_NORMS * half) * text.width
    adapters = config.lora.r * sum(name in text.linear for name in config.lora.targets)
    return size * (stream + norms + 2 * queries + 2 * keys + 4 * text.inner + adapters)


def plan_training(config: RunConfig, model: Architecture, load: Workload) -> Section:
    """One worker's GPU, at the longest pair that the config lets in."""
    training, hardware = config.training, config.hardware
    memory = [*_states(training, model), *_batch(training, model, load)]
    memory.append(gigabytes("context, fragments", _RESERVE, "assumed"))
    # The reference pass before the first step takes less: the same weights, and no gradient.
    peak = total("peak of a step", memory)
    figures = [*memory, peak, *_host(training, model)]
    problems = _problems(config, model, load)
    if peak.value > hardware.gpu_memory_gb:
        problems.append(f"{peak.value:.1f} GB on a GPU of {hardware.gpu_memory_gb:g} GB")
    title = (
        f"train: {training.workers} worker{'s' * (training.workers > 1)}, ZeRO-{training.zero_stage}, "
        f"offload {training.offload}, checkpointing {'on' if training.gradient_checkpointing else 'off'}; "
        f"each GPU of {hardware.gpu_memory_gb:g} GB"
    )
    return Section(title, figures, problems)


def trained(training: TrainingConfig, model: Architecture) -> int:
    """Parameters that training moves."""
    adapters = model.language.lora_parameters(training.lora.r, training.lora.targets)
    return adapters + model.projector * training.train_projector


def _states(training: TrainingConfig, model: Architecture) -> list[Figure]:
    """What a GPU holds whatever the batch."""
    size, workers, stage = _size(training), training.workers, training.zero_stage
    lora, stays = trained(training, model), training.offload == "none"
    shared, sharded = f" ÷ {workers}", workers if stage == 3 else 1
    share = shared if stage == 3 else ""
    weights = model.parameters * size / sharded
    how = f"{millions(model.parameters)} × {size} B{share}"
    if training.offload == "parameters":
        weights, how = 0.0, "in the CPU's memory"
    figures = [gigabytes("weights", weights, how)]
    if stage == 3:
        live = min(_LIVE, model.parameters)
        figures.append(
            gigabytes("gathered weights", live * size, f"{millions(live)} × {size} B at a time")
        )
    figures.append(
        gigabytes("adapters", lora * size / sharded, f"{millions(lora)} × {size} B{share}")
    )
    figures.append(gigabytes("their gradients", lora * size, f"{millions(lora)} × {size} B"))
    # In float32 and without ZeRO, weights and gradients are their own: only Adam's two moments come to them.
    bare = size == 4 and not stage
    sums, parts = (0, 8) if bare else (4, 12)
    sums_over, parts_over = (workers if stage >= 2 else 1), (workers if stage else 1)
    held = lora * (sums / sums_over + parts / parts_over) * stays
    how = f"{millions(lora)} × ({sums} B{_over(sums_over)} + {parts} B{_over(parts_over)})"
    figures.append(gigabytes("optimizer, float32", held, how if stays else "in the CPU's memory"))
    bucket = min(lora, MOST_REDUCED)
    figures.append(
        gigabytes("gradient buckets", 2 * bucket * size, f"2 × {millions(bucket)} × {size} B")
    )
    return figures


def _batch(training: TrainingConfig, model: Architecture, load: Workload) -> list[Figure]:
    """What a micro batch of the longest pairs adds."""
    text, size = model.language, _size(training)
    rows, tokens, row_how = _micro_batch(training, load)
    token = activations(text, training)
    if training.gradient_checkpointing:
        kept = text.layers * text.width * size + 2 * token
        how = f"{tokens:,} tokens ({row_how}) × ({text.layers} × {text.width} × {size} B + 2 × {token:,} B)"
    else:
        kept = (text.layers + 1) * token
        how = f"{tokens:,} tokens ({row_how}) × {text.layers + 1} layers × {token:,} B"
    logits = min(MOST_LOGITS, rows * 2 * load.longest_response * text.vocabulary)
    return [
        gigabytes("activations", tokens * kept, how),
        gigabytes(
            "logits of responses", logits * (2 * size + 12), f"{logits:,} × {2 * size + 12} B"
        ),
        gigabytes(
            "vision tower",
            rows * load.patches * model.vision_width * 16 * size,
            f"{rows * load.patches:,} patches × {model.vision_width} × 16 × {size} B; keeps no gradient",
        ),
    ]


def _micro_batch(training: TrainingConfig, load: Workload) -> tuple[int, int, str]:
    """(pairs, tokens, how) of the largest micro batch."""
    prompt = load.prompt - load.image_tokens + load.largest_image_tokens
    row = prompt + 2 * load.longest_response
    one = f"{prompt:,} + 2 × {load.longest_response:,}"
    if training.tokens_per_micro_batch is None:
        pairs = training.micro_batch_size
    else:
        pairs = max(1, training.tokens_per_micro_batch // (2 * (prompt + load.longest_response)))
    return pairs, pairs * row, one if pairs == 1 else f"{pairs} × ({one})"


def _host(training: TrainingConfig, model: Architecture) -> list[Figure]:
    """The CPU's memory, of all workers together."""
    size, workers, lora = _size(training), training.workers, trained(training, model)
    held, how = model.parameters * workers, f"{millions(model.parameters)} × {size} B × {workers}"
    how += " workers, over all nodes"
    if training.zero_stage == 3:
        held = max(model.language.head, model.language.width * model.language.inner)
        how = f"{millions(held)} × {size} B, the largest weight, on the first worker; its files are mapped"
    loading = gigabytes("CPU memory while loading", held * size, how)
    if training.offload == "none":
        return [loading]
    kept = 16 * lora + (model.parameters * size if training.offload == "parameters" else 0)
    return [loading, gigabytes("CPU memory kept", kept, "what is offloaded, over all nodes")]


def _problems(config: RunConfig, model: Architecture, load: Workload) -> list[str]:
    training, gpus = config.training, config.hardware.gpus
    problems: list[str] = []
    ordinary = load.prompt - load.image_tokens + load.largest_image_tokens + load.response
    if ordinary > training.max_tokens:
        problems.append(
            f"image, prompt and an ordinary response have {ordinary:,} tokens, training.max_tokens is "
            f"{training.max_tokens:,}: most pairs would be set aside"
        )
    if training.max_tokens > model.language.context:
        problems.append(
            f"training.max_tokens {training.max_tokens:,} is above the model's own "
            f"{model.language.context:,} tokens"
        )
    staying = 0
    if not config.policy.service.release_for_training:
        staying = config.policy.service.min_replicas * config.policy.engine.tensor_parallel_size
    if training.workers + staying > gpus:
        beside = f" beside {staying} of the policy that stay" if staying else ""
        problems.append(f"{training.workers} training workers{beside} are more than {gpus} GPUs")
    return problems


def _size(training: TrainingConfig) -> int:
    return 2 if training.dtype == "bfloat16" else 4


def _over(parts: int) -> str:
    return f" ÷ {parts}" if parts > 1 else ""

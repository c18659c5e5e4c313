"""The run config: one YAML file, checked as it is read, with every default on its field.

Imports no torch, ray or vllm, so that a command can check a config and answer at once.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from sima_ray.errors import ConfigError


def _absolute(path: str) -> str:
    """A local path made absolute: a job runs in another folder than it was submitted from."""
    return path if "://" in path else str(Path(path).expanduser().absolute())


Location = Annotated[str, AfterValidator(_absolute)]
"""A local path, or any URI that pyarrow opens. Relative paths count from the current folder."""


def _mounted(path: str) -> str:
    if "://" in path:
        raise ValueError("must be a path that all nodes mount, not a URI")
    return _absolute(path)


Folder = Annotated[str, AfterValidator(_mounted)]
"""A local path, on a volume that all nodes mount. Relative paths count from the current folder."""


class Section(BaseModel):
    """Base of all sections: an unknown key is an error, and a config never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """What the policy is asked, and how bad input is told from good."""

    prompts: Location = Field(description="JSON lines: image, text, ground_truth, optional id.")
    images: Location = Field(description="Folder or URI that image names are relative to.")
    limit: int | None = Field(default=None, ge=1, description="Use only the first N prompts.")
    max_image_pixels: int = Field(
        default=50_000_000, ge=1, description="Larger images are set aside, by their header."
    )
    max_text_chars: int = Field(
        default=20_000, ge=1, description="Longer questions or answers are set aside."
    )


class EngineConfig(Section):
    """How vLLM runs the policy, one replica."""

    accelerator: Literal["cpu", "gpu"] = "gpu"
    cpus: float = Field(default=1.0, gt=0, description="CPUs a replica reserves in Ray.")
    tensor_parallel_size: int = Field(default=1, ge=1)
    dtype: str = "bfloat16"
    max_model_len: int = Field(
        default=4096, ge=64, description="Prompt + response, image tokens included."
    )
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    cpu_kv_cache_gb: float = Field(default=1.0, gt=0, description="KV cache of a CPU replica, GiB.")
    block_size: int | None = Field(
        default=None, description="KV block size; None is the engine's own."
    )
    max_num_seqs: int = Field(
        default=256, ge=1, description="Requests that run at once in a replica."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Further vLLM engine arguments, passed on as they are."
    )


class ServiceConfig(Section):
    """The Serve deployments of the policy and the critic."""

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing_requests: int = Field(
        default=64, ge=1, description="Per replica; above it, scale up."
    )
    max_ongoing_requests: int = Field(
        default=256, ge=1, description="Per replica; above it, queue."
    )
    max_queued_requests: int = Field(
        default=4096, ge=-1, description="Above it, 503. -1: no limit."
    )
    upscale_delay_s: float = Field(default=5.0, ge=0)
    downscale_delay_s: float = Field(default=300.0, ge=0)
    release_for_training: bool = Field(
        default=False,
        description="Remove the replicas while training runs, on a cluster too small for both.",
    )
    openai_routes: bool = Field(
        default=False, description="Also serve OpenAI's chat routes at /policy."
    )
    host: str = Field(default="127.0.0.1", description="Where Serve's HTTP proxy listens.")
    port: int = Field(default=8000, ge=0, le=65535)
    max_body_bytes: int = Field(default=20_000_000, ge=1024, description="Larger requests get 413.")
    max_image_pixels: int = Field(
        default=50_000_000, ge=1, description="Larger images are refused, by their header."
    )
    max_text_chars: int = Field(default=20_000, ge=1, description="Of each text in a request.")
    max_responses: int = Field(
        default=8, ge=2, le=16, description="Of one case; every pair of them is judged."
    )
    max_cases: int = Field(default=64, ge=1, le=512, description="Of one batch.")
    body_timeout_s: float = Field(
        default=60.0, gt=0, description="For a request's body to arrive; then 408."
    )
    request_timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="Of one request to the critic, queueing included; then 504.",
    )
    requests_per_minute: int | None = Field(
        default=None,
        ge=1,
        description="Of one bearer token, over all replicas; above it, 429. None: no limit.",
    )
    concurrent_per_token: int | None = Field(
        default=None,
        ge=1,
        description="Requests of one bearer token at once, over all replicas; above it, 429.",
    )
    token_file: Location | None = Field(
        default=None,
        description="Bearer tokens of the HTTP routes, one a line; read again when it changes.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas is above max_replicas")
        if self.target_ongoing_requests > self.max_ongoing_requests:
            raise ValueError("target_ongoing_requests is above max_ongoing_requests")
        return self


class PolicyConfig(Section):
    """The model that answers and judges."""

    model: Folder = Field(
        description="Hugging Face folder (config, weights, processor, tokenizer)."
    )
    engine: EngineConfig = EngineConfig()
    service: ServiceConfig = ServiceConfig()


class GenerationConfig(Section):
    """How the two candidates of a prompt are made: one greedy, one sampled."""

    temperature: float = Field(default=0.8, gt=0, le=2, description="Of the sampled candidate.")
    top_p: float = Field(default=0.9, gt=0, le=1)
    max_tokens: int = Field(default=1024, ge=1)
    concurrency: int = Field(
        default=64, ge=1, description="Requests that one Data worker keeps in flight."
    )
    workers: int = Field(default=1, ge=1, description="Data workers of this stage.")
    batch_size: int = Field(
        default=128, ge=1, description="Rows that a Data worker takes at a time."
    )
    retries: int = Field(default=5, ge=0, description="Tries again after a failure that may pass.")
    timeout_s: float = Field(default=600.0, gt=0, description="Of one request, queueing included.")


class CriticConfig(Section):
    """How the policy judges its own candidates."""

    layout: Literal["image_first", "examples_first"] = "image_first"
    examples: Location | None = Field(
        default=None, description="YAML of worked examples; None: the shipped ones."
    )
    max_tokens: int = Field(
        default=512, ge=8, description="Of the reason and the verdict together."
    )


class PairsConfig(Section):
    """Which verdicts become training pairs."""

    length_policy: Literal["none", "balance"] = Field(
        default="none",
        description="balance: keep as many pairs with a shorter chosen as with a longer one, "
        "so that brevity alone is not taught.",
    )
    max_length_ratio: float | None = Field(
        default=None,
        gt=1,
        description="Leave out pairs whose longer side is over this many times the shorter.",
    )
    inconsistent_weight: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Weight, beside the 1 of other pairs, of one whose two orders disagree. 0 "
        "drops it, as a tie; above, one of its two verdicts is believed, by lot.",
    )


class LoraSettings(Section):
    """The adapter. The defaults are the paper's."""

    r: int = Field(default=128, ge=1)
    alpha: int = Field(default=256, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="Linear layers of the language model, by the end of their names.",
    )


class LossSettings(Section):
    """What a pair costs. The defaults are DPO's; `sima_ray.loss` has the formulas."""

    kind: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Share of the preferences that are taken as wrong."
    )
    length_normalised: bool = Field(
        default=False,
        description="Log-probabilities per response token, of policy and reference alike. Rewards "
        "are then smaller by the length: take a larger beta.",
    )
    sft_weight: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Weight of the chosen response's negative log-likelihood per token, added to "
        "the loss: holds its probability up.",
    )


class TrainingConfig(Section):
    """DPO with LoRA on Ray Train and DeepSpeed. The defaults are the paper's for 7B."""

    beta: float = Field(default=0.1, gt=0, description="DPO's inverse temperature.")
    loss: LossSettings = LossSettings()
    learning_rate: float = Field(default=1e-7, gt=0)
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=8, ge=1, description="Pairs a step, over all workers.")
    micro_batch_size: int = Field(default=1, ge=1, description="Pairs a forward pass, per worker.")
    tokens_per_micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="Padded tokens that a forward pass may have, two rows a pair: as many pairs of "
        "like length as fit, in place of micro_batch_size.",
    )
    length_window: int = Field(
        default=1,
        ge=1,
        description="Steps whose pairs are sorted by length together, so that a step's are alike; "
        "their order is drawn. 1 sorts nothing.",
    )
    holdout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the pairs that are not trained on; they are evaluated each epoch.",
    )
    max_tokens: int = Field(
        default=2048, ge=32, description="Longer pairs are set aside and counted."
    )
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    reference: Literal["computed", "generated"] = Field(
        default="computed",
        description="Log-probabilities of the untuned policy. generated: the service's own, for the same dtype as "
        "policy.engine.dtype; a sample is computed too, and all are where it differs.",
    )
    lora: LoraSettings = LoraSettings()
    train_projector: bool = Field(
        default=False,
        description="Train the layers between vision tower and language model too, whole.",
    )
    workers: int = Field(default=1, ge=1)
    accelerator: Literal["cpu", "gpu"] = "gpu"
    cpus_per_worker: float = Field(default=1.0, gt=0)
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload: Literal["none", "optimizer", "parameters"] = Field(
        default="none",
        description="What is kept in the CPU's memory between uses: the optimizer's state (zero_stage 1 "
        "and up), or the parameters too (zero_stage 3). A GPU must still hold the whole policy once, before the "
        "first step.",
    )
    gradient_checkpointing: bool = False
    checkpoint_every: int = Field(default=50, ge=1, description="Steps between checkpoints.")
    max_failures: int = Field(default=2, ge=0, description="Worker failures that a run survives.")
    chosen_fall_warning: float = Field(
        default=20.0,
        gt=0,
        description="Warn once when chosen responses have lost so many nats on average while the "
        "loss falls.",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.zero_stage < {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]:
            raise ValueError(
                f"offload: {self.offload} needs a higher zero_stage than {self.zero_stage}"
            )
        budget = self.tokens_per_micro_batch
        if budget is not None and budget < 2 * self.max_tokens:
            raise ValueError(
                "tokens_per_micro_batch is below 2 × max_tokens: a pair of two such rows would not fit"
            )
        return self


class EvaluationConfig(Section):
    """Captions of held-out images before and after, scored against COCO annotations."""

    prompts: Location
    images: Location
    instances: Location = Field(description="COCO instances JSON.")
    captions: Location | None = Field(
        default=None, description="COCO captions JSON, as CHAIR uses it."
    )
    limit: int | None = Field(default=None, ge=1)
    max_tokens: int = Field(default=512, ge=1)
    pope: list[Location] = Field(default_factory=list, description="POPE files, JSON lines.")
    error_counter: str | None = Field(
        default=None,
        description="'module:function' that counts a response's errors against its ground truth, "
        "where such a count exists (the demo's world).",
    )
    bootstrap_samples: int = Field(default=2000, ge=100)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)


class MergeConfig(Section):
    """The check that merged weights compute what base + adapter compute."""

    parity_rows: int = Field(default=8, ge=1)
    tolerance: float = Field(
        default=0.05, gt=0, description="Largest allowed mean |Δ log-prob| at response positions."
    )


class RunConfig(Section):
    """A whole run: what `sima submit pipeline CONFIG` takes."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    runs: Folder = Field(
        default="runs", validate_default=True, description="Where run folders are made."
    )
    seed: int = 0
    rounds: int = Field(default=1, ge=1, le=20)
    data: DataConfig
    policy: PolicyConfig
    generation: GenerationConfig = GenerationConfig()
    critic: CriticConfig = CriticConfig()
    pairs: PairsConfig = PairsConfig()
    training: TrainingConfig = TrainingConfig()
    merge: MergeConfig = MergeConfig()
    evaluation: EvaluationConfig | None = None

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a YAML file.

        Raises:
            ConfigError: Unreadable, not YAML, an unknown key, or a value that does not fit; names
                each.
        """
        try:
            with open(path, encoding="utf-8") as file:
                values = yaml.safe_load(file)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: must hold a mapping of settings")
        return cls.parse(cast(dict[str, Any], values), origin=str(path))

    @classmethod
    def parse(cls, values: dict[str, Any], origin: str = "config") -> Self:
        """Check settings that were read already; `origin` stands in error messages.

        Raises:
            ConfigError: An unknown key or a value that does not fit; names each.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'config'}: {_plain(e)}" for e in error.errors()
            )
            raise ConfigError(f"{origin}: {problems}") from error

    def dump(self) -> str:
        """The resolved config as YAML; loading it again gives an equal config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _plain(error: Any) -> str:
    """One validation problem in a user's words."""
    match error["type"]:
        case "extra_forbidden":
            return "unknown key"
        case "missing":
            return "is required"
        case _:
            return str(error["msg"]).removeprefix("Value error, ")

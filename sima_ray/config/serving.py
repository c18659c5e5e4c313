"""The policy, and the deployments that serve it."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from sima_ray.config.base import Folder, Location, Section
from sima_ray.config.origins import Origin


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
        default=256,
        ge=1,
        description="Requests that the engine of a replica computes at once; a row's call brings two.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Further vLLM engine arguments, passed on as they are."
    )


class ServiceConfig(Section):
    """The Serve deployments of the policy and the critic."""

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing_requests: int = Field(
        default=64,
        ge=1,
        description="Calls per replica; above it, scale up. A call counts once, however many requests it "
        "brings to the engine.",
    )
    max_ongoing_requests: int = Field(
        default=256, ge=1, description="Calls per replica; above it, queue."
    )
    max_queued_requests: int = Field(
        default=4096, ge=-1, description="Calls of one caller; above it, 503. -1: no limit."
    )
    upscale_delay_s: float = Field(default=5.0, ge=0)
    downscale_delay_s: float = Field(default=300.0, ge=0)
    release_for_training: bool = Field(
        default=False,
        description="Remove the replicas while training runs, on a cluster too small for both.",
    )
    routing: Literal["image", "load"] = Field(
        default="image",
        description="image: all requests about an image to one replica, unless others are far less "
        "busy; load: as Serve does by itself.",
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
    image_origins: list[Origin] = Field(
        default_factory=list,
        description="Where the critic fetches images from that a request names by URL, each such as "
        "https://images.example.org; from nowhere else.",
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

"""The machines that a run was worked out for."""

from pydantic import Field

from sima_ray.config.base import Section


class HardwareConfig(Section):
    """What `sima plan` reckons with; a cluster that has other GPUs is not refused."""

    gpus: int = Field(default=8, ge=1, description="Of the whole cluster.")
    gpu_memory_gb: float = Field(default=80.0, gt=0, description="Of one GPU, in 10⁹ bytes.")
    gpu_tflops: float = Field(
        default=312.0, gt=0, description="Peak of dense bfloat16, 10¹² a second; an A100's."
    )
    gpu_bandwidth_gb_s: float = Field(
        default=2000.0, gt=0, description="Of a GPU's memory, 10⁹ bytes a second; an A100's."
    )
    gpu_link_gb_s: float = Field(
        default=300.0,
        gt=0,
        description="What a GPU receives from the others, 10⁹ bytes a second; an A100's by NVLink.",
    )

"""The run config: one YAML file, checked as it is read, with every default on its field.

Imports no torch, ray or vllm, so that a command can check a config and answer at once.
"""

from sima_ray.config.base import Section
from sima_ray.config.evaluation import (
    AmberConfig,
    EvaluationConfig,
    HalBenchConfig,
    JudgeConfig,
    MementosConfig,
    MMHalConfig,
)
from sima_ray.config.hardware import HardwareConfig
from sima_ray.config.run import (
    CriticConfig,
    DataConfig,
    EarlyStoppingConfig,
    GenerationConfig,
    MergeConfig,
    PairsConfig,
    RunConfig,
)
from sima_ray.config.serving import EngineConfig, PolicyConfig, ServiceConfig
from sima_ray.config.training import LoraSettings, LossSettings, TrainingConfig

__all__ = [
    "AmberConfig",
    "CriticConfig",
    "DataConfig",
    "EarlyStoppingConfig",
    "EngineConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "HalBenchConfig",
    "HardwareConfig",
    "JudgeConfig",
    "LoraSettings",
    "LossSettings",
    "MMHalConfig",
    "MementosConfig",
    "MergeConfig",
    "PairsConfig",
    "PolicyConfig",
    "RunConfig",
    "Section",
    "ServiceConfig",
    "TrainingConfig",
]

"""A shipped run config made small: what `--set` changes so that it runs here, on a tiny model and a CPU."""

from pathlib import Path
from typing import Any

TOKENS = 8
"""Of a response, and of a critique."""


def small(world: Path, model: Path, port: int) -> list[str]:
    """What is not as the config says: a CPU in place of GPUs, this test's data, few and short texts."""
    test = {"prompts": "prompts.jsonl", "images": "images"}
    test |= {"instances": "instances.json", "captions": "captions.json"}
    changes: dict[str, Any] = {
        "policy.model": model,
        "policy.engine.accelerator": "cpu",
        "policy.engine.cpus": 1,
        "policy.engine.max_model_len": 4096,
        "policy.engine.max_num_seqs": 8,
        "policy.engine.block_size": 32,
        "policy.service.port": port,
        "policy.service.max_replicas": 1,
        "policy.service.release_for_training": "false",  # so that weights are swapped in place
        "training.accelerator": "cpu",
        "training.workers": 1,
        "training.cpus_per_worker": 1,
        "training.batch_size": 2,
        "training.epochs": 1,
        "training.learning_rate": 0.05,
        "generation.workers": 1,
        "generation.max_tokens": TOKENS,
        "critic.max_tokens": TOKENS,
        "pairs.inconsistent_weight": 1,
        "merge.parity_rows": 2,
        "runs": world / "runs",
        "data.prompts": world / "train" / "prompts.jsonl",
        "data.images": world / "train" / "images",
        "evaluation.pope": "[]",
        "evaluation.max_tokens": TOKENS,
        "evaluation.bootstrap_samples": 100,
    }
    changes |= {f"evaluation.{key}": world / "test" / name for key, name in test.items()}
    return [f"{key}={value}" for key, value in changes.items()]

"""What tells the run configs of a family apart: how much at a time, and on which GPUs; not what is computed."""

from pathlib import Path

import pytest
from small_runs import small

from sima_ray.cli_config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
FAMILIES = {"llava-1.5": "llava-1.5-7b"}
"""Of those that have several: the one that tests/engine/test_run_configs.py runs."""
ALONE = {"demo", "llava-next-7b", "qwen3-vl-8b", "smolvlm-2b"}
OF_A_LAYOUT = {
    *("name", "hardware", "generation.concurrency", "training.tokens_per_micro_batch"),
    *("training.offload", "training.zero_stage"),
    *("policy.service.target_ongoing_requests", "policy.service.max_ongoing_requests"),
    *("policy.engine.tensor_parallel_size", "policy.engine.gpu_memory_utilization"),
}
NAMES = sorted(file.stem for file in CONFIGS.glob("*.yaml") if file.stem not in ALONE)


def settings(name: str) -> dict[str, object]:
    """All settings of a config made small, by dotted key."""
    config = load_config(CONFIGS / f"{name}.yaml", small(Path("/w"), Path("/m"), 8000))
    flat: dict[str, object] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    walk("", config.model_dump(mode="json"))
    return flat


@pytest.mark.parametrize("name", NAMES)
def test_a_config_in_small_is_the_one_that_is_run_end_to_end(name: str) -> None:
    tested = next(ours for prefix, ours in FAMILIES.items() if name.startswith(prefix))
    here, there = settings(name), settings(tested)
    apart = {key for key in here.keys() | there.keys() if here.get(key) != there.get(key)}
    assert {key for key in apart if not key.startswith("hardware.")} <= OF_A_LAYOUT

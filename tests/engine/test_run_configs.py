"""A shipped run config of each family, end to end on a tiny model: real vLLM, Data, DeepSpeed, merge, swap.

What the config says stays, but for what a CPU cannot do, and for sizes. The models are untrained, and lean towards
saying a verdict: their candidates differ, their critiques can be read, and some pairs come of it.
"""

import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from safetensors.torch import load_file
from small_runs import small

from sima_ray.cli_config import load_config
from sima_ray.config import RunConfig
from sima_ray.critic.verdict import VERDICTS
from sima_ray.demo.world import build_world
from sima_ray.policy.checkpoint import load_policy
from sima_ray.policy.tiny import TinyShape, make_model, make_processor
from sima_ray.runtime import cluster, stages
from sima_ray.runtime.progress import Progress
from sima_ray.runtime.run import Run

pytestmark = pytest.mark.timeout(900)
CONFIGS = Path(__file__).parents[2] / "configs"
PROMPTS, HELD_OUT = 4, 2


def llava() -> tuple[Any, Any]:
    processor = make_processor(VERDICTS, TinyShape())
    return make_model(processor, TinyShape()), processor


# The other configs of LLaVA-1.5, 13B's too, are the first of these in small (tests/unit/test_run_settings.py).
MADE: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava-1.5-7b": llava,
    "llava-next-7b": tiny_families.llava_next,
    "qwen3-vl-8b": tiny_families.qwen3_vl,
    "smolvlm-2b": tiny_families.idefics3,
}


@dataclass
class Finished:
    """A run that went through the pipeline."""

    config: RunConfig
    summary: dict[str, Any]
    lines: str
    seconds: float

    @property
    def folder(self) -> Path:
        return Path(self.config.runs) / self.config.name

    def read(self, *parts: str) -> Any:
        return json.loads(self.folder.joinpath(*parts).read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("configs")
    build_world(root / "train", "train", PROMPTS)
    build_world(root / "test", "test", HELD_OUT)
    return root


@pytest.fixture(scope="module")
def port(ray_cluster: None) -> Iterator[int]:
    from ray import serve

    yield cluster.free_port()
    serve.shutdown()


@pytest.fixture(scope="module", params=list(MADE))
def finished(request: Any, world: Path, port: int) -> Finished:
    name = str(request.param)
    model, processor = MADE[name]()
    first, second = (
        processor.tokenizer.encode(text, add_special_tokens=False) for text in VERDICTS
    )
    tiny_families.lean(model, {first[0]: 5.0, second[0]: 4.5})
    folder = tiny_families.save(model, processor, world / "models" / name)
    config = load_config(CONFIGS / f"{name}.yaml", small(world, folder, port))
    lines = io.StringIO()
    started = time.monotonic()
    summary = stages.pipeline(Run.open(config, Progress(lines)))
    seconds = time.monotonic() - started
    print(f"{name}: {seconds:.1f} s\n" + lines.getvalue())
    return Finished(config, summary, lines.getvalue(), seconds)


def test_a_tiny_model_of_each_family_goes_all_the_way(finished: Finished) -> None:
    ledger = finished.summary["ledger"]
    assert ledger["rows"] == PROMPTS == sum(ledger["outcomes"].values())
    assert ledger["pairs"] >= 3, ledger
    train = finished.read("round-1", "train", "train.json")
    assert (train["steps"], train["pairs"], train["set_aside"]) == (2, ledger["pairs"], {})
    assert train["settings"]["training"]["lora"]["r"] == 128
    captions = (finished.folder / "round-1" / "captions.jsonl").read_text().splitlines()
    assert len(captions) == HELD_OUT
    assert "weights swapped in place" in finished.lines


def test_what_was_tuned_is_the_language_model_alone(finished: Finished) -> None:
    adapter = load_file(
        finished.folder / "round-1" / "train" / "adapter" / "adapter_model.safetensors"
    )
    assert adapter
    names = [name for name, weight in adapter.items() if "lora_B" in name and weight.any()]
    assert names
    base, _ = load_policy(finished.config.policy.model)
    tuned, _ = load_policy(finished.folder / "round-1" / "policy")
    after = dict(tuned.named_parameters())
    moved = {n for n, p in base.named_parameters() if not torch.equal(p, after[n])}
    assert moved
    layers: Any = base.get_decoder()
    own = {id(p) for p in layers.layers.parameters()}
    assert moved <= {n for n, p in base.named_parameters() if id(p) in own}

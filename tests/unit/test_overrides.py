"""Settings given beside a config: `--set KEY=VALUE`, `--model`, and files that extend another one."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sima_ray.cli_config import load_config
from sima_ray.config import RunConfig
from sima_ray.errors import ConfigError

BASE: dict[str, Any] = {
    "name": "base",
    "data": {"prompts": "/p.jsonl", "images": "/i"},
    "policy": {"model": "/m", "engine": {"options": {"seed": 1}}},
    "evaluation": {"prompts": "/p", "images": "/i", "instances": "/j"},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("training.epochs=7", 7),
        ("training.learning_rate=1e-5", 1e-5),
        ("training.gradient_checkpointing=true", True),
        ("training.zero_stage=3", 3),
        ("policy.engine.accelerator=cpu", "cpu"),
        ("name=7", "7"),
        ("name=true", "true"),
        ("data.limit=null", None),
        ("data.limit=5", 5),
        ("policy.model=/a=b", "/a=b"),
        ("training.lora.targets=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("policy.engine.options.enforce_eager=true", True),
        ("policy.engine.options.a.b=2", 2),
        ("evaluation.limit=3", 3),
        ("evaluation.captions=null", None),
    ],
)
def test_a_setting_has_the_type_of_its_field(file: Path, setting: str, value: object) -> None:
    found: Any = RunConfig.load(file, [setting]).model_dump()
    for part in setting.partition("=")[0].split("."):
        found = found[part]
    assert found == value and type(found) is type(value)


def test_the_last_counts_and_the_others_stay(file: Path) -> None:
    run = RunConfig.load(file, ["seed=1", "training.lora.r=4", "seed=2"])
    assert (run.seed, run.training.lora.r, run.training.lora.alpha) == (2, 4, 256)
    assert run.policy.engine.options == {"seed": 1}
    assert RunConfig.load(file, ["evaluation=null"]).evaluation is None


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("training.epoch=1", "--set training.epoch: unknown key; there are training.epochs"),
        ("trainig.epochs=1", "--set trainig.epochs: unknown key; there are training"),
        ("training.epochs.x=1", "--set training.epochs.x: training.epochs has no keys"),
        ("training.epochs", "--set training.epochs: give KEY=VALUE"),
        ("=1", "give KEY=VALUE"),
        ("training.epochs=0", "--set training.epochs=0: training.epochs: "),
        ("training.epochs=many", "training.epochs: "),
        ("training.zero_stage=9", "training.zero_stage: "),
        ("training=1", "training: "),
    ],
)
def test_an_error_names_the_key(file: Path, setting: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        RunConfig.load(file, [setting])
    assert "\n" not in str(caught.value)


def test_short_options_are_settings(file: Path) -> None:
    run = load_config(file, ["policy.model=/other", "seed=3"], model="/tiny", name="mine")
    assert (run.policy.model, run.name, run.seed) == ("/tiny", "mine", 3)


def test_a_file_extends_another(tmp_path: Path, file: Path) -> None:
    (tmp_path / "below").mkdir()
    small = tmp_path / "below" / "small.yaml"
    small.write_text("extends: ../run.yaml\nname: small\ntraining: {epochs: 2, lora: {r: 8}}\n")
    smaller = tmp_path / "below" / "smaller.yaml"
    smaller.write_text("extends: small.yaml\ntraining: {lora: {r: 4}, workers: 2}\n")
    run = RunConfig.load(smaller, ["training.workers=3"])
    assert (run.name, run.policy.model) == ("small", "/m")
    training = run.training
    assert (training.epochs, training.lora.r, training.workers) == (2, 4, 3)
    assert "extends" not in run.dump()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: a.yaml", "extends itself"),
        ("extends: [a.yaml]", "extends: must name one file"),
        ("extends: none.yaml", "none.yaml: cannot be read"),
    ],
)
def test_what_cannot_be_extended(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)):
        RunConfig.load(tmp_path / "a.yaml")

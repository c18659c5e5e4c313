"""The run config: errors that name the key, no lost values, no field that nothing reads."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sima_ray import config
from sima_ray.config import PairsConfig, RunConfig, Section, TrainingConfig
from sima_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]
MINIMAL: dict[str, Any] = {
    "name": "test",
    "data": {"prompts": "prompts.jsonl", "images": "images"},
    "policy": {"model": "model"},
}


def sections() -> list[type[Section]]:
    """Every section of the config."""
    found = [value for value in vars(config).values() if isinstance(value, type)]
    return [value for value in found if issubclass(value, Section) and value is not Section]


def changed(path: str, value: object) -> dict[str, Any]:
    """MINIMAL with the value at a dotted path set (or removed: None)."""
    values: dict[str, Any] = yaml.safe_load(yaml.safe_dump(MINIMAL))
    *parents, last = path.split(".")
    place = values
    for parent in parents:
        place = place.setdefault(parent, {})
    if value is None:
        del place[last]
    else:
        place[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("colour", 1, "colour: unknown key"),
        ("training.lora.rank", 8, "training.lora.rank: unknown key"),
        ("policy.engine.gpus", 1, "policy.engine.gpus: unknown key"),
        ("data.prompts", None, "data: give prompts, or pairs in their place: one of the two"),
        ("data.pairs", "p.parquet", "data: both prompts and pairs are given"),
        ("name", None, "name: is required"),
        ("evaluation.images", "x", "evaluation: nothing to evaluate: give prompts, images"),
        (
            "evaluation",
            {"images": "i", "instances": "j"},
            "evaluation: prompts, images and instances go together: prompts missing",
        ),
        ("evaluation.pope", ["p.jsonl"], "evaluation: pope needs images"),
        ("evaluation.halbench", {"questions": "q"}, "evaluation: halbench needs instances"),
        (
            "evaluation.mmhal",
            {"questions": "q", "images": "i"},
            "evaluation: mmhal and mementos need a judge section",
        ),
        ("evaluation.judge.base_url", "https://a.b/v1?x=1", "neither a query nor a fragment"),
        ("evaluation.judge.base_url", "https://me:secret@a.b/v1", "is no base URL"),
        (
            "evaluation.judge",
            {"base_url": "http://a.b/v1", "model": "m", "key_env": "K", "key_file": "k"},
            "evaluation.judge: key_env and key_file: give one of the two",
        ),
        ("training.epochs", 0, "training.epochs: "),
        ("training.zero_stage", 4, "training.zero_stage: "),
        ("name", "a/b", "name: "),
        ("pairs.max_length_ratio", 1, "pairs.max_length_ratio: "),
        ("pairs.inconsistent_weight", 1.5, "pairs.inconsistent_weight: Input should be less than"),
        ("pairs.inconsistent_weight", -0.1, "pairs.inconsistent_weight: Input should be greater"),
        ("pairs.inconsistent_weight", float("nan"), "pairs.inconsistent_weight: "),
        ("training.workers", 0, "training.workers: "),
        (
            "training.offload",
            "parameters",
            "training: offload: parameters needs a higher zero_stage than 2",
        ),
        (
            "training.tokens_per_micro_batch",
            4095,
            "training: tokens_per_micro_batch is below 2 × max_tokens",
        ),
        ("training.loss", {"label_smoothing": 0.5}, "training.loss.label_smoothing: "),
        ("training.loss", {"kind": "hinge"}, "training.loss.kind: "),
        ("policy.service.min_replicas", 2, "policy.service: min_replicas is above max_replicas"),
        ("pairs.earlier_rounds", 1.5, "pairs.earlier_rounds: Input should be less than"),
        ("critic.policy", "other", "critic.policy: "),
        ("early_stopping", {}, "config: early_stopping needs an evaluation section"),
        ("evaluation.amber", {"data": "d", "images": "i", "parts": ["all"]}, "amber.parts.0: "),
    ],
)
def test_an_error_names_the_file_and_the_key(
    tmp_path: Path, path: str, value: object, message: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(changed(path, value)))
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        RunConfig.load(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_errors_are_monitored_only_where_they_are_counted() -> None:
    found = {"prompts": "p", "images": "i", "instances": "j"}
    values = MINIMAL | {"early_stopping": {"monitor": "errors"}}
    with pytest.raises(ConfigError, match=r"monitor: errors needs evaluation\.error_counter"):
        RunConfig.parse(values | {"evaluation": found})
    run = RunConfig.parse(values | {"evaluation": found | {"error_counter": "module:function"}})
    assert run.early_stopping is not None and run.early_stopping.monitor == "errors"


def test_settings_of_the_command_line_replace_the_files(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    amber = 'evaluation.amber={"data": "d", "images": "i"}'
    run = RunConfig.load(file, [amber, "evaluation.amber.limit=3", "seed=7", "name=other"])
    assert run.evaluation is not None and run.evaluation.amber is not None
    assert (run.evaluation.amber.limit, run.seed, run.name) == (3, 7, "other")


def test_suites_of_rounds() -> None:
    values = {"amber": {"data": "d", "images": "i"}, "pope": ["p"], "images": "i"}
    early = {"early_stopping": {}}
    run = RunConfig.parse(MINIMAL | {"evaluation": values | {"every_round": ["amber"]}})
    assert run.evaluation is not None
    assert run.evaluation.suites == ("pope", "amber")
    assert run.evaluation.suites_of_rounds == ("amber",)
    with pytest.raises(ConfigError, match="every_round: chair has no files here"):
        RunConfig.parse(MINIMAL | {"evaluation": values | {"every_round": ["chair"]}})
    with pytest.raises(ConfigError, match="early_stopping needs CHAIR in every round"):
        RunConfig.parse(MINIMAL | early | {"evaluation": values})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rounds": 2}, "rounds: with data.pairs there is one"),
        ({"pairs": {"inconsistent_weight": 0.5}}, "inconsistent_weight: given pairs"),
    ],
)
def test_given_pairs_leave_out_what_needs_prompts(changes: dict[str, Any], words: str) -> None:
    values = MINIMAL | {"data": {"pairs": "pairs.parquet", "images": "images"}}
    assert RunConfig.parse(values).data.pairs == str(Path("pairs.parquet").absolute())
    with pytest.raises(ConfigError, match=re.escape(words)):
        RunConfig.parse(values | changes)


def test_every_problem_is_named() -> None:
    values = changed("colour", 1) | {"rounds": 0, "name": "?"}
    with pytest.raises(ConfigError, match=r"(?=.*colour)(?=.*rounds)(?=.*name)"):
        RunConfig.parse(values)


@pytest.mark.parametrize("text", ["", "- a\n", "name: [", "just words"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(file))):
        RunConfig.load(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        RunConfig.load(tmp_path / "missing.yaml")


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**63),
    rate=st.floats(1e-9, 1),
    ratio=st.one_of(st.none(), st.floats(1.01, 100)),
    name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z"),
)
def test_dump_loads_equal(seed: int, rate: float, ratio: float | None, name: str) -> None:
    run = RunConfig.parse(
        MINIMAL
        | {"seed": seed, "name": name}
        | {"training": {"learning_rate": rate}, "pairs": {"max_length_ratio": ratio}}
    )
    assert RunConfig.parse(yaml.safe_load(run.dump())) == run


def test_locations_are_absolute_or_uris() -> None:
    run = RunConfig.parse(changed("data.images", "s3://bucket/images"))
    assert run.data.images == "s3://bucket/images"
    assert run.data.prompts == str(Path("prompts.jsonl").absolute())
    assert Path(run.runs).is_absolute()


def test_sections_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        PairsConfig().length_policy = "balance"
    assert TrainingConfig().beta == 0.1


def test_every_shipped_config_loads() -> None:
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        run = RunConfig.load(path)
        assert RunConfig.parse(yaml.safe_load(run.dump())) == run, path


def test_every_field_is_read() -> None:
    """Each field is read, as an attribute, by some file of the product beside config.py."""
    files = [
        file for top in ("sima_ray", "jobs", "serve_apps") for file in (ROOT / top).rglob("*.py")
    ]
    read = {
        node.attr
        for file in files
        if file != Path(config.__file__)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    unread = [
        f"{section.__name__}.{name}"
        for section in sections()
        for name in section.model_fields
        if name not in read
    ]
    assert not unread, f"settings that nothing reads: {', '.join(unread)}"

"""The arms of the proof: rules that replace the critic, and run folders made from a source run."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.proof.preferences import RULES, derive, pairs_of
from benchmarks.proof.settings import CRITIC, Arm, changed
from sima_ray.config import RunConfig
from sima_ray.data.sinks import read_pairs
from sima_ray.ledger import Ledger
from sima_ray.records import ROW_SCHEMA, Outcome

COUNT = {"none": 0, "one": 1, "two of them": 2}
ROWS = 6


def errors(text: str, truth: str) -> int:
    return COUNT[text]


def candidate(text: str, kind: str) -> dict[str, Any]:
    return {
        "text": text,
        "kind": kind,
        "temperature": 0.0,
        "top_p": 1.0,
        "tokens": 1,
        "logprob": -1.0,
        "finish_reason": "stop",
        "model_version": "base",
    }


def row(
    number: int,
    texts: tuple[str, str],
    outcome: Outcome = Outcome.PREFERRED_SECOND,
    choices: tuple[int, int] = (2, 1),
) -> dict[str, Any]:
    judged = outcome is not Outcome.IDENTICAL
    preferred = outcome is Outcome.PREFERRED_SECOND
    return {
        "row_id": f"{number:03d}",
        "image": f"{number}.png",
        "text": "Describe.",
        "ground_truth": "truth",
        "source": f"p.jsonl:{number}",
        "candidates": [candidate(texts[0], "greedy"), candidate(texts[1], "sampled")],
        "critiques": [
            {"order": order, "raw": "", "reason": "", "choice": choice, "tokens": 1}
            for order, choice in zip(("12", "21"), choices, strict=True)
        ]
        if judged
        else [],
        "outcome": outcome.value,
        "chosen": texts[1] if preferred else None,
        "rejected": texts[0] if preferred else None,
        "chosen_from": "sampled" if preferred else None,
        "rejected_from": "greedy" if preferred else None,
        "weight": 1.0 if preferred else None,
    }


@pytest.mark.parametrize(
    ("rule", "texts", "chosen"),
    [
        ("shorter", ("two of them", "one"), 1),
        ("shorter", ("one", "two of them"), 0),
        ("shorter", ("one", "none"), None),
        ("greedy", ("one", "none"), 0),
        ("oracle", ("one", "none"), 1),
        ("oracle", ("one", "one"), None),
    ],
)
def test_rules(rule: str, texts: tuple[str, str], chosen: int | None) -> None:
    assert RULES[rule](row(1, texts), 0, errors) == chosen


def test_random_is_drawn_by_row_and_seed() -> None:
    rows = [row(number, ("one", "none")) for number in range(200)]
    draws = [[RULES["random"](r, seed, errors) for r in rows] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert 60 < sum(filter(None, draws[0])) < 140


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A run up to its preferences, as jobs leave it: two files of rows, not in the order of their ids."""
    rows = [
        row(1, ("one", "none")),
        row(2, ("one", "two of them")),
        row(3, ("one", "one"), Outcome.IDENTICAL),
        row(4, ("one", "none"), Outcome.INCONSISTENT, choices=(1, 1)),
        row(5, ("two of them", "one")),
        row(6, ("none", "one")),
    ]
    folder = tmp_path / "source"
    (folder / "round-1" / "preferences").mkdir(parents=True)
    (folder / "round-0").mkdir()
    (folder / "stages").mkdir()
    (folder / "round-0" / "captions.jsonl").write_text("{}\n")
    pq.write_table(pa.Table.from_pylist(rows, ROW_SCHEMA), folder / "prompts.parquet")
    for name, part in (("b", rows[:2]), ("a", rows[2:])):
        table = pa.Table.from_pylist(part, ROW_SCHEMA)
        pq.write_table(table, folder / "round-1" / "preferences" / f"{name}.parquet")
    for key, result in (
        ("prepare", {"rows": ROWS, "good": ROWS}),
        ("round-0-evaluate", {"recall": {"value": 0.5}}),
        ("round-1-preferences", {"ledger": {}, "usage": {}}),
    ):
        marker = {"result": result, "seconds": 1.0, "at": "now"}
        (folder / "stages" / f"{key}.json").write_text(json.dumps(marker))
    return folder


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    held_out = {"prompts": "t.jsonl", "images": "images", "instances": "i.json"}
    values = {
        "name": "arm",
        "runs": str(tmp_path),
        "data": {"prompts": "p.jsonl", "images": "images"},
        "policy": {"model": "model"},
        "evaluation": held_out,
    }
    return RunConfig.parse(values)


def marker(folder: Path, key: str) -> dict[str, Any]:
    return json.loads((folder / "stages" / f"{key}.json").read_text())["result"]


def test_the_critics_arm_has_the_pipelines_own_pairs(source: Path, config: RunConfig) -> None:
    folder = derive(source, config, CRITIC, errors)
    pairs = list(read_pairs(str(folder / "round-1" / "pairs.parquet")))
    assert [pair.row_id for pair in pairs] == ["001", "002", "005", "006"]
    assert {pair.chosen_from for pair in pairs} == {"sampled"}
    assert RunConfig.load(folder / "run.yaml") == config
    assert marker(folder, "prepare") == {"rows": 6, "good": 6}
    assert marker(folder, "round-1-preferences")["ledger"]["pairs"] == pairs_of(folder) == 4
    assert marker(folder, "round-0-evaluate") == {"recall": {"value": 0.5}}


def test_fewer_prompts_are_the_first_of_the_index(source: Path, config: RunConfig) -> None:
    few = changed(config, data={"limit": 4})
    folder = derive(source, few, CRITIC, errors)
    assert marker(folder, "prepare") == {"rows": 4, "good": 4}
    assert pq.read_table(folder / "prompts.parquet").num_rows == 4
    pairs = read_pairs(str(folder / "round-1" / "pairs.parquet"))
    assert [pair.row_id for pair in pairs] == ["001", "002"]
    assert marker(folder, "round-1-preferences")["ledger"]["rows"] == 4


def test_a_rule_chooses_among_the_judged_rows(source: Path, config: RunConfig) -> None:
    folder = derive(source, config, Arm("oracle", "", "", rule="oracle"), errors)
    pairs = list(read_pairs(str(folder / "round-1" / "pairs.parquet")))
    assert [(pair.row_id, pair.chosen, pair.weight) for pair in pairs] == [
        ("001", "none", 1.0),
        ("002", "one", 1.0),
        ("004", "none", 1.0),
        ("005", "one", 1.0),
        ("006", "none", 1.0),
    ]


@pytest.mark.parametrize("rule", RULES)
def test_a_rules_ledger_counts_its_own_pairs_and_ties(
    source: Path, config: RunConfig, rule: str
) -> None:
    folder = derive(source, config, Arm(rule, "", "", rule=rule), errors)
    ledger = marker(folder, "round-1-preferences")["ledger"]
    assert ledger == json.loads((folder / "round-1" / "ledger.json").read_text())
    assert ledger["pairs"] == pairs_of(folder)
    assert ledger["rows"] == ROWS == ledger["pairs"] + ledger["inconsistent"] + ledger["identical"]
    assert ledger["identical"] == 1  # was not judged, and stays so
    Ledger.from_json(ledger).check()


def test_what_becomes_of_verdicts_is_the_configs(source: Path, config: RunConfig) -> None:
    half = changed(config, pairs={"inconsistent_weight": 0.5})
    folder = derive(source, half, CRITIC, errors)
    pairs = list(read_pairs(str(folder / "round-1" / "pairs.parquet")))
    assert [(pair.row_id, pair.weight) for pair in pairs if pair.weight != 1.0] == [("004", 0.5)]


def test_a_folder_that_is_there_stays(source: Path, config: RunConfig) -> None:
    folder = derive(source, config, CRITIC, errors)
    (folder / "summary.json").write_text("{}")
    assert derive(source, config, CRITIC, errors) == folder
    assert (folder / "summary.json").exists()

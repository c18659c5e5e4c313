"""The proof's settings, tables and picture, and the result that is committed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.proof import __main__ as command
from benchmarks.proof import picture, render
from benchmarks.proof.critic import Judged, figures
from benchmarks.proof.gate import gate
from benchmarks.proof.settings import (
    BASE,
    FIGURES,
    GRID,
    POPE_KINDS,
    Setting,
    Sizes,
    arms_of,
    changed,
    grid,
)
from sima_ray.config import RunConfig
from sima_ray.errors import ConfigError
from sima_ray.policy.checkpoint import fingerprint

ROOT = Path(__file__).parents[2]
DEMO = RunConfig.load(ROOT / "configs" / "demo.yaml")


def test_settings_that_need_more_prompts_are_left_out() -> None:
    assert grid(1600) == GRID
    assert grid(800) == tuple(setting for setting in GRID if setting.prompts == 800)
    assert grid(100) == (Setting(100, GRID[0].learning_rate, GRID[0].epochs),)


def test_names_of_settings_and_arms_can_be_runs() -> None:
    assert len({setting.name for setting in GRID}) == len(GRID)
    for name in (*(setting.name for setting in GRID), *(arm.name for arm in arms_of(DEMO))):
        assert changed(DEMO, name=f"test-{name}-0").name.endswith(f"{name}-0")


def test_every_arms_pairs_fit_the_config() -> None:
    for arm in arms_of(DEMO):
        run = changed(DEMO, pairs=arm.pairs)
        assert {key: getattr(run.pairs, key) for key in arm.pairs} == dict(arm.pairs)
    assert changed(DEMO, pairs={"length_policy": "balance"}).training == DEMO.training
    with pytest.raises(ConfigError, match="unknown key"):
        changed(DEMO, pairs={"no_such": 1})


def test_the_other_layouts_arm_is_named_by_it() -> None:
    assert [arm.name for arm in arms_of(DEMO)][:2] == ["critic", "critic_image_first"]
    turned = changed(DEMO, critic={"layout": "image_first"})
    assert [arm.name for arm in arms_of(turned)][:2] == ["critic", "critic_examples_first"]


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05}


def result() -> dict[str, Any]:
    """A whole proof with made-up figures."""
    pope = dict.fromkeys(POPE_KINDS, estimate(0.9))
    row = {name: estimate(0.5) for name in FIGURES}
    arms = {
        arm: {
            **row,
            "chair_s": estimate(0.1 * at),
            "by_seed": {key: [0.1 * at - 0.01, 0.1 * at + 0.01] for key in FIGURES},
            "pairs": [300, 300],
            "label": f"label of {arm}",
            "about": f"about {arm}",
        }
        for at, arm in enumerate(("base", "critic", "random", "oracle", "critic_keep"), 1)
    }
    arms["base"] |= {"pairs": [], "by_seed": {key: [0.1] for key in FIGURES}}
    critic = figures([Judged((0, 1), (2, 2), (0, 0)), Judged((1, 1), (2, 2), (0, None))], 0.95)
    chosen = {"prompts": 800, "learning_rate": 2e-4, "epochs": 2}
    line = {"what": "errors", "must": "interval below 0", "measured": -0.5}
    return {
        "gate": [
            {**line, "low": -0.6, "high": -0.4, "holds": True},
            {**line, "what": "recall", "measured": None, "holds": False},
        ],
        "critic": {"layout": "examples_first", **critic},
        "critic_image_first": {"layout": "image_first", **critic},
        "arms": arms,
        "differences": {name: row for name in arms if name != "critic"},
        "share_of_oracle": estimate(0.85),
        "rounds": [{"round": k, **row, "pope": pope, "pairs": 300} for k in (1, 2, 3)],
        "pope": dict.fromkeys(POPE_KINDS, 0.9),
        "pope_intervals": pope,
        "same_candidates": {"same": 790, "of": 800},
        "choice": {
            "rule": "the rule",
            "base": row,
            "settings": [
                {**chosen, **row, "pairs": 300},
                {**chosen, **row, "epochs": 3, "pairs": 9},
            ],
            "chosen": chosen,
        },
        "images": 500,
        "settings": {"confidence": 0.9, "pairs": {"length_policy": "none", "ratio": None}},
        "seeds": {"dpo": [0, 1, 2]},
        "versions": {"python": "3.11"},
        "revisions": ["abc"],
        "aggregated_at": "def",
        "command": "python -m benchmarks.proof",
        "date": "2026-01-01",
        "wall_s": 5000,
    }


def test_tables_hold_what_was_measured() -> None:
    text = render.markdown(result())
    assert "| errors | interval below 0 | -0.500 [-0.600, -0.400] | yes |" in text
    assert "| recall | interval below 0 | not measured | **no** |" in text
    assert "The gate holds 1 of 2 lines." in text
    assert "| **critic** | 0.200 [0.150, 0.250]<br>0.190 to 0.210 |" in text
    assert "| base | 0.100 [0.050, 0.150] |" in text
    assert "| 300 / 300 |" in text
    assert text.count("**yes**") == 1  # the chosen setting
    assert "1.000 [0.207, 1.000] 1/1" in text
    assert "83 min 20 s" in text
    assert "with 90% intervals" in text and "95%" not in text
    assert "`length_policy: none`, `ratio: none`" in text
    assert "Of 800 prompts that both judged, 790 had the same candidates" in text
    assert all(f"- **{arm}**: about {arm}" in text for arm in ("base", "random", "critic_keep"))


def test_runs_of_unclean_or_several_revisions_are_shown() -> None:
    assert "runs at revision abc, tables at def" in render.markdown(result())
    for revisions, shown in (
        (["abc", "abd"], "runs at **revisions abc, abd**"),
        (["abc-dirty"], "runs at **revision abc-dirty**"),
    ):
        assert shown in render.markdown(result() | {"revisions": revisions})


def test_every_table_row_has_as_many_cells_as_its_head() -> None:
    blocks = [block for block in render.markdown(result()).split("\n\n") if block.startswith("|")]
    assert len(blocks) == 8
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_the_same_result_gives_the_same_picture(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        picture.draw(copy.deepcopy(result()), tmp_path / name)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    assert b"<dc:date>" not in first


@pytest.mark.parametrize("layout", ["examples_first", "image_first"])
def test_every_arm_has_a_colour_and_shape_of_its_own(layout: str) -> None:
    arms = arms_of(changed(DEMO, critic={"layout": layout}))
    styles = [picture.STYLES[name] for name in (BASE, *(arm.name for arm in arms))]
    assert len(set(styles)) == len(styles)


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        ([], "docs"),
        (["--scenes", "50"], "runs/proof"),
        (["--arms", "random"], "runs/proof"),
        (["--seeds", "1", "--work", "w"], "w"),
        (["--seeds", "1", "--output", "docs"], "docs"),
    ],
)
def test_a_smaller_proof_does_not_take_the_place_of_the_whole_one(
    arguments: list[str], output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    options = command._parser().parse_args(arguments)
    found = command._output(options, command._config(options), command._arms(options))
    assert found == Path(output)


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_numbers_of_things_are_positive(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--seeds", number])
    assert "whole number of at least 1" in capsys.readouterr().err


COMMITTED = ROOT / "docs" / "proof.json"


@pytest.mark.skipif(not COMMITTED.exists(), reason="no proof is committed")
def test_the_committed_proof_is_whole() -> None:
    proof = json.loads(COMMITTED.read_text(encoding="utf-8"))
    whole = Sizes()
    assert min(proof["scenes"]["validation"], proof["scenes"]["test"]) >= whole.scenes >= 500
    assert len(proof["seeds"]["dpo"]) >= whole.seeds >= 3
    assert proof["made_with"]["policy"] == fingerprint(str(ROOT / DEMO.policy.model))
    assert proof["gate"] == gate(proof)
    for critic in (proof["critic"], proof["critic_image_first"]):
        assert all(len(critic[k]) == 2 for k in ("accuracy", "equal_length", "longer_better"))
        assert all(0 <= critic[k] <= 1 for k in ("consistent", "unparseable"))
    assert {kind: type(value) for kind, value in proof["pope"].items()} == dict.fromkeys(
        POPE_KINDS, float
    )
    assert {"base", *(arm.name for arm in arms_of(DEMO))} == set(proof["arms"])
    for arm in proof["arms"].values():
        for name in ("chair_s", "chair_i", "recall", "errors", "objects"):
            assert arm[name]["low"] <= arm[name]["value"] <= arm[name]["high"]
    assert proof["differences"].keys() == proof["arms"].keys() - {"critic"}
    assert {"value", "low", "high"} == proof["share_of_oracle"].keys()
    assert all({"what", "must", "measured", "holds"} <= line.keys() for line in proof["gate"])
    assert {"settings", "seeds", "scenes", "versions", "date"} <= proof.keys()
    assert (ROOT / "docs" / "proof.md").read_text(encoding="utf-8") == render.markdown(proof)

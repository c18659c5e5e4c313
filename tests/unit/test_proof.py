"""The proof's settings, tables and picture, and the result that is committed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.proof import picture, render
from benchmarks.proof.critic import Judged, figures
from benchmarks.proof.settings import FIGURES, GRID, POPE_KINDS, Setting, arms_of, changed, grid
from sima_ray.config import RunConfig
from sima_ray.errors import ConfigError

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
    pope = dict.fromkeys(POPE_KINDS, 0.9)
    row = {name: estimate(0.5) for name in FIGURES}
    arms = {
        arm: {**row, "chair_s": estimate(0.1 * at), "by_seed": {}, "pairs": [300, 300]}
        for at, arm in enumerate(("base", "critic", "random", "oracle", "critic_keep"), 1)
    }
    arms["base"]["pairs"] = []
    critic = figures([Judged((0, 1), (2, 2), (0, 0)), Judged((1, 1), (2, 2), (0, None))])
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
        "pope": pope,
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
        "settings": {"confidence": 0.95},
        "seeds": {"dpo": [0, 1, 2]},
        "versions": {"python": "3.11"},
        "revision": "abc",
        "command": "python -m benchmarks.proof",
        "date": "2026-01-01",
        "wall_s": 5000,
    }


def test_tables_hold_what_was_measured() -> None:
    text = render.markdown(result())
    assert "| errors | interval below 0 | -0.500 [-0.600, -0.400] | yes |" in text
    assert "| recall | interval below 0 | not measured | **no** |" in text
    assert "Holds 1 of 2." in text
    assert "| **critic** | 0.200 [0.150, 0.250] |" in text
    assert text.count("**yes**") == 1  # the chosen setting
    assert "1.000 [0.207, 1.000] 1/1" in text
    assert "83 min 20 s" in text


def test_every_table_row_has_as_many_cells_as_its_head() -> None:
    blocks = [block for block in render.markdown(result()).split("\n\n") if block.startswith("|")]
    assert len(blocks) == 8
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_the_same_result_gives_the_same_picture(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        picture.draw(copy.deepcopy(result()), {"base": "before"}, tmp_path / name)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    assert b"<dc:date>" not in first


COMMITTED = ROOT / "docs" / "proof.json"


@pytest.mark.skipif(not COMMITTED.exists(), reason="no proof is committed")
def test_the_committed_proof_is_whole() -> None:
    proof = json.loads(COMMITTED.read_text(encoding="utf-8"))
    for critic in (proof["critic"], proof["critic_image_first"]):
        assert all(len(critic[k]) == 2 for k in ("accuracy", "equal_length", "longer_better"))
        assert all(0 <= critic[k] <= 1 for k in ("consistent", "unparseable"))
    assert set(proof["pope"]) == set(POPE_KINDS)
    assert {"base", *(arm.name for arm in arms_of(DEMO))} == set(proof["arms"])
    for arm in proof["arms"].values():
        for name in ("chair_s", "chair_i", "recall", "errors", "objects"):
            assert arm[name]["low"] <= arm[name]["value"] <= arm[name]["high"]
    assert proof["differences"].keys() == proof["arms"].keys() - {"critic"}
    assert {"value", "low", "high"} == proof["share_of_oracle"].keys()
    assert all({"what", "must", "measured", "holds"} <= line.keys() for line in proof["gate"])
    assert {"settings", "seeds", "scenes", "versions", "date"} <= proof.keys()
    assert (ROOT / "docs" / "proof.md").read_text(encoding="utf-8") == render.markdown(proof)

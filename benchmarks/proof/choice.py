"""The choice of a setting, on the validation world: the test world is not looked at.

The rule: the lowest errors a caption among the settings whose recall is not more than 0.01 below the base's; where
there is none, the setting with the highest recall; of equal ones the first. One seed each.
"""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.proof.preferences import derive, pairs_of
from benchmarks.proof.runs import Task, Workers, make_world, marker
from benchmarks.proof.settings import (
    CHOICE_SEED,
    CRITIC,
    FIGURES,
    HELD_OUT_SEED,
    Setting,
    Sizes,
    changed,
    grid,
)
from sima_ray.config import RunConfig
from sima_ray.demo.world import World
from sima_ray.ports import JsonDict
from sima_ray.runtime.evaluation import error_counter

RECALL_MAY_FALL = 0.01
RULE = (
    "the lowest errors a caption among the settings whose recall is not more than "
    f"{RECALL_MAY_FALL:g} below the base's; where there is none, the highest recall; "
    "of equal settings the first of the grid"
)


def run_choice(work: Path, config: RunConfig, sizes: Sizes, workers: Workers) -> JsonDict:
    """Train and evaluate every setting of the grid from one run's preferences, and choose."""
    settings = grid(sizes.prompts)
    prompts = max(setting.prompts for setting in settings)
    config = on_worlds(
        config,
        make_world(work, "train", prompts, CHOICE_SEED),
        make_world(work, "validation", sizes.scenes, HELD_OUT_SEED),
    )
    source = Task(changed(config, name="choice-source"), ("evaluate", "preferences"))
    workers.run([source])
    assert config.evaluation is not None
    count = error_counter(config.evaluation.error_counter)
    assert count is not None, "the config names an error counter"
    tasks = {}
    for setting in settings:
        arm = changed(
            config,
            name=f"choice-{setting.name}",
            training=setting.training(),
            data={"limit": setting.prompts if setting.prompts < prompts else None},
        )
        tasks[setting] = Task(arm, ("pipeline",))
        derive(source.folder, arm, CRITIC, count)
    workers.run(list(tasks.values()))
    return _figures(source, tasks)


def on_worlds(config: RunConfig, train: World, held_out: World, pope: bool = False) -> RunConfig:
    """A config that trains on the prompts of one world and is evaluated on another."""
    return changed(
        config,
        data={"prompts": str(train.prompts), "images": str(train.images), "limit": None},
        evaluation={
            "prompts": str(held_out.prompts),
            "images": str(held_out.images),
            "instances": str(held_out.instances),
            "captions": str(held_out.captions),
            "limit": None,
            "pope": [str(path) for path in held_out.pope.values()] if pope else [],
        },
    )


def _figures(source: Task, tasks: Mapping[Setting, Task]) -> JsonDict:
    base = _captions(source.folder, 0)
    tried = [
        {
            **_values(setting),
            "pairs": pairs_of(task.folder),
            **_captions(task.folder, 1),
        }
        for setting, task in tasks.items()
    ]
    chosen = list(tasks)[choose(base, tried)]
    return {"rule": RULE, "base": base, "settings": tried, "chosen": _values(chosen)}


def choose(base: JsonDict, tried: list[JsonDict]) -> int:
    """The number of the setting that the rule takes."""
    least = base["recall"]["value"] - RECALL_MAY_FALL
    allowed = [k for k, figures in enumerate(tried) if figures["recall"]["value"] >= least]
    if not allowed:
        return max(range(len(tried)), key=lambda k: tried[k]["recall"]["value"])
    return min(allowed, key=lambda k: tried[k]["errors"]["value"])


def _captions(run: Path, number: int) -> JsonDict:
    found = marker(run, f"round-{number}-evaluate")
    return {name: found[name] for name in FIGURES}


def _values(setting: Setting) -> JsonDict:
    return {"prompts": setting.prompts, **setting.training()}

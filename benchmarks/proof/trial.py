"""The test: the chosen setting on the test world, over seeds, with the critic's preferences and with others."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.proof.choice import on_worlds
from benchmarks.proof.figures import aligned, compared
from benchmarks.proof.intervals import wilson
from benchmarks.proof.preferences import derive, judged_rows, pairs_of
from benchmarks.proof.runs import Task, Workers, make_world, marker, seconds
from benchmarks.proof.settings import (
    BASE,
    CRITIC,
    FIGURES,
    HELD_OUT_SEED,
    POPE_KINDS,
    ROUNDS,
    TEST_SEED,
    Arm,
    Setting,
    Sizes,
    changed,
    other_layout,
)
from sima_ray.config import EvaluationConfig, RunConfig
from sima_ray.ports import JsonDict
from sima_ray.runtime.evaluation import captions_from_jsonl, error_counter

Runs = Mapping[str, Sequence[Path]]
"""The run folders of each arm, one a seed."""


def run_test(
    work: Path,
    config: RunConfig,
    sizes: Sizes,
    setting: Setting,
    arms: Sequence[Arm],
    workers: Workers,
) -> JsonDict:
    """Train every arm at every seed from the same candidates, and compare them on the test world."""
    config = changed(config, training=setting.training())
    train = make_world(work, "train", setting.prompts, TEST_SEED)
    held_out = make_world(work, "test", sizes.scenes, HELD_OUT_SEED)
    asked = on_worlds(config, train, held_out, pope=True)
    config = on_worlds(config, train, held_out)
    source = Task(changed(asked, name="test-source"), ("evaluate", "preferences"))
    other = _other_source(config)
    with_other = any(arm.other_layout for arm in arms)
    workers.run([source, other] if with_other else [source])
    tasks = _arm_tasks(config, asked, source, other, arms, sizes.seeds)
    workers.run([task for some in tasks.values() for task in some])
    runs = {name: [task.folder for task in some] for name, some in tasks.items()}
    assert config.evaluation is not None
    found = _figures(source.folder, runs, config.evaluation)
    found["arms"][BASE] |= {"label": "before", "about": "the policy before training"}
    for arm in arms:
        found["arms"][arm.name] |= {"label": arm.label, "about": arm.about}
    if with_other:
        found["same_candidates"] = _same_candidates(source.folder, other.folder)
    return found


def _other_source(config: RunConfig) -> Task:
    """The same prompts judged in the layout that the config does not have."""
    layout = other_layout(config)
    name = f"test-source-{layout}"
    return Task(changed(config, name=name, critic={"layout": layout}), ("preferences",))


def _arm_tasks(
    config: RunConfig, asked: RunConfig, source: Task, other: Task, arms: Sequence[Arm], seeds: int
) -> dict[str, list[Task]]:
    """Every arm's runs, their folders made; the critic's first one, the longest, comes first."""
    assert config.evaluation is not None
    count = error_counter(config.evaluation.error_counter)
    assert count is not None, "the config names an error counter"
    tasks: dict[str, list[Task]] = {arm.name: [] for arm in arms}
    for seed in range(seeds):
        for arm in arms:
            goes_on = arm == CRITIC and seed == 0
            run = changed(
                asked if goes_on else config,
                name=f"test-{arm.name}-{seed}",
                seed=seed,
                rounds=ROUNDS if goes_on else 1,
                pairs=arm.pairs,
                critic={"layout": (other if arm.other_layout else source).config.critic.layout},
            )
            tasks[arm.name].append(Task(run, ("pipeline",)))
            preferences = _with_base(source, other) if arm.other_layout else source.folder
            derive(preferences, run, arm, count)
    return tasks


def _with_base(source: Task, other: Task) -> Path:
    """The other layout's run, given the evaluation of the base, which no layout changes."""
    for name in ("stages/round-0-evaluate.json", "round-0/captions.jsonl"):
        file = other.folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes((source.folder / name).read_bytes())
    return other.folder


def _same_candidates(source: Path, other: Path) -> JsonDict:
    """Rows whose candidates are the same in both layouts' runs: sampling repeats, up to rounding."""
    texts = [
        {
            row["row_id"]: [candidate["text"] for candidate in row["candidates"]]
            for row in judged_rows(run / "round-1" / "preferences")
        }
        for run in (source, other)
    ]
    both = texts[0].keys() & texts[1].keys()
    return {"same": sum(texts[0][k] == texts[1][k] for k in both), "of": len(both)}


def _figures(source: Path, runs: Runs, settings: EvaluationConfig) -> JsonDict:
    files = {BASE: [source / "round-0"]}
    files |= {name: [run / "round-1" for run in some] for name, some in runs.items()}
    found = compared(
        aligned(
            {
                name: [captions_from_jsonl((run / "captions.jsonl").read_text()) for run in some]
                for name, some in files.items()
            }
        ),
        settings,
    )
    for name, arm in found["arms"].items():
        arm["pairs"] = [pairs_of(run) for run in runs.get(name, ())]
    critic, confidence = runs[CRITIC.name][0], settings.confidence
    pope = _pope(source, 0, confidence)
    return {
        **found,
        "rounds": _rounds(critic, confidence),
        "pope": {kind: pope[kind]["value"] for kind in POPE_KINDS},
        "pope_intervals": pope,
        "round_seconds": _round_seconds(source, critic),
    }


def _rounds(critic: Path, confidence: float) -> list[JsonDict]:
    """The critic's first seed round by round; its intervals are those of its own evaluations."""
    return [
        {
            "round": number,
            **{name: result[name] for name in FIGURES},
            "pope": _pope(critic, number, confidence),
            "pairs": marker(critic, f"round-{number}-preferences")["ledger"]["pairs"],
        }
        for number in range(1, ROUNDS + 1)
        for result in [marker(critic, f"round-{number}-evaluate")]
    ]


def _pope(run: Path, number: int, confidence: float) -> JsonDict:
    """Accuracy by kind with Wilson's interval, after that many rounds."""
    rows = [
        json.loads(line)
        for line in (run / f"round-{number}" / "evaluation" / "pope.jsonl").read_text().splitlines()
    ]
    return {
        kind: wilson(sum(right), len(right), confidence)
        for kind in POPE_KINDS
        for right in [
            [
                r["said"] == r["label"]
                for r in rows
                if r["failure"] is None and r["row_id"].startswith(f"pope_{kind}/")
            ]
        ]
    }


def _round_seconds(source: Path, critic: Path) -> dict[str, float]:
    """Seconds of the stages that a run of one round consists of."""
    stages = {"round-0-evaluate": source, "round-1-preferences": source}
    stages |= dict.fromkeys(("round-1-train", "round-1-merge", "round-1-evaluate"), critic)
    return {key: seconds(run, key) for key, run in stages.items()}


def provenance(work: Path) -> JsonDict:
    """What made the source run of the test: versions, revision, time."""
    return json.loads((work / "test-source" / "provenance.json").read_text(encoding="utf-8"))

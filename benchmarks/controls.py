"""Is it the critic? The demo's round again, with the same candidates and other preferences.

`python -m benchmarks.controls [--run RUN] [--json FILE]` takes a finished run and repeats its training, merge and
evaluation, by the very pipeline, on pairs chosen without a critic: at random, always the shorter response, always
the greedy one. Every arm is trained on the rows whose two candidates differ. The figures are paired by image.
"""

import argparse
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sima_ray.config import RunConfig
from sima_ray.data.sinks import PAIR_SCHEMA
from sima_ray.metrics.summary import compare
from sima_ray.runtime import cluster, submission
from sima_ray.runtime.evaluation import captions_from_jsonl, columns
from sima_ray.runtime.progress import Screen
from sima_ray.runtime.summary import FIGURES

Row = dict[str, Any]
Choose = Callable[[Row], int | None]

RULES: dict[str, Choose] = {
    "random": lambda row: random.Random(row["row_id"]).randrange(2),
    "shorter": lambda row: _shorter(*(len(c["text"].split()) for c in row["candidates"])),
    "greedy": lambda row: 0,
}
"""What each control prefers: the number of a candidate, or None for no preference."""


def main(arguments: list[str] | None = None) -> None:
    """Run every control, print the table, and write the figures where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.controls", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if not (options.run / "summary.json").exists():
        raise SystemExit(f"{options.run} is no finished run: `make demo` makes one")
    config = RunConfig.load(options.run / "run.yaml")
    arms = {"critic": options.run}
    running = cluster.start(cpus=4)
    try:
        target = submission.Target.of(running)
        for name, choose in RULES.items():
            print(f"— {name}", flush=True)
            arms[name] = _run_arm(config, options.run, name, choose, target)
    finally:
        cluster.stop(running)
    figures = _figures(config, arms)
    _print(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _run_arm(
    config: RunConfig, run: Path, name: str, choose: Choose, target: submission.Target
) -> Path:
    """A copy of the run up to its pairs, the pairs chosen anew, and the pipeline from there on."""
    folder = run.parent / f"{run.name}-{name}"
    changed = config.model_copy(update={"name": folder.name})
    if not folder.exists():
        for part in ("round-0", "round-1/preferences"):
            shutil.copytree(run / part, folder / part)
        for part in ("provenance.json", "prompts.parquet", "round-1/ledger.json"):
            shutil.copy(run / part, folder / part)
        (folder / "stages").mkdir()
        for key in ("prepare", "round-0-evaluate", "round-1-preferences"):
            shutil.copy(run / "stages" / f"{key}.json", folder / "stages")
        (folder / "run.yaml").write_text(changed.dump(), encoding="utf-8")
        rows = pq.read_table(run / "round-1" / "preferences").to_pylist()
        pairs = [pair for row in rows if row["critiques"] and (pair := _pair(row, choose(row)))]
        table = pa.Table.from_pylist(sorted(pairs, key=lambda p: p["row_id"]), PAIR_SCHEMA)
        pq.write_table(table, folder / "round-1" / "pairs.parquet")
    submission.follow(submission.submit("pipeline", changed, target), target, Screen().line)
    return folder


def _pair(row: Row, chosen: int | None) -> Row | None:
    if chosen is None:
        return None
    best, other = row["candidates"][chosen], row["candidates"][1 - chosen]
    return {
        "row_id": row["row_id"],
        "image": row["image"],
        "prompt": row["text"],
        "chosen": best["text"],
        "rejected": other["text"],
        "chosen_from": best["kind"],
        "rejected_from": other["kind"],
        "weight": 1.0,
    }


def _shorter(first: int, second: int) -> int | None:
    return None if first == second else int(second < first)


def _figures(config: RunConfig, arms: dict[str, Path]) -> dict[str, Any]:
    """Each arm's figures with intervals, and each control's difference from the critic's."""
    settings = config.evaluation
    assert settings is not None
    figures: dict[str, Any] = {"arms": {}, "differences": {}}
    captions = {
        name: captions_from_jsonl((folder / "round-1" / "captions.jsonl").read_text())
        for name, folder in arms.items()
    }
    for name, folder in arms.items():
        summary = json.loads((folder / "summary.json").read_text())
        figures["arms"].setdefault("base", {k: summary["before"][k] for k in FIGURES})
        figures["arms"][name] = {k: summary["after"][k] for k in FIGURES}
        figures["arms"][name]["pairs"] = summary_pairs(folder)
        if name != "critic":
            difference = compare(
                columns(captions["critic"]),
                columns(captions[name]),
                samples=settings.bootstrap_samples,
                confidence=settings.confidence,
                seed=config.seed,
            )
            figures["differences"][name] = {k: v.to_json() for k, v in difference.items()}
    return figures


def summary_pairs(folder: Path) -> int:
    """Pairs that an arm was trained on."""
    return pq.read_metadata(folder / "round-1" / "pairs.parquet").num_rows


def _print(figures: dict[str, Any]) -> None:
    print(f"{'':<10}" + "".join(f"{name:>10}" for name in FIGURES))
    for name, arm in figures["arms"].items():
        print(f"{name:<10}" + "".join(f"{arm[key]['value']:>10.3f}" for key in FIGURES))
    print("minus critic, 95 % interval (paired)")
    for name, difference in figures["differences"].items():
        for key in ("recall", "errors"):
            d = difference[key]
            print(f"{name:<10}{key:<8}{d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]")


if __name__ == "__main__":
    main()

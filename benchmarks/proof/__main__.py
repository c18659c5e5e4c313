"""`make proof` = `python -m benchmarks.proof`: choice, critic and test; then JSON, tables and picture."""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import proof
from benchmarks.proof import render
from benchmarks.proof.settings import (
    CHOICE_SEED,
    CRITIC,
    HELD_OUT_SEED,
    TEST_SEED,
    Arm,
    Setting,
    Sizes,
    arms_of,
    changed,
    grid,
    other_layout,
)
from sima_ray.config import RunConfig
from sima_ray.errors import ConfigError, SimaError
from sima_ray.ports import JsonDict
from sima_ray.runtime.progress import duration

STEPS = ("choice", "critic", "test")


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; the outputs are written once all three steps have run."""
    options = _parser().parse_args(arguments)
    # Ended as by Ctrl-C, so that the clusters are ended too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        config, arms = _config(options), _arms(options)
        wall_s, made_with = _steps(options, config, arms)
    except SimaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    found = {step: file for step in STEPS if (file := options.work / f"{step}.json").exists()}
    if missing := [step for step in STEPS if step not in found]:
        print(f"nothing written yet: {', '.join(missing)} still to run")
        return 0
    results = {step: json.loads(file.read_text(encoding="utf-8")) for step, file in found.items()}
    sizes = [result.pop("sizes") for result in results.values()]
    if any(other != sizes[0] for other in sizes):
        print(f"nothing written: the steps are of different sizes: {sizes}", file=sys.stderr)
        return 2
    whole = _assemble(results, config, options, wall_s, made_with)
    _write(whole, {arm.name: arm.label for arm in arms}, options.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof", description=proof.__doc__)
    sizes = Sizes()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--work", type=Path, default=Path("runs/proof"), help="the runs' folder")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    parser.add_argument("--only", choices=STEPS, help="one step; the test needs the choice")
    parser.add_argument(
        "--arms", help="of the test, separated by commas; the critic's is always in"
    )
    parser.add_argument("--scenes", type=int, default=sizes.scenes, help="of each held-out world")
    parser.add_argument("--prompts", type=int, default=sizes.prompts, help="at most, for training")
    parser.add_argument("--seeds", type=int, default=sizes.seeds, help="of each arm of the test")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    return parser


def _config(options: argparse.Namespace) -> RunConfig:
    config = RunConfig.load(options.config)
    if config.evaluation is None or config.evaluation.error_counter is None:
        raise ConfigError(f"{options.config}: needs evaluation.error_counter, the judge")
    # Any free port: several clusters run side by side.
    return changed(config, runs=str(options.work), policy={"service": {"port": 0}})


def _arms(options: argparse.Namespace) -> list[Arm]:
    known = {arm.name: arm for arm in arms_of(RunConfig.load(options.config))}
    wanted = options.arms.split(",") if options.arms else list(known)
    if unknown := sorted(set(wanted) - known.keys()):
        raise ConfigError(f"--arms: no arm {unknown[0]}; there are {', '.join(known)}")
    return [arm for name, arm in known.items() if name in (*wanted, CRITIC.name)]


def _steps(
    options: argparse.Namespace, config: RunConfig, arms: Sequence[Arm]
) -> tuple[float, dict[str, str]]:
    """Run the steps, keep the result of each, and return the wall seconds and what the runs were made with."""
    # Only now: `--help` must not wait for ray.
    from benchmarks.proof.choice import run_choice
    from benchmarks.proof.critic import run_critic
    from benchmarks.proof.runs import Journal, Workers
    from benchmarks.proof.trial import run_test

    work, sizes = options.work, Sizes(options.scenes, options.prompts, options.seeds)
    journal = Journal(work, config)
    with Workers(options.parallel, work / "logs", journal.tick) as workers:
        for step in STEPS if options.only is None else (options.only,):
            print(f"— {step}", flush=True)
            match step:
                case "choice":
                    result = run_choice(work, config, sizes, workers)
                    print(f"chosen: {result['chosen']}")
                case "critic":
                    result = run_critic(work, config, sizes, workers)
                case _:
                    setting = _chosen(work, sizes)
                    result = run_test(work, config, sizes, setting, arms, workers)
            kept = json.dumps({"sizes": asdict(sizes), **result}, indent=2)
            (work / f"{step}.json").write_text(kept + "\n", encoding="utf-8")
            journal.tick()
    print(f"wall time    {duration(journal.wall_s)}, earlier commands included")
    return journal.wall_s, journal.made_with


def _chosen(work: Path, sizes: Sizes) -> Setting:
    file = work / "choice.json"
    if not file.exists():
        raise ConfigError(f"{file}: no choice yet: run without --only, or with --only choice")
    chosen = Setting(**json.loads(file.read_text(encoding="utf-8"))["chosen"])
    if chosen not in grid(sizes.prompts):
        raise ConfigError(f"{file}: made with another number of prompts: run the choice again")
    return chosen


def _assemble(
    results: dict[str, JsonDict],
    config: RunConfig,
    options: argparse.Namespace,
    wall_s: float,
    made_with: dict[str, str],
) -> JsonDict:
    """The steps' results as one value, with the gate and with what they were made with."""
    from benchmarks.proof.figures import gate
    from benchmarks.proof.trial import provenance

    choice, critic, test = (results[step] for step in STEPS)
    sizes = Sizes(options.scenes, options.prompts, options.seeds)
    made, settings = provenance(options.work), config.model_dump(mode="json")
    layout = config.critic.layout
    assert config.evaluation is not None
    return {
        "gate": gate(critic[layout], test["pope"], test),
        "critic": critic[layout],
        f"critic_{other_layout(config)}": critic[other_layout(config)],
        **test,
        "choice": choice,
        "settings": {
            "layout": layout,
            "training": settings["training"] | {k: choice["chosen"][k] for k in _TRAINED},
            "generation": settings["generation"],
            "bootstrap_samples": config.evaluation.bootstrap_samples,
            "confidence": config.evaluation.confidence,
        },
        "seeds": {
            "dpo": list(range(sizes.seeds)),
            "worlds": {"choice": CHOICE_SEED, "test": TEST_SEED, "held_out": HELD_OUT_SEED},
        },
        "scenes": {
            "validation": sizes.scenes,
            "test": sizes.scenes,
            "critic": sizes.critic_scenes,
            "prompts": choice["chosen"]["prompts"],
        },
        "made_with": made_with,
        "versions": {"python": made["python"], **made["versions"]},
        "revision": made["revision"],
        "command": _command(options),
        "date": datetime.now(UTC).date().isoformat(),
        "wall_s": round(wall_s),
    }


_TRAINED = ("learning_rate", "epochs")


def _command(options: argparse.Namespace) -> str:
    """The command line that makes the same again: the options that change what comes out."""
    parser = _parser()
    changed = [
        f"--{key} {value}"
        for key in ("config", "arms", "scenes", "prompts", "seeds")
        if (value := getattr(options, key)) != parser.get_default(key)
    ]
    return " ".join(["python -m benchmarks.proof", *changed])


def _write(whole: JsonDict, labels: dict[str, Any], output: Path) -> None:
    from benchmarks.proof.picture import draw

    output.mkdir(parents=True, exist_ok=True)
    (output / "proof.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    (output / "proof.md").write_text(render.markdown(whole), encoding="utf-8")
    draw(whole, {"base": "before", **labels}, output / "proof.svg")
    print(f"\n{render.gate_table(whole['gate'])}\n\n{render.holds(whole['gate'])}")


if __name__ == "__main__":
    sys.exit(main())

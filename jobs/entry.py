"""What all jobs share: read the config, open the run, run the stage, end with a clear line and an exit code."""

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from sima_ray.config import RunConfig
from sima_ray.errors import SimaError

if TYPE_CHECKING:
    from sima_ray.runtime.run import Run


def main(
    stage: str,
    summary: str,
    body: "Callable[..., object]",
    next_round: "Callable[..., int] | None" = None,
    **options: str,
) -> None:
    """Run one stage of a run and exit with its status.

    Args:
        stage: The name of the job, also of the stage's marker in the run folder.
        summary: What `--help` says.
        body: The stage, called with the run and the round, and with `options` by name.
        next_round: The round where none is given, called with the run and with `options` by name; default:
            the first that has not this stage yet.
        options: Further options of the command line, with their defaults.
    """
    parser = argparse.ArgumentParser(prog=f"python -m jobs.{stage}", description=summary)
    parser.add_argument("config", help="run config (YAML)")
    parser.add_argument("--round", type=int, help="default: the first that has not this stage yet")
    for name, default in options.items():
        parser.add_argument(f"--{name}", default=default)
    arguments = parser.parse_args()

    def work() -> None:
        config = RunConfig.load(arguments.config)
        connect()  # only now: reading a config must not wait for ray

        from sima_ray.runtime.attempt import recorded
        from sima_ray.runtime.run import Run
        from sima_ray.runtime.submission import STAGES

        run = Run.open(config)
        given = {name: getattr(arguments, name) for name in options}
        number = arguments.round
        if number is None:
            number = next_round(run, **given) if next_round else _next_round(run, stage)
        # Serving writes nothing to the run: it is not what was interrupted when a run is taken up again.
        kept = nullcontext()
        if stage in STAGES:
            changed = [(name, value) for name, value in given.items() if value != options[name]]
            words = [word for name, value in changed for word in (f"--{name}", value)]
            kept = recorded(run.folder, stage, number, words)
        with kept:
            body(run, number, **given)

    ended_clearly(work)


def connect() -> None:
    """Connect to the cluster that runs this job."""
    import ray

    ray.init(address="auto")


def ended_clearly(work: Callable[[], None]) -> None:
    """Do a job's work; an error that is the user's ends it with one line and the error's exit code."""
    try:
        work()
    except Exception as error:
        cause = getattr(error, "cause", error)  # Ray wraps what a remote task raised
        if not isinstance(cause, SimaError):
            raise
        from sima_ray.runtime.progress import Progress

        Progress().say(f"error: {cause}")
        sys.exit(cause.exit_code)


def _next_round(run: "Run", stage: str) -> int:
    rounds = range(1, run.config.rounds + 1)
    return next((k for k in rounds if run.done(f"round-{k}-{stage}") is None), run.config.rounds)

"""Job: new weights for a live policy, checked on every replica before they answer."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.entry import connect, ended_clearly
from sima_ray.config import RunConfig
from sima_ray.errors import ModelError

if TYPE_CHECKING:
    from sima_ray.runtime.progress import Progress


def main() -> None:
    """Parse, promote, and say what happened."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.promote", description="Put other weights on a live policy, in place."
    )
    parser.add_argument(
        "folder", help="policy folder, or a run's adapter, on a volume that all nodes mount"
    )
    parser.add_argument("--app", default="policy", help="the policy's application")
    parser.add_argument("--version", required=True, help="name of the weights in every answer")
    arguments = parser.parse_args()
    ended_clearly(lambda: _promote(arguments))


def _promote(arguments: argparse.Namespace) -> None:
    connect()
    from sima_ray.runtime.progress import Progress
    from sima_ray.runtime.promotion import promote

    progress = Progress()
    folder = arguments.folder
    if (Path(folder) / "adapter_config.json").exists():
        folder = _merged(Path(folder), progress)
    with progress.stage("promote") as stage:
        done = promote(folder, arguments.version, arguments.app)
        stage.result(
            f"{arguments.app}: {done.before} → {arguments.version} on {done.replicas} replicas "
            f"in {done.seconds:.1f} s"
        )
    against = "written when they were merged" if done.written else "made now from the folder"
    if done.replicas:
        progress.say(f"{'checked':<12} {done.difference:.1e} a token from the sample {against}")
    else:
        progress.say(f"{'checked':<12} not yet: no replica runs; the next one checks as it starts")


def _merged(adapter: Path, progress: "Progress") -> str:
    """The policy of a run's adapter, RUN/round-K/train/adapter: merged now, with the run's own check, or before.

    Raises:
        ModelError: An adapter of no run: neither base nor pairs to check it on are known.
    """
    from sima_ray.runtime.run import Run
    from sima_ray.runtime.stages import merge_adapter

    run_folder, round_name = adapter.parents[2], adapter.parents[1].name
    if not (run_folder / "run.yaml").exists() or not re.fullmatch(r"round-[1-9]\d*", round_name):
        raise ModelError(
            f"{adapter}: only an adapter in RUN/round-K/train/adapter can be merged here"
        )
    config = RunConfig.load(run_folder / "run.yaml")
    if Path(config.runs, config.name).resolve() != run_folder.resolve():
        raise ModelError(
            f"{adapter}: its run belongs at {Path(config.runs, config.name)}: promote its policy folder"
        )
    run = Run.open(config, progress)
    number = int(round_name.removeprefix("round-"))
    merge_adapter(run, number)
    return run.policy(number)


if __name__ == "__main__":
    main()

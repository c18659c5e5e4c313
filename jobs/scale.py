"""Job: between how many replicas a live policy has."""

import argparse

from jobs.entry import connect, ended_clearly


def main() -> None:
    """Parse, change, and wait where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.scale", description="Set the number of replicas of a live policy."
    )
    parser.add_argument("--app", default="policy", help="the policy's application")
    parser.add_argument("--min", type=int, help="default: as it is")
    parser.add_argument("--max", type=int, help="default: as it is")
    parser.add_argument("--wait", type=float, help="seconds to wait until the replicas run")
    arguments = parser.parse_args()
    ended_clearly(lambda: _scale(arguments))


def _scale(arguments: argparse.Namespace) -> None:
    connect()
    from sima_ray.runtime.progress import Progress
    from sima_ray.runtime.scaling import scale_policy, wait_for_replicas

    progress = Progress()
    before, after = scale_policy(arguments.app, arguments.min, arguments.max)
    progress.say(f"{'scale':<12} {arguments.app}: {before} → {after} replicas")
    if arguments.wait is not None:
        with progress.stage("replicas") as stage:
            running = wait_for_replicas(arguments.app, after, arguments.wait)
            stage.result(f"{running} running")


if __name__ == "__main__":
    main()

"""Job: new weights for a live policy, checked on every replica before they answer."""

import argparse

from jobs.entry import connect, ended_clearly


def main() -> None:
    """Parse, promote, and say what happened."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.promote", description="Put other weights on a live policy, in place."
    )
    parser.add_argument("folder", help="policy folder, on a volume that all nodes mount")
    parser.add_argument("--app", default="policy", help="the policy's application")
    parser.add_argument("--version", required=True, help="name of the weights in every answer")
    arguments = parser.parse_args()
    ended_clearly(lambda: _promote(arguments))


def _promote(arguments: argparse.Namespace) -> None:
    connect()
    from sima_ray.runtime.progress import Progress
    from sima_ray.runtime.promotion import promote

    progress = Progress()
    with progress.stage("promote") as stage:
        done = promote(arguments.folder, arguments.version, arguments.app)
        stage.result(
            f"{arguments.app}: {done.before} → {arguments.version} on {done.replicas} replicas "
            f"in {done.seconds:.1f} s"
        )
    against = "written when they were merged" if done.written else "made now from the folder"
    if done.replicas:
        progress.say(f"{'checked':<12} {done.difference:.1e} a token from the sample {against}")
    else:
        progress.say(f"{'checked':<12} not yet: no replica runs; the next one checks as it starts")


if __name__ == "__main__":
    main()

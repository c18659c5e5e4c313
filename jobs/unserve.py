"""Job: take down what `sima serve` left up, a policy and its critic."""

import argparse

from jobs.entry import connect, ended_clearly


def main() -> None:
    """Parse, remove, and say what was removed."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.unserve", description="Remove a live policy and its critic."
    )
    parser.add_argument("--app", default="policy", help="the policy's application")
    arguments = parser.parse_args()
    ended_clearly(lambda: _unserve(arguments.app))


def _unserve(app: str) -> None:
    connect()
    from sima_ray.runtime.progress import Progress
    from sima_ray.runtime.serving import unserve

    with Progress().stage("unserve") as stage:
        stage.result(f"removed {' and '.join(unserve(app))}")


if __name__ == "__main__":
    main()

"""Job: the whole loop, all rounds: evaluate, prefer, train, merge, swap, evaluate, report."""

from typing import TYPE_CHECKING

from jobs.entry import main

if TYPE_CHECKING:
    from sima_ray.runtime.run import Run


def body(run: "Run", number: int) -> None:
    """Run every stage that has not finished yet."""
    from sima_ray.runtime import stages

    stages.pipeline(run)


if __name__ == "__main__":
    main("pipeline", "Run the whole loop; running it again goes on where it stopped.", body)

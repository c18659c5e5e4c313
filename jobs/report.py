"""Job: the summary of a run from what its stages left."""

from typing import TYPE_CHECKING

from jobs.entry import main

if TYPE_CHECKING:
    from sima_ray.runtime.run import Run


def body(run: "Run", number: int) -> None:
    """Write summary.json and report.html."""
    from sima_ray.runtime import stages

    stages.report(run)


if __name__ == "__main__":
    main("report", "Summarise a run.", body)

"""Job: merge one round's adapter into the weights, with a parity check."""

from typing import TYPE_CHECKING

from jobs.entry import main

if TYPE_CHECKING:
    from sima_ray.runtime.run import Run


def body(run: "Run", number: int) -> None:
    """Merge the adapter that the round's train job left."""
    from sima_ray.runtime import stages

    stages.merge_adapter(run, number)


if __name__ == "__main__":
    main("merge", "Merge one round's adapter; refuse to publish unless parity holds.", body)

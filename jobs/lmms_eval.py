"""Job: the LLaVA benchmarks by lmms-eval against the served policy, before and after, into one table."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.entry import main

if TYPE_CHECKING:
    from sima_ray.runtime.run import Run


def body(run: "Run", number: int, settings: str) -> None:
    """Evaluate the rounds that the settings name, one after the other."""
    from sima_ray.runtime.lmms_eval import LmmsEval, run_lmms_eval

    run_lmms_eval(run, LmmsEval.model_validate(json.loads(Path(settings).read_text("utf-8"))))


if __name__ == "__main__":
    main(
        "lmms_eval",
        "Evaluate the policies of several rounds by lmms-eval.",
        body,
        settings="lmms-eval.json",
    )

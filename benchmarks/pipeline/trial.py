"""One run of one contender in a process of its own: `python -m benchmarks.pipeline.trial NAME FOLDER [SETTING]`.

Prints one line of JSON as its last, from the contender's `measure`.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.pipeline.work import Work
from sima_ray.ports import JsonDict

CONTENDERS = ("ours", "raw", "single")


@dataclass(frozen=True, slots=True)
class Trial:
    """What one run took.

    Attributes:
        contender: Which.
        rows: Done.
        seconds: For them.
        tokens: Generated.
        more: The contender's own figures.
    """

    contender: str
    rows: int
    seconds: float
    tokens: int
    more: JsonDict = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds


def run(contender: str, work: Work, setting: JsonDict) -> Trial:
    """Run a contender in this process."""
    if contender == "ours":
        from benchmarks.pipeline.by_ours import measure
    elif contender == "raw":
        from benchmarks.pipeline.by_raw import measure
    else:
        from benchmarks.pipeline.by_single import measure
    return measure(work, setting)


if __name__ == "__main__":
    given = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    trial = run(sys.argv[1], Work.read(Path(sys.argv[2])), given)
    print("\n" + json.dumps(asdict(trial)), flush=True)

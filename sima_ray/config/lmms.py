"""What `sima lmms-eval` asks of its job, and which of lmms-eval's tasks are the paper's."""

import re
from typing import Annotated

from pydantic import Field, StringConstraints

from sima_ray.config.base import Folder, Section

PAPER_TASKS = (
    "llava_in_the_wild",
    "scienceqa_img",
    "textvqa_val",
    "mme",
    "mmbench_en_dev_static",
    "mmvet",
    "seedbench",
    "vizwiz_vqa_val",
)
"""The paper's nine columns; `mme` gives two. MMBench by its rules alone: lmms-eval's other variant asks a
judge about what the rules cannot read, and draws lots where there is no judge."""

JUDGED_TASKS = ("llava_in_the_wild", "mmvet")
"""Those of them whose answers a judge scores."""

PRESETS = {
    "paper": PAPER_TASKS,
    "unjudged": tuple(task for task in PAPER_TASKS if task not in JUDGED_TASKS),
}

MOST_TOKENS = 1024

Task = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(=.*)?$")]


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds what nobody is to see."""
    return re.search(r"KEY|TOKEN|SECRET|PASSWORD", name, re.IGNORECASE) is not None


class LmmsEval(Section):
    """Which policies are evaluated on which tasks, and how."""

    tasks: list[Task] = Field(min_length=1, description="As lmms-eval calls them.")
    rounds: list[int] = Field(
        default_factory=list,
        description="The first is what others are held against; none: 0 and the last that is merged.",
    )
    limit: int | None = Field(default=None, ge=1, description="Questions of each task.")
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="No task may ask for more; None: 1024, or half of policy.engine.max_model_len.",
    )
    include_path: Folder | None = Field(default=None, description="Folder of further tasks.")
    python: Folder | None = Field(default=None, description="Of an environment with lmms-eval.")
    variables: list[Variable] = Field(default_factory=list, description="NAME, or NAME=VALUE.")
    requirements: str = Field(
        default="", description="What the job's own environment has; not used with `python`."
    )
    samples: int = Field(default=2000, ge=100, description="Bootstrap resamples.")
    confidence: float = Field(default=0.95, gt=0.5, lt=1)

"""One worker of a few tuning runs without Ray, in a process of its own: `python tuning_worker.py PLAN.json`.

The plan: {"rank", "world", "meeting", "jobs"}. A job: {"job": TuningJob's fields, "load": folder or null,
"save": {step: folder}, "adapter": folder, "out": file}, and for a run that is to fail "spoil": an image that
rank 0 removes before step "spoil_at". Each rank writes its metrics, or what it stopped with, to `out` with its
number added. "partition_all": see `_partition_all`; for the last jobs of a plan.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"


def main(plan: dict[str, Any]) -> None:
    """Run all jobs of a plan, one after another, in one process group."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{plan['meeting']}", rank=plan["rank"], world_size=plan["world"]
    )
    for job in plan["jobs"]:
        lines = _run(job, plan["rank"], plan["world"])
        Path(f"{job['out']}.{plan['rank']}").write_text(json.dumps(lines))
    dist.barrier()
    dist.destroy_process_group()


def _run(job: dict[str, Any], rank: int, world: int) -> list[dict[str, Any]]:
    from sima_ray.config import TrainingConfig
    from sima_ray.errors import TrainingError
    from sima_ray.tuning.tuner import Tuner, TuningJob

    if job.get("partition_all"):
        _partition_all()
    fields = job["job"]
    config = TrainingConfig.model_validate(fields["config"])
    lines: list[dict[str, Any]] = []
    try:
        tuner = Tuner(TuningJob(**fields | {"config": config}), rank, world)
        start = tuner.load(Path(job["load"])) if job["load"] else 0
        for step in range(start, tuner.steps):
            if rank == 0 and step == job.get("spoil_at"):
                Path(job["spoil"]).unlink()
            lines.append(tuner.step(step).as_dict() | tuner.evaluate(step))
            if folder := job["save"].get(str(step + 1)):
                tuner.save(Path(folder), step + 1)
        tuner.write_adapter(Path(job["adapter"]))
    except TrainingError as error:
        lines.append({"error": str(error)})
    return lines


def _partition_all() -> None:
    """From now on let ZeRO 3 part even tensors that are so small that it would leave them whole."""
    from sima_ray.tuning import engine

    plain = engine.deepspeed_config

    def parted(*arguments: Any) -> dict[str, Any]:
        settings = plain(*arguments)
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return settings

    engine.deepspeed_config = parted


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

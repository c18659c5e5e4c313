"""One worker of a few tuning runs without Ray, in a process of its own: `python tuning_worker.py PLAN.json`.

The plan: {"rank", "world", "meeting", "jobs"}. A job: {"job": TuningJob's fields, "load": folder or null,
"save": {step: folder}, "adapter": folder, "out": file}, and for a run that is to fail "spoil": an image that
rank 0 removes before step "spoil_at". Each rank writes its metrics, or what it stopped with, to `out` with its
number added. "as_if_large": see `_as_if_large`; for the last jobs of a plan. "uneven": see `_uneven`.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
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

    if job.get("as_if_large"):
        _as_if_large()
    fields = job["job"]
    config = TrainingConfig.model_validate(fields["config"])
    lines: list[dict[str, Any]] = []
    held = _Held() if job.get("as_if_large") else None
    try:
        with _uneven(rank) if job.get("uneven") else nullcontext():
            tuner = Tuner(TuningJob(**fields | {"config": config}), rank, world)
        if config.reference == "generated":
            lines.append({"references": tuner.references})
        if job.get("uneven"):
            lines.append({"set_aside": sorted(aside.row_id for aside in tuner.set_aside)})
        if held:
            lines.append({"held": held.read()})
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


def _as_if_large() -> None:
    """From now on let ZeRO 3 treat a tiny model as one that fits nowhere, and score few tokens at a time.

    It would leave small tensors whole, and gather far ahead.
    """
    from sima_ray.tuning import engine, shared

    plain = engine.deepspeed_config

    def parted(*arguments: Any) -> dict[str, Any]:
        settings = plain(*arguments)
        settings["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        }
        return settings

    engine.deepspeed_config = parted
    shared.MOST_LOGITS = 3 * 320


class _Held:
    """What this process holds of a model's weights as its engine starts, and while its modules compute."""

    def __init__(self) -> None:
        from torch.nn.modules.module import register_module_forward_pre_hook

        from sima_ray.tuning import tuner

        self._scorer: Any = None
        self._frozen, self._rest, self._most = 0, 0, 0
        self._hook = register_module_forward_pre_hook(self._look)
        plain = tuner.start_engine

        def start(scorer: Any, *arguments: Any) -> Any:
            frozen = [p for p in scorer.parameters() if not p.requires_grad]
            self._frozen = sum(_elements(p) for p in frozen) / sum(p.ds_numel for p in frozen)
            return plain(scorer, *arguments)

        tuner.start_engine = start

    def _look(self, module: Any, _: Any) -> None:
        from sima_ray.tuning.forward import PairScorer

        starts = isinstance(module, PairScorer)
        self._scorer = module if starts else self._scorer
        if self._scorer is None:
            return
        elements = sum(map(_elements, self._scorer.parameters()))
        self._most = max(self._most, elements)
        if starts:
            self._rest = max(self._rest, elements)

    def read(self) -> dict[str, float]:
        """Elements: of the whole model, of its largest weight, held between passes at most, and at any time; the
        share that is held of the frozen ones as the engine starts."""
        self._hook.remove()
        sizes = sorted(p.ds_numel for p in self._scorer.parameters())
        return {
            "frozen": self._frozen,
            "whole": sum(sizes),
            "largest": sizes[-1],
            "rest": self._rest,
            "most": self._most,
        }


def _elements(weight: Any) -> int:
    """That this process holds."""
    return weight.numel() + weight.ds_tensor.numel()


@contextmanager
def _uneven(rank: int) -> Iterator[None]:
    """Let rank 1 encode nothing, and rank 0 one pair whose prompt lacks a token of its image."""
    from sima_ray.tuning.dataset import PairEncoder, SetAside, UnusablePair

    encode = PairEncoder.encode

    def spoilt(self: Any, pair: Any) -> Any:
        if rank == 1:
            raise UnusablePair(pair.row_id, SetAside.MISSING_IMAGE, "not on this node")
        encoded = encode(self, pair)
        if pair.row_id != "r004":
            return encoded
        return replace(encoded, prompt_P=encoded.prompt_P[encoded.prompt_P != 3])

    PairEncoder.encode = spoilt
    try:
        yield
    finally:
        PairEncoder.encode = encode


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

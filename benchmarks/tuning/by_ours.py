"""Ours: the product's `Tuner`, step by step, as a worker without Ray runs it."""

import os
import tempfile
from pathlib import Path

from benchmarks.tuning.shapes import Work
from benchmarks.tuning.trial import Clock


def train(work: Work, clock: Clock) -> None:
    """Tune for all epochs.

    The tuner computes the references as it is made, between loading and starting. To measure them alone the very
    same pass is run once more.
    """
    import torch.distributed as dist

    from sima_ray.policy.checkpoint import load_processor
    from sima_ray.tuning.dataset import PairEncoder, read_pairs
    from sima_ray.tuning.reference import ReferenceFile, reference_pass
    from sima_ray.tuning.shared import shared
    from sima_ray.tuning.tuner import Tuner, TuningJob

    if work.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    config = work.training()
    with tempfile.TemporaryDirectory() as kept:
        dist.init_process_group(
            "nccl" if work.device == "cuda" else "gloo",
            init_method=f"file://{kept}/meeting",
            rank=0,
            world_size=1,
        )
        references = str(Path(kept, "references.parquet"))
        job = TuningJob(work.model, work.pairs, work.images, references, config, work.seed)
        tuner = Tuner(job)
        assert tuner.forward_note is None, tuner.forward_note
        clock.ready(tuner.model)
        encoder = PairEncoder(load_processor(work.model), work.images, config.max_tokens)
        pairs = read_pairs(work.pairs)
        with clock.lap("reference"):
            reference_pass(
                tuner.model,
                shared,
                encoder,
                pairs,
                ReferenceFile(str(Path(kept, "again.parquet")), ""),
                batch_size=config.micro_batch_size,
            )
        steps = tuner.steps // work.epochs
        for epoch in range(work.epochs):
            with clock.lap("epoch"):
                for step in range(epoch * steps, (epoch + 1) * steps):
                    tuner.step(step)
        dist.destroy_process_group()

"""Preference tuning on Ray Train: workers around the plain training step of `sima_ray.tuning`.

The output folder holds

    adapter/            the PEFT adapter
    metrics.jsonl       one line a step; the last of an epoch has the held-out pairs' metrics too (`eval_…`)
    tensorboard/        the same for TensorBoard, where the folder is a local one
    reference.parquet   reference log-probabilities, and the pairs set aside
    set_aside.jsonl     these pairs, with their reasons
    progress.json       where a running job is
    train.json          settings, status and counts
    checkpoints/        Ray Train's, while the run lasts
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow.fs

from sima_ray.config import TrainingConfig
from sima_ray.data.locations import open_location
from sima_ray.errors import SimaError, TrainingError, one_line
from sima_ray.policy.checkpoint import check_policy, fingerprint
from sima_ray.runtime.run import RunFolder
from sima_ray.runtime.training_log import (
    TrainingLog,
    TrainProgress,
    Watch,
    read_state,
    update_state,
)

_LOG = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
_SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of checkpoints, in that folder."""
_NOT_IDENTITY = {
    "micro_batch_size",
    "tokens_per_micro_batch",
    "workers",
    "accelerator",
    "cpus_per_worker",
    "zero_stage",
    "offload",
    "gradient_checkpointing",
    "checkpoint_every",
    "max_failures",
    "chosen_fall_warning",
}
"""Settings that say how a run is computed, not what it computes: they may change when it is taken up again."""


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a finished run left.

    Attributes:
        adapter: Path or URI of the PEFT folder.
        steps: Optimizer steps.
        pairs: Pairs trained on.
        held_out: Pairs evaluated on, and not trained on.
        set_aside: Pairs left out, by reason.
        warnings: What a person should look at.
        metrics: Of the last step.
        seconds: Wall time, of all calls together that led to the end.
    """

    adapter: str
    steps: int
    pairs: int
    held_out: int
    set_aside: dict[str, int]
    warnings: list[str]
    metrics: dict[str, Any]
    seconds: float


def run_training(
    *,
    model: str,
    pairs: str,
    images: str,
    output: str,
    config: TrainingConfig,
    seed: int,
    on_progress: Callable[[TrainProgress], None] | None = None,
) -> TrainingResult:
    """Tune a policy on preference pairs, on the connected Ray cluster.

    The same call again resumes from the last checkpoint, or returns at once where the run is done.

    Args:
        model: Policy folder, on a path that all nodes see.
        pairs: Parquet file or folder of pairs.
        images: What image names are relative to, as `data.images` of a run.
        output: Folder or URI for all that the run leaves; all nodes must reach it.
        config: The settings.
        seed: Of adapters, order and dropout.
        on_progress: Told from a thread of this process about twice a second, when something has changed.

    Raises:
        ModelError, DataError: The policy or the pairs cannot be used.
        TrainingError: Other settings than the ones that `output` was begun with; a loss that is not finite; a
            worker that failed more often than the config allows.
    """
    started = time.monotonic()
    check_policy(model)
    folder = RunFolder(_absolute(output))
    settings = {
        "model": model,
        "model_fingerprint": fingerprint(model),
        "pairs": pairs,
        "images": images,
        "seed": seed,
        "training": config.model_dump(mode="json"),
    }
    state = _take_up(folder, settings)
    if state["status"] != "done":
        spent = state.get("seconds", 0.0)
        update_state(folder, state | {"status": "started"})
        _forget_damaged(folder)
        with Watch(folder, on_progress):
            try:
                _fit(folder, settings)
            finally:
                seconds = round(spent + time.monotonic() - started, 2)
                state = update_state(folder, {"seconds": seconds})
    _remove(folder.path(CHECKPOINTS))  # also what a driver left that was killed after the end
    # A driver that was killed after the end left no seconds, an older version none of the others.
    state = dict[str, Any](seconds=0.0, held_out=0, warnings=[]) | state
    names = [field.name for field in fields(TrainingResult) if field.name != "adapter"]
    return TrainingResult(adapter=folder.path("adapter"), **{name: state[name] for name in names})


def _take_up(folder: RunFolder, settings: dict[str, Any]) -> dict[str, Any]:
    """The state that the folder holds; a fresh one where it holds none.

    Raises:
        TrainingError: It belongs to a run with other settings.
    """
    state = read_state(folder)
    if not state:
        return {"status": "started", "settings": settings}
    old, new = _identity(state["settings"]), _identity(settings)
    if changed := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
        raise TrainingError(
            f"{folder.root}: holds a run with other settings ({', '.join(changed)}): "
            "give another output folder, or remove this one"
        )
    return state | {"settings": settings}


def _identity(settings: dict[str, Any]) -> dict[str, Any]:
    # A setting that is younger than the run has its default in it.
    full = TrainingConfig.model_validate(settings["training"]).model_dump(mode="json")
    training = {f"training.{k}": v for k, v in full.items() if k not in _NOT_IDENTITY}
    return {k: v for k, v in settings.items() if k != "training"} | training


def _forget_damaged(folder: RunFolder) -> None:
    """Begin anew where the list of checkpoints is cut short, which would end every further call.

    Ray Train writes the list in place: who is killed in that moment leaves part of it, or nothing.
    """
    if not folder.exists(CHECKPOINTS, _SNAPSHOT):
        return
    try:
        whole = "checkpoint_results" in folder.read_json(CHECKPOINTS, _SNAPSHOT)
    except (TypeError, ValueError):
        whole = False
    if not whole:
        path = folder.path(CHECKPOINTS)
        _LOG.warning("%s: the list of checkpoints is damaged: training begins anew", path)
        _remove(path)


def _fit(folder: RunFolder, settings: dict[str, Any]) -> None:
    """Run the workers until the state is "done"."""
    # A controller that looks twice a second: a checkpoint waits for it.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    config = TrainingConfig.model_validate(settings["training"])
    gpu = config.accelerator == "gpu"
    if not gpu:
        # A process less to start; CPU nodes that are taken back are seen as failures.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    threads = str(max(1, int(config.cpus_per_worker)))
    environment = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    if not gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    resources = {"CPU": config.cpus_per_worker} | ({"GPU": 1} if gpu else {})
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"output": folder.root, "settings": settings},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers, use_gpu=gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS,
            storage_path=folder.root,
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            worker_runtime_env={"env_vars": environment},
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:  # pyright: ignore[reportAttributeAccessIssue]
        raise _plain(error) from error
    state = read_state(folder)
    if state["status"] == "failed":
        raise TrainingError(state["error"])
    assert state["status"] == "done", state["status"]


def _plain(error: Exception) -> SimaError:
    """A failure in a user's words: the first worker's own error where it is one of ours."""
    failures = getattr(error, "worker_failures", {})
    for rank, failure in sorted(failures.items()):
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, SimaError):
            return cause
        return TrainingError(
            f"training worker {rank} failed: {type(cause).__name__}: {one_line(cause)}"
        )
    return TrainingError(f"training failed: {one_line(error)}")


def _worker(arguments: dict[str, Any]) -> None:
    """The loop of one worker, as Ray Train calls it."""
    import ray.train

    from sima_ray.tuning.tuner import Tuner, TuningJob

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    folder, settings = RunFolder(arguments["output"]), arguments["settings"]
    config = TrainingConfig.model_validate(settings["training"])
    job = TuningJob(
        model=settings["model"],
        pairs=settings["pairs"],
        images=settings["images"],
        references=folder.path("reference.parquet"),
        config=config,
        seed=settings["seed"],
    )
    log = TrainingLog(folder, active=rank == 0, nats=config.chosen_fall_warning)
    try:
        tuner = Tuner(job, rank, world, on_reference=log.reference)
        if tuner.reference_note:
            log.warn(f"all references were computed: {tuner.reference_note}")
        _steps(tuner, config, log)
    except TrainingError as error:
        # Raised on all workers alike, and trying again would end the same: told, not raised.
        log.failed(str(error))
        return
    with tempfile.TemporaryDirectory() as local:
        tuner.write_adapter(Path(local))
        if rank == 0:
            _upload(Path(local), folder.path("adapter"))
    log.finished(tuner)


def _steps(tuner: Any, config: TrainingConfig, log: TrainingLog) -> None:
    """All steps from the last checkpoint on, with a checkpoint every so often."""
    import ray.train

    start = 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as local:
            start = tuner.load(Path(local))
    log.begin(start, tuner.steps, tuner.work)
    for step in range(start, tuner.steps):
        metrics = tuner.step(step).as_dict() | tuner.evaluate(step)
        log.step(metrics)
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < tuner.steps:
            with tempfile.TemporaryDirectory() as local:
                tuner.save(Path(local), step + 1)
                log.flush()
                # Rank 0 holds the whole state; the others report alike, and nothing.
                whole = ray.train.Checkpoint.from_directory(local) if log.active else None
                ray.train.report(metrics, checkpoint=whole)


def _absolute(location: str) -> str:
    return location if "://" in location else os.path.abspath(location)


def _upload(local: Path, destination: str) -> None:
    """Copy a local folder, in place of what was there."""
    _remove(destination)
    filesystem, path = open_location(destination)
    filesystem.create_dir(path, recursive=True)
    pyarrow.fs.copy_files(str(local), path, pyarrow.fs.LocalFileSystem(), filesystem)


def _remove(folder: str) -> None:
    filesystem, path = open_location(folder)
    if filesystem.get_file_info(path).type is pyarrow.fs.FileType.Directory:
        filesystem.delete_dir(path)

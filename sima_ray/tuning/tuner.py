"""A tuning run on one worker: all made ready, then steps that are a function of (seed, step) and the weights.

Knows nothing of how workers are started: rank and world are arguments, `torch.distributed` is up already.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from sima_ray.config import TrainingConfig
from sima_ray.errors import TrainingError
from sima_ray.policy.checkpoint import context_length, fingerprint, load_policy, stored_dtype
from sima_ray.records import PreferencePair
from sima_ray.tuning.attention import attention_of
from sima_ray.tuning.batches import Ahead, Pairs, Read
from sima_ray.tuning.checkpoints import load_state, save_state, write_adapter
from sima_ray.tuning.choice import choose_forward
from sima_ray.tuning.dataset import EncodedPair, PairEncoder, UnusablePair, read_pairs
from sima_ray.tuning.engine import device_of, gather_lists, start_engine
from sima_ray.tuning.forward import PairForward, PairScorer, base_of, check_model, concatenated
from sima_ray.tuning.generated import Believed, believe
from sima_ray.tuning.heldout import evaluate
from sima_ray.tuning.lockstep import LockstepScores, of_rank_0
from sima_ray.tuning.lora import add_lora
from sima_ray.tuning.reference import (
    Reference,
    ReferenceFile,
    Scores,
    each_alone,
    reference_pass,
    set_aside,
    usable,
)
from sima_ray.tuning.schedule import Schedule, deal, hold_out, micro_batches, share
from sima_ray.tuning.sharding import gather_throughout, shard
from sima_ray.tuning.step import StepMetrics, learning_rate, train_step

_FORWARDS_A_STEP = 3
"""What forward and backward of a pair cost, in forward passes."""


@dataclass(frozen=True, slots=True)
class TuningJob:
    """What is tuned on what.

    Attributes:
        model: Policy folder.
        pairs: Parquet file or folder.
        images: What image names are relative to, as `data.images` of a run.
        references: Path or URI of the file that keeps the reference log-probabilities.
        config: The settings.
        seed: Of the adapters' first weights, the order and dropout.
    """

    model: str
    pairs: str
    images: str
    references: str
    config: TrainingConfig
    seed: int


class Tuner:
    """One worker of a tuning run.

    Attributes:
        model: The policy with its adapters.
        pairs: What is trained on.
        held_out: What is evaluated on, and not trained on.
        set_aside: What is not, and why.
        attention: transformers' name of what the language model computes attention with.
        forward_note: Why the rows of a pair do not share their prompt, which is slower; None where they do.
        reference_note: Why all references were computed though the generated ones were asked for; else None.
        references: How many usable pairs have a "computed" reference, and how many a "generated" one.
    """

    def __init__(
        self,
        job: TuningJob,
        rank: int = 0,
        world: int = 1,
        *,
        forward: PairForward | None = None,
        on_reference: Callable[[int, int], None] | None = None,
    ) -> None:
        """Load the policy, add adapters, start the engine, score all pairs with the reference.

        Args:
            job: What is tuned on what.
            rank, world: This worker, and how many there are.
            forward: How pairs are scored; None to choose what suits the model.
            on_reference: Told how many pairs the reference pass has done, of how many.

        Raises:
            ModelError: A policy that cannot be loaded or is not supported.
            DataError: Pairs that cannot be read.
            TrainingError: Not one usable pair.
        """
        self._job, self._rank, self._world = job, rank, world
        config = job.config
        pairs = read_pairs(job.pairs)
        self.model, processor = _load(job, rank, world)
        base = base_of(self.model)
        self._encoder = PairEncoder(processor, job.images, config.max_tokens, context_length(base))
        self._scorer = PairScorer(self.model, forward or concatenated)
        self._engine = start_engine(self._scorer, config, world)
        self._engine.eval()
        scores: Scores = each_alone
        if _is_sharded(config):
            gather_throughout(self._scorer)
            scores = LockstepScores(self._scorer, gather_lists)
        self.forward_note = None if forward else self._choose(pairs)
        self.attention = attention_of(base)
        believed = self._believed(pairs, scores)
        self.reference_note = believed.note
        self._references = reference_pass(
            self.model,
            self._scorer.score,
            self._encoder,
            pairs,
            ReferenceFile(job.references, _reference_key(job, pairs)),
            batch_size=config.micro_batch_size,
            budget=config.tokens_per_micro_batch,
            rank=rank,
            world=world,
            gather=gather_lists,
            on_progress=on_reference,
            given=believed.given,
            scores=scores,
        )
        self.set_aside: list[Reference] = set_aside(pairs, self._references)
        good = usable(pairs, self._references)
        self.references = _count(self._references[pair.row_id] for pair in good)
        self.pairs, self.held_out = hold_out(good, config.holdout, job.seed)
        if not good:
            raise TrainingError(
                f"{job.pairs}: all {len(pairs)} pairs were set aside; the first: "
                f"{self.set_aside[0].row_id}: {self.set_aside[0].detail}"
            )
        if not self.pairs:
            raise TrainingError(f"{job.pairs}: all {len(good)} pairs are held out: lower holdout")
        self._pairs = Pairs(self.pairs, self._references, self._encoder)
        self._held = Pairs(self.held_out, self._references, self._encoder)
        self._schedule = Schedule(
            len(self.pairs),
            config.batch_size,
            config.epochs,
            job.seed,
            window=config.length_window,
            lengths=self._pairs.widths,
        )
        self._ahead = Ahead(self._read)
        self._engine.train()

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self._schedule.steps

    def work(self, step: int) -> int:
        """What the steps before `step` cost, evaluations included, in forward passes over a pair."""
        epochs, steps = divmod(step, self._schedule.steps_per_epoch)
        pairs = epochs * len(self.pairs) + steps * self._job.config.batch_size
        return _FORWARDS_A_STEP * pairs + epochs * len(self.held_out)

    def step(self, step: int) -> StepMetrics:
        """Take one step, counted from 0.

        Raises:
            TrainingError: A loss that is not finite; names the pairs.
        """
        config, started = self._job.config, time.perf_counter()
        read = self._ahead(step, self.steps)
        rows = self._schedule.batch(step)
        return train_step(
            self._engine,
            read.agreed(),
            step=step + 1,
            epoch=round((step + 1) / self._schedule.steps_per_epoch, 4),
            beta=config.beta,
            loss=config.loss,
            rate=learning_rate(step, self.steps, config.learning_rate, config.warmup_ratio),
            total_weight=self._pairs.weight(rows) or 1.0,
            world=self._world,
            seeds=[self._seed(step, number) for number in range(len(read.micro_batches))],
            started=started,
        )

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics of the held-out pairs (`eval_loss`, …) after a step that ends an epoch; none after another.

        Every worker must call this.

        Raises:
            TrainingError: A pair that has changed since the run began.
        """
        if not self.held_out or not self._schedule.ends_epoch(step):
            return {}
        config, widths = self._job.config, self._held.widths
        rows = sorted(range(len(widths)), key=widths.__getitem__)
        micros = self._micro_batches(rows, widths)
        # Dealt as they are, and not halved for more workers: they are the same, to the digit, on any number.
        own = deal(micros, self._rank, self._world)
        batches = ((micro, self._held.read([micro]).agreed()[0]) for micro in own)
        return evaluate(self._engine, batches, beta=config.beta, loss=config.loss)

    def save(self, folder: Path, step: int) -> None:
        """Save a checkpoint, by rank 0; `step` is the next to take. Every worker must call this."""
        save_state(self._engine, self.model, folder, {"step": step}, self._rank)

    def load(self, folder: Path) -> int:
        """Take up a checkpoint, of any number of workers and ZeRO stage, and return the next step to take.

        Raises:
            TrainingError: No checkpoint there, or one of other parameters.
        """
        return int(load_state(self._engine, self.model, folder)["step"])

    def write_adapter(self, folder: Path) -> None:
        """Write the adapter as a PEFT folder, on rank 0; every worker must call this."""
        write_adapter(self._engine, self.model, folder, self._rank)

    def _choose(self, pairs: list[PreferencePair]) -> str | None:
        """Let pairs be scored as suits the model; why not with shared rows, where that is so."""
        choice = choose_forward(
            self.model,
            of_rank_0(self._encoded(pairs), self._rank, gather_lists),
            self._job.config.max_tokens,
            run=self._scorer,
            gather=gather_lists,
        )
        self._scorer.way = choice.forward
        # What a trial that failed had gathered.
        self._engine.empty_partition_cache()
        return choice.reason

    def _believed(self, pairs: list[PreferencePair], scores: Scores) -> Believed:
        """The references that need not be computed."""
        config = self._job.config
        if config.reference == "computed":
            return Believed()
        return believe(
            self.model,
            self._scorer.score,
            self._encoder,
            pairs,
            seed=self._job.seed,
            beta=config.beta,
            batch_size=config.micro_batch_size,
            rank=self._rank,
            world=self._world,
            gather=gather_lists,
            scores=scores,
        )

    def _encoded(self, pairs: list[PreferencePair]) -> Iterator[EncodedPair]:
        """The pairs that can be encoded, one after another."""
        for pair in pairs:
            with suppress(UnusablePair):
                yield self._encoder.encode(pair)

    def _read(self, step: int) -> Read:
        """This worker's share of a step."""
        rows, widths = self._schedule.batch(step), self._pairs.widths
        micros = share(self._micro_batches(rows, widths), widths, self._rank, self._world)
        return self._pairs.read(micros)

    def _micro_batches(self, rows: Sequence[int], widths: Sequence[int]) -> list[list[int]]:
        config = self._job.config
        size, budget = config.micro_batch_size, config.tokens_per_micro_batch
        return micro_batches(rows, widths, size=size, budget=budget)

    def _seed(self, step: int, number: int) -> int:
        """Of a micro batch's dropout: of its place in the run alone, so that a resumed run draws the same."""
        return hash((self._job.seed, step, number, self._rank)) & 0x7FFFFFFF


def _is_sharded(config: TrainingConfig) -> bool:
    """Whether no worker holds the weights whole."""
    return config.zero_stage == 3


def _load(job: TuningJob, rank: int, world: int) -> tuple[PeftModel, Any]:
    """The policy with adapters, on this worker's device or as its share of it; and the processor."""
    config, sharded = job.config, _is_sharded(job.config)
    dtype = stored_dtype(job.model) if sharded else config.dtype
    model, processor = load_policy(job.model, dtype, attention_for(config))
    check_model(model)
    if sharded:
        shard(model, config, rank, world)
    tuned = add_lora(model, config.lora, job.seed, train_projector=config.train_projector)
    tuned.to(device_of(config))  # pyright: ignore[reportArgumentType]
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return tuned, processor


def attention_for(config: TrainingConfig) -> str:
    """The attention to compute with: on a CPU in bfloat16 the fused one's backward pass is the slower one."""
    slow = config.accelerator == "cpu" and config.dtype == "bfloat16"
    return "eager" if slow else "sdpa"


def _count(references: Iterable[Reference]) -> dict[str, int]:
    found = Counter("generated" if r.generated else "computed" for r in references)
    return {"computed": found["computed"], "generated": found["generated"]}


def _reference_key(job: TuningJob, pairs: list[PreferencePair]) -> str:
    """Names all that the reference log-probabilities depend on."""
    columns = ["row_id", "image", "prompt", "chosen", "rejected"]
    if job.config.reference == "generated":
        columns += ["chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens"]
    rows = [[getattr(pair, column) for column in columns] for pair in pairs]
    parts = {
        "reference": job.config.reference,
        "model": fingerprint(job.model),
        "dtype": job.config.dtype,
        "max_tokens": job.config.max_tokens,
        "pairs": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16],
    }
    return json.dumps(parts, sort_keys=True)

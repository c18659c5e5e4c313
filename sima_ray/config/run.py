"""A whole run, and what its stages do."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from sima_ray.config.base import Folder, Location, Section
from sima_ray.config.evaluation import EvaluationConfig
from sima_ray.config.hardware import HardwareConfig
from sima_ray.config.overrides import apply_overrides, read_settings
from sima_ray.config.serving import PolicyConfig
from sima_ray.config.training import TrainingConfig
from sima_ray.errors import ConfigError


class DataConfig(Section):
    """What a run begins with, prompts or given pairs, and how bad input is told from good."""

    prompts: Location | None = Field(
        default=None, description="JSON lines: image, text, ground_truth, optional id."
    )
    pairs: Location | None = Field(
        default=None,
        description="In place of prompts: preference pairs to train on, as `sima data pairs` makes them "
        "of other data sets, or a run's pairs.parquet.",
    )
    images: Location = Field(
        description="What image names are relative to: a folder, a .zip, an uncompressed .tar, or a folder "
        "of such; a path or a URI."
    )
    limit: int | None = Field(
        default=None, ge=1, description="Use only the first N prompts or pairs."
    )
    max_image_pixels: int = Field(
        default=50_000_000, ge=1, description="Larger images are set aside, by their header."
    )
    max_text_chars: int = Field(
        default=20_000, ge=1, description="Longer questions or answers are set aside."
    )
    prompts_after_first: Literal["all", "unsettled"] = Field(
        default="all",
        description="unsettled: a later round asks only what the round before gave no consistent "
        "verdict on, or one that evaluation.error_counter counts against.",
    )

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if self.prompts is None and self.pairs is None:
            raise ValueError("give prompts, or pairs in their place: one of the two is required")
        if self.prompts is not None and self.pairs is not None:
            raise ValueError(
                "both prompts and pairs are given: for a run on pairs write `prompts: null` where a config that "
                "is extended has them"
            )
        return self


class GenerationConfig(Section):
    """How the two candidates of a prompt are made: one greedy, one sampled."""

    temperature: float = Field(default=0.8, gt=0, le=2, description="Of the sampled candidate.")
    top_p: float = Field(default=0.9, gt=0, le=1)
    max_tokens: int = Field(default=1024, ge=1)
    concurrency: int = Field(
        default=64,
        ge=1,
        description="Rows that one Data worker keeps in flight, of as many batches as it takes: each is one "
        "call of the policy, which brings its engine two requests. An evaluation keeps as many questions in "
        "flight as all of them together, a request each.",
    )
    workers: int = Field(default=1, ge=1, description="Data workers of this stage.")
    batch_size: int = Field(
        default=128, ge=1, description="Rows that a Data worker takes at a time."
    )
    retries: int = Field(default=5, ge=0, description="Tries again after a failure that may pass.")
    timeout_s: float = Field(default=600.0, gt=0, description="Of one call, queueing included.")

    @property
    def open_batches(self) -> int:
        """Batches that a Data worker has open at once: as many as hold the rows in flight, and the next, whose
        rows take the places that one batch's last rows leave.
        """
        return math.ceil(self.concurrency / self.batch_size) + 1

    @property
    def in_flight(self) -> int:
        """Rows of all Data workers, or questions of an evaluation, that are in flight at once."""
        return self.workers * self.concurrency


class CriticConfig(Section):
    """How the policy judges its own candidates."""

    policy: Literal["current", "base"] = Field(
        default="current",
        description="Whose weights judge in a run: those that answered, or in every round those "
        "that the run began with.",
    )
    layout: Literal["image_first", "examples_first"] = "image_first"
    examples: Location | None = Field(
        default=None, description="YAML of worked examples; None: the shipped ones."
    )
    max_tokens: int = Field(
        default=512, ge=8, description="Of the reason and the verdict together."
    )


class PairsConfig(Section):
    """Which verdicts become training pairs."""

    length_policy: Literal["none", "balance"] = Field(
        default="none",
        description="balance: keep as many pairs with a shorter chosen as with a longer one, "
        "so that brevity alone is not taught.",
    )
    max_length_ratio: float | None = Field(
        default=None,
        gt=1,
        description="Leave out pairs whose longer side is over this many times the shorter.",
    )
    inconsistent_weight: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Weight, beside the 1 of other pairs, of one whose two orders disagree. 0 "
        "drops it, as a tie; above, one of its two verdicts is believed, by lot.",
    )
    earlier_rounds: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of each earlier round's pairs that is trained on again, drawn anew for "
        "each round.",
    )


class EarlyStoppingConfig(Section):
    """When rounds end before `rounds` of them, by the figures of `evaluation`; the best one is kept."""

    monitor: Literal["chair_s", "chair_i", "errors"] = Field(
        default="chair_s", description="The figure that must fall from round to round."
    )
    min_delta: float = Field(
        default=0.0, ge=0, description="A smaller fall below the best round's is no gain."
    )
    patience: int = Field(
        default=1, ge=1, description="Rounds in a row without a gain that end the run."
    )
    max_recall_drop: float = Field(
        default=0.02,
        ge=0,
        le=1,
        description="A recall so far below the base model's ends the run at once.",
    )
    max_length_drift: float = Field(
        default=0.25,
        ge=0,
        description="So does a mean caption that is longer or shorter than the base model's by more "
        "than this share.",
    )


class MergeConfig(Section):
    """The check that merged weights compute what base + adapter compute."""

    parity_rows: int = Field(default=8, ge=1)
    tolerance: float = Field(
        default=0.05, gt=0, description="Largest allowed mean |Δ log-prob| at response positions."
    )


class RunConfig(Section):
    """A whole run: what `sima submit pipeline CONFIG` takes."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    runs: Folder = Field(
        default="runs", validate_default=True, description="Where run folders are made."
    )
    seed: int = 0
    rounds: int = Field(default=1, ge=1, le=20)
    data: DataConfig
    policy: PolicyConfig
    generation: GenerationConfig = GenerationConfig()
    critic: CriticConfig = CriticConfig()
    pairs: PairsConfig = PairsConfig()
    training: TrainingConfig = TrainingConfig()
    merge: MergeConfig = MergeConfig()
    evaluation: EvaluationConfig | None = None
    early_stopping: EarlyStoppingConfig | None = None
    hardware: HardwareConfig = HardwareConfig()

    @model_validator(mode="after")
    def _given(self) -> Self:
        if self.data.pairs is None:
            return self
        if self.rounds > 1:
            raise ValueError("rounds: with data.pairs there is one; later ones need data.prompts")
        if self.pairs.inconsistent_weight:
            raise ValueError("pairs.inconsistent_weight: given pairs (data.pairs) have no verdicts")
        return self

    @model_validator(mode="after")
    def _measured(self) -> Self:
        if self.early_stopping is None:
            return self
        if self.evaluation is None:
            raise ValueError("early_stopping needs an evaluation section")
        if "chair" not in self.evaluation.suites_of_rounds:
            raise ValueError("early_stopping needs CHAIR in every round: evaluation.instances, …")
        if self.early_stopping.monitor == "errors" and self.evaluation.error_counter is None:
            raise ValueError("early_stopping.monitor: errors needs evaluation.error_counter")
        return self

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, and those that it extends.

        Args:
            path: The file.
            overrides: `KEY=VALUE` settings that count instead of the file's (see `apply_overrides`).

        Raises:
            ConfigError: Unreadable, not YAML, an unknown key, or a value that does not fit; names
                each.
        """
        values = apply_overrides(read_settings(path), overrides, cls)
        origin = " ".join([str(path), *(f"--set {override}" for override in overrides)])
        return cls.parse(values, origin=origin)

    @classmethod
    def parse(cls, values: dict[str, Any], origin: str = "config") -> Self:
        """Check settings that were read already; `origin` stands in error messages.

        Raises:
            ConfigError: An unknown key or a value that does not fit; names each.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'config'}: {_plain(e)}" for e in error.errors()
            )
            raise ConfigError(f"{origin}: {problems}") from error

    def dump(self) -> str:
        """The resolved config as YAML; loading it again gives an equal config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _plain(error: Any) -> str:
    """One validation problem in a user's words."""
    match error["type"]:
        case "extra_forbidden":
            return "unknown key"
        case "missing":
            return "is required"
        case _:
            return str(error["msg"]).removeprefix("Value error, ")

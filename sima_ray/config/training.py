"""Preference tuning."""

from typing import Literal, Self

from pydantic import Field, model_validator

from sima_ray.config.base import Section


class LoraSettings(Section):
    """The adapter. The defaults are the paper's."""

    r: int = Field(default=128, ge=1)
    alpha: int = Field(default=256, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="Linear layers of the language model, by the end of their names.",
    )


class LossSettings(Section):
    """What a pair costs. The defaults are DPO's; `sima_ray.loss` has the formulas."""

    kind: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Share of the preferences that are taken as wrong."
    )
    length_normalised: bool = Field(
        default=False,
        description="Log-probabilities per response token, of policy and reference alike. Rewards "
        "are then smaller by the length: take a larger beta.",
    )
    sft_weight: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Weight of the chosen response's negative log-likelihood per token, added to "
        "the loss: holds its probability up.",
    )


class TrainingConfig(Section):
    """DPO with LoRA on Ray Train and DeepSpeed. The defaults are the paper's for 7B."""

    beta: float = Field(default=0.1, gt=0, description="DPO's inverse temperature.")
    loss: LossSettings = LossSettings()
    learning_rate: float = Field(default=1e-7, gt=0)
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=8, ge=1, description="Pairs a step, over all workers.")
    micro_batch_size: int = Field(default=1, ge=1, description="Pairs a forward pass, per worker.")
    tokens_per_micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="Padded tokens that a forward pass may have, two rows a pair: as many pairs of "
        "like length as fit, in place of micro_batch_size.",
    )
    length_window: int = Field(
        default=1,
        ge=1,
        description="Steps whose pairs are sorted by length together, so that a step's are alike; "
        "their order is drawn. 1 sorts nothing.",
    )
    holdout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the pairs that are not trained on; they are evaluated each epoch.",
    )
    max_tokens: int = Field(
        default=2048, ge=32, description="Longer pairs are set aside and counted."
    )
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    reference: Literal["computed", "generated"] = Field(
        default="computed",
        description="Log-probabilities of the untuned policy. generated: the service's own, for the same dtype as "
        "policy.engine.dtype; a sample is computed too, and all are where it differs.",
    )
    lora: LoraSettings = LoraSettings()
    train_projector: bool = Field(
        default=False,
        description="Train the layers between vision tower and language model too, whole.",
    )
    workers: int = Field(default=1, ge=1)
    accelerator: Literal["cpu", "gpu"] = "gpu"
    cpus_per_worker: float = Field(default=1.0, gt=0)
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=2,
        description="DeepSpeed's: what the workers share. At 3 the policy too, which is gathered in each pass.",
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        default="none",
        description="What is kept in the CPU's memory between uses: the optimizer's state (zero_stage 1 "
        "and up), or the parameters too (zero_stage 3).",
    )
    gradient_checkpointing: bool = False
    checkpoint_every: int = Field(default=50, ge=1, description="Steps between checkpoints.")
    max_failures: int = Field(default=2, ge=0, description="Worker failures that a run survives.")
    chosen_fall_warning: float = Field(
        default=20.0,
        gt=0,
        description="Warn once when chosen responses have lost so many nats on average while the "
        "loss falls.",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.zero_stage < {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]:
            raise ValueError(
                f"offload: {self.offload} needs a higher zero_stage than {self.zero_stage}"
            )
        budget = self.tokens_per_micro_batch
        if budget is not None and budget < 2 * self.max_tokens:
            raise ValueError(
                "tokens_per_micro_batch is below 2 × max_tokens: a pair of two such rows would not fit"
            )
        return self

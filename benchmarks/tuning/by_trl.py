"""TRL's `DPOTrainer` on the same rows, at the setting that is fastest for images.

Which options there are in TRL 1.16, and which are used:

    precompute_ref_log_probs   refused for vision data: the reference is computed in every step
    peft_config                given, and not a model with adapters: those would be kept as a second adapter, which
                               the reference then pays for; like this it is the bare model
    gradient_checkpointing     off (on by default): it computes the forward pass twice
    padding_free               does nothing in this version
    use_liger_kernel           deprecated, and GPU only
    activation_offloading      off: it saves memory for time
    per_device_train_batch_size  1, the rest by accumulation; 2 and 4 were no cheaper a pair on a CPU
    dataloader_num_workers     2 on a GPU, where images are read meanwhile, as ours does; none on a CPU, whose
                               seconds count wherever they are spent
    logging, saving, progress  off
    rows                       plain texts, the template applied beforehand, which spares it in every step

Its fused head computes log-probabilities without full logits in any case.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, List
from transformers import TrainerCallback
from trl import (  # pyright: ignore[reportMissingImports]
    DPOConfig,  # pyright: ignore[reportPrivateImportUsage]
    DPOTrainer,  # pyright: ignore[reportPrivateImportUsage]
)

from benchmarks.tuning.shapes import BETA, LEARNING_RATE, Work
from benchmarks.tuning.trial import Clock
from sima_ray.config import TrainingConfig
from sima_ray.policy.chat import join_response, render_prompt
from sima_ray.policy.checkpoint import load_policy
from sima_ray.ports import image_part, text_part
from sima_ray.records import PreferencePair
from sima_ray.tuning.dataset import read_pairs
from sima_ray.tuning.lora import add_lora, trainable


class _Laps(TrainerCallback):
    """Tells the clock of every epoch."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self._clock.begin()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self._clock.end("epoch")


def train(work: Work, clock: Clock) -> None:
    """Tune for all epochs."""
    trainer = make_trainer(work)
    trainer.add_callback(_Laps(clock))
    clock.ready(trainer.model)
    model = trainer.model.to(work.device).train()
    with trainer.compute_loss_context_manager():  # the others are warm too
        loss = trainer.compute_loss(model, collated(trainer, [0]))
    loss.backward()
    model.zero_grad()
    trainer.train()


def make_trainer(work: Work, adapters: dict[str, torch.Tensor] | None = None) -> Any:
    """A `DPOTrainer`, ready to train.

    Args:
        work: Model and rows.
        adapters: Weights to begin with, by name; by default those that `add_lora` draws from the seed.
    """
    config = work.training()
    policy, processor = load_policy(work.model, work.shapes.dtype)
    if adapters is None:
        policy_with = add_lora(policy, config.lora, work.seed)
        adapters = {name: p.detach().clone() for name, p in trainable(policy_with).items()}
        lora: Any = policy_with.peft_config["default"]
        policy: Any = policy_with.unload()
    else:
        lora = add_lora(load_policy(work.model)[0], config.lora, work.seed).peft_config["default"]
    rows = Dataset.from_list([_row(pair, processor, work) for pair in read_pairs(work.pairs)])
    trainer = DPOTrainer(
        model=policy,
        args=_arguments(work, config),
        train_dataset=rows.cast_column("images", List(Image())),
        processing_class=processor,
        peft_config=lora,
    )
    _set(trainer.model, adapters)
    return trainer


def collated(trainer: Any, rows: list[int]) -> dict[str, Any]:
    """The batch that the trainer would make of these rows, on the model's device."""
    batch = trainer.data_collator([trainer.train_dataset[row] for row in rows])
    return {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}


def _arguments(work: Work, config: TrainingConfig) -> Any:
    return DPOConfig(
        output_dir=str(work.folder / "trl"),
        beta=BETA,
        learning_rate=LEARNING_RATE,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_ratio,  # below 1 it is a share
        num_train_epochs=work.epochs,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=config.batch_size,
        gradient_checkpointing=False,
        bf16=work.shapes.dtype == "bfloat16",
        max_length=config.max_tokens,
        use_cpu=work.device == "cpu",
        dataloader_pin_memory=work.device == "cuda",
        dataloader_num_workers=2 if work.device == "cuda" else 0,
        dataloader_persistent_workers=work.device == "cuda",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=work.seed,
    )


def _row(pair: PreferencePair, processor: Any, work: Work) -> dict[str, Any]:
    """The very texts that ours tokenises, with the special tokens written out."""
    bos, eos = processor.tokenizer.bos_token, processor.tokenizer.eos_token
    prompt = render_prompt(processor, [image_part(b""), text_part(pair.prompt)])
    ends = [
        join_response(prompt, text)[len(prompt) :] + eos for text in (pair.chosen, pair.rejected)
    ]
    image = str(Path(work.images, pair.image))
    return {"prompt": bos + prompt, "chosen": ends[0], "rejected": ends[1], "images": [image]}


def _set(model: Any, adapters: dict[str, torch.Tensor]) -> None:
    own = trainable(model)
    assert own.keys() == adapters.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(adapters[name])

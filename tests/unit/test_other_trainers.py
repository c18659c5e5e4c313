"""Our exports in other trainers: TRL's `DPOTrainer` learns from one, LLaVA and POVID read the other."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from easy_pairs import easy_pairs
from PIL import Image

from sima_ray.config import LoraSettings
from sima_ray.data.export import export_llava, export_trl
from sima_ray.policy.chat import render_prompt
from sima_ray.policy.checkpoint import image_token_id, load_policy
from sima_ray.ports import image_part, text_part
from sima_ray.records import PreferencePair
from sima_ray.tuning.dataset import PairEncoder
from sima_ray.tuning.lora import add_lora, trainable


@pytest.fixture
def pairs(tmp_path: Path) -> list[PreferencePair]:
    return easy_pairs(tmp_path / "images", 4)


def test_trl_trains_on_the_export(
    tiny_llava: Path, pairs: list[PreferencePair], tmp_path: Path
) -> None:
    """Two steps: the first loss is log 2, every adapter moves, nothing else does, and the second loss is less.

    TRL's rows are our tokens without the one that begins a sequence, which it leaves to the chat template.
    """
    trl: Any = pytest.importorskip("trl")
    export = str(tmp_path / "pairs.trl.parquet")
    export_trl(pairs, export, images=str(tmp_path / "images"))
    cache = str(tmp_path / "cache")
    rows: Any = load_dataset("parquet", data_files=export, split="train", cache_dir=cache)
    policy, processor = load_policy(tiny_llava, "float32")
    adapted = add_lora(policy, LoraSettings(r=4, alpha=8), seed=0)
    settings, plain = adapted.peft_config["default"], adapted.unload()
    trainer = trl.DPOTrainer(
        model=plain,
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            max_length=512,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=processor,
        peft_config=settings,
    )
    assert _tokens(trainer) == _our_tokens(pairs, processor, str(tmp_path / "images"))
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    first, second = (line["loss"] for line in trainer.state.log_history if "loss" in line)
    assert first == pytest.approx(math.log(2), abs=1e-6) and second < first - 0.01
    names = trainable(trainer.model).keys()
    moved = {
        name
        for name, weight in trainer.model.named_parameters()
        if not torch.equal(weight, before[name])
    }
    # At the first step only the adapters' outer half has a gradient; the second moves both.
    assert moved == set(names) and all("language_model" in name for name in names)


def _tokens(trainer: Any) -> list[list[int]]:
    """Chosen rows, then rejected ones, as the trainer would compute them."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    pixels = batch["pixel_values"]
    assert len(pixels) == len(batch["input_ids"]) and not torch.equal(pixels[0], pixels[1])
    masks = batch["attention_mask"].bool()
    return [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], masks, strict=True)]


def _our_tokens(pairs: list[PreferencePair], processor: Any, images: str) -> list[list[int]]:
    encoder = PairEncoder(processor, images, 512)
    encoded = [encoder.encode(pair) for pair in pairs]
    chosen = [torch.cat([pair.prompt_P, pair.chosen_C]) for pair in encoded]
    rejected = [torch.cat([pair.prompt_P, pair.rejected_R]) for pair in encoded]
    rows = [row.tolist() for row in chosen + rejected]
    begin = processor.tokenizer.bos_token_id
    assert all(row[0] == begin and image_token_id(processor) in row for row in rows)
    return [row[1:] for row in rows]


def test_llava_and_povid_read_the_export(
    tiny_llava: Path, pairs: list[PreferencePair], tmp_path: Path
) -> None:
    """Read as their loaders do: turns alternate from "human" on, the placeholder goes to the front of its turn,
    and the Vicuna template gives the very prompt that our service renders."""
    export = tmp_path / "pairs.llava.json"
    export_llava(pairs, str(export))
    processor: Any = load_policy(tiny_llava)[1]
    for row, pair in zip(json.loads(export.read_text()), pairs, strict=True):
        Image.open(tmp_path / "images" / row["image"]).convert("RGB")
        prompt = render_prompt(processor, [image_part(b""), text_part(pair.prompt)])
        for turns, answer in (
            (row["conversations"], pair.chosen),
            (row["rejected_conversations"], pair.rejected),
        ):
            assert _vicuna(turns) == f"{prompt} {answer}</s>"


def _vicuna(turns: list[dict[str, str]]) -> str:
    """A conversation in LLaVA-1.5's template ("v1"), its system words left out."""
    said = ""
    for place, turn in enumerate(turns):
        assert turn["from"] == ("human", "gpt")[place % 2]
        value = turn["value"]
        if "<image>" in value:
            value = f"<image>\n{value.replace('<image>', '').strip()}"
        said += f"USER: {value} " if turn["from"] == "human" else f"ASSISTANT: {value}</s>"
    return said

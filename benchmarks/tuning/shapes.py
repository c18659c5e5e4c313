"""The model, the images and the rows that all trainers get, made by code from a seed.

`python -m benchmarks.tuning.shapes FOLDER` makes what the folder's `work.json` describes.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from sima_ray.config import LoraSettings, TrainingConfig
from sima_ray.records import PreferencePair

BETA, LEARNING_RATE = 0.1, 1e-5
MAX_TOKENS = 2048
WORDS = 740
"""Words that are one token each; with bytes and special tokens the tokenizer knows 1000."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """Sizes of a LLaVA and of the rows that it is tuned on.

    Attributes:
        image_side, patch: Pixels; an image has (image_side / patch)² tokens.
        vision_width, vision_layers, vision_heads: Of the CLIP tower; its last layer but one is read.
        text_width, text_inner, text_layers, text_heads: Of the Llama.
        vocabulary: Rows of the head.
        prompt_words: A token each, beside 22 of the chat template.
        response_tokens: From, to.
        lora_r: Rank; alpha is twice that.
        dtype: Of weights and computation.
        pairs: In the data.
        batch_size: Pairs an update.
    """

    image_side: int = 336
    patch: int = 14
    vision_width: int = 64
    vision_layers: int = 3
    vision_heads: int = 2
    text_width: int = 512
    text_inner: int = 1408
    text_layers: int = 4
    text_heads: int = 8
    vocabulary: int = 1000
    prompt_words: int = 21
    response_tokens: tuple[int, int] = (100, 150)
    lora_r: int = 16
    dtype: str = "float32"
    pairs: int = 16
    batch_size: int = 8

    @property
    def decoder_parameters(self) -> int:
        """Of the decoder's linear layers, which a token passes."""
        return self.text_layers * (4 * self.text_width**2 + 3 * self.text_width * self.text_inner)

    @property
    def lora(self) -> LoraSettings:
        """On all linear layers of the language model."""
        return LoraSettings(r=self.lora_r, alpha=2 * self.lora_r)


SHAPES = {
    "small": Shapes(),
    "quick": Shapes(
        image_side=84,
        vision_layers=2,
        text_width=64,
        text_inner=160,
        text_layers=2,
        text_heads=2,
        response_tokens=(10, 15),
        lora_r=4,
        pairs=4,
        batch_size=2,
    ),
    "7b": Shapes(
        vision_width=1024,
        vision_layers=24,
        vision_heads=16,
        text_width=4096,
        text_inner=11008,
        text_layers=32,
        text_heads=32,
        vocabulary=32064,
        lora_r=128,
        dtype="bfloat16",
        pairs=32,
    ),
}


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a pair: the prompt with its image, and both responses with their ends."""

    prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True, slots=True)
class Work:
    """A folder with model, images and pairs, and how they are used.

    Attributes:
        folder: Holds `model`, `images` and `pairs.parquet`.
        shapes: Of what is in it.
        device: "cpu" or "cuda".
        epochs: Of a run.
        seed: Of everything.
    """

    folder: Path
    shapes: Shapes
    device: str
    epochs: int
    seed: int

    @property
    def model(self) -> str:
        """The policy's folder."""
        return str(self.folder / "model")

    @property
    def images(self) -> str:
        """The images' folder."""
        return str(self.folder / "images")

    @property
    def pairs(self) -> str:
        """The pairs file."""
        return str(self.folder / "pairs.parquet")

    def training(self) -> TrainingConfig:
        """The product's own settings, and the few that this comparison fixes."""
        return TrainingConfig.model_validate(
            {
                "beta": BETA,
                "learning_rate": LEARNING_RATE,
                "epochs": self.epochs,
                "max_tokens": MAX_TOKENS,
                "batch_size": self.shapes.batch_size,
                "dtype": self.shapes.dtype,
                "lora": self.shapes.lora.model_dump(),
                "accelerator": "gpu" if self.device == "cuda" else "cpu",
            }
        )

    def write(self) -> None:
        """Describe it in its folder, which is made if missing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        described = asdict(self) | {"folder": str(self.folder)}
        (self.folder / "work.json").write_text(json.dumps(described), encoding="utf-8")

    def lengths(self) -> list[Lengths]:
        """Of all pairs, once they are made."""
        found = json.loads((self.folder / "lengths.json").read_text(encoding="utf-8"))
        return [Lengths(*entry) for entry in found]

    @classmethod
    def read(cls, folder: Path) -> "Work":
        """What `write` left."""
        found: dict[str, Any] = json.loads((folder / "work.json").read_text(encoding="utf-8"))
        shapes = found["shapes"] | {"response_tokens": tuple(found["shapes"]["response_tokens"])}
        return cls(**found | {"folder": folder, "shapes": Shapes(**shapes)})


def for_gate(shapes: Shapes) -> Shapes:
    """The same rows and widths for float64: two pairs, and at most two layers of the widest model."""
    if shapes.text_width <= SHAPES["small"].text_width:
        return replace(shapes, pairs=2)
    return replace(shapes, pairs=2, text_layers=2, vision_layers=2)


def prepare(work: Work) -> None:
    """Make all that the folder holds."""
    from sima_ray.policy.checkpoint import load_processor
    from sima_ray.tuning.dataset import PairEncoder

    _save_model(work)
    pairs = _save_rows(work)
    encoder = PairEncoder(load_processor(work.model), work.images, MAX_TOKENS)
    found = [
        [len(ids) for ids in (pair.prompt_P, pair.chosen_C, pair.rejected_R)]
        for pair in map(encoder.encode, pairs)
    ]
    (work.folder / "lengths.json").write_text(json.dumps(found), encoding="utf-8")


def words() -> list[str]:
    """Of two syllables each, a space before them."""
    syllables = ["".join(pair) for pair in product("bdfgklmnprstvwz", "aeiou")]
    return [f" {a}{b}" for a, b in product(syllables, syllables)][:WORDS]


def make_pairs(shapes: Shapes, seed: int) -> Iterator[PreferencePair]:
    """Random words; a response has its number of tokens, the end included."""
    drawn = np.random.default_rng(seed)
    known = words()

    def text(count: int) -> str:
        return "".join(known[k] for k in drawn.integers(len(known), size=count)).strip()

    for number in range(shapes.pairs):
        low, high = shapes.response_tokens
        lengths = drawn.integers(low, high, size=2, endpoint=True)
        yield PreferencePair(
            row_id=f"{number:05d}",
            image=f"{number:05d}.jpg",
            prompt=text(shapes.prompt_words),
            chosen=text(lengths[0] - 1),
            rejected=text(lengths[1] - 1),
            chosen_from="greedy",
            rejected_from="sampled",
        )


def _save_rows(work: Work) -> list[PreferencePair]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    pairs = list(make_pairs(work.shapes, work.seed))
    drawn = np.random.default_rng(work.seed)
    (work.folder / "images").mkdir(exist_ok=True)
    for pair in pairs:  # as large as most of COCO's
        pixels = drawn.integers(256, size=(480, 640, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(work.folder / "images" / pair.image, quality=90)
    pq.write_table(pa.Table.from_pylist([asdict(pair) for pair in pairs]), work.pairs)
    return pairs


def _save_model(work: Work) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    from sima_ray.policy.tiny import TinyShape, make_processor

    shapes = work.shapes
    processor = make_processor(words(), TinyShape(shapes.image_side, shapes.patch))
    torch.manual_seed(work.seed)
    with torch.device(work.device):
        model = AutoModelForImageTextToText.from_config(
            _config(shapes, processor.tokenizer), dtype=getattr(torch, shapes.dtype)
        )
    model.save_pretrained(work.model)
    processor.save_pretrained(work.model)


def _config(shapes: Shapes, tokenizer: Any) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    special: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=shapes.vision_width,
        intermediate_size=4 * shapes.vision_width,
        num_hidden_layers=shapes.vision_layers,
        num_attention_heads=shapes.vision_heads,
        image_size=shapes.image_side,
        patch_size=shapes.patch,
        projection_dim=shapes.vision_width,
    )
    text = LlamaConfig(
        vocab_size=shapes.vocabulary,
        hidden_size=shapes.text_width,
        intermediate_size=shapes.text_inner,
        num_hidden_layers=shapes.text_layers,
        num_attention_heads=shapes.text_heads,
        num_key_value_heads=shapes.text_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        **special,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(shapes.image_side // shapes.patch) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        **special,
    )


if __name__ == "__main__":
    prepare(Work.read(Path(sys.argv[1])))

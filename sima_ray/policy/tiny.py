"""Makes tiny LLaVA checkpoints: Hugging Face folders in the layout of the published ones.

CLIP vision tower, two-layer projector, Llama, with processor, tokenizer and chat template, as in
`llava-hf/llava-1.5-7b-hf`; only everything is small, and the tokenizer knows bytes and phrases.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from sima_ray.policy.convert_keys import published_name

BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
SPECIALS = (BOS, EOS, PAD, IMAGE)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""LLaVA-1.5's: "USER: <image>\\n… ASSISTANT: …</s>"."""


@dataclass(frozen=True, slots=True)
class TinyShape:
    """Sizes of a tiny LLaVA. Attention heads are `head_dim` wide, which the engine's kernels know.

    An image is scaled to `image_side` pixels and becomes (image_side / patch)² tokens.
    """

    image_side: int = 96
    patch: int = 16
    vision_width: int = 64
    vision_layers: int = 2
    text_width: int = 64
    text_layers: int = 2
    text_heads: int = 2
    head_dim: int = 32
    max_positions: int = 4096


def make_tiny_llava(
    folder: Path, seed: int = 0, phrases: Sequence[str] = (), shape: TinyShape | None = None
) -> Path:
    """Write an untrained tiny LLaVA, in bf16, with all that transformers and vLLM need to load it.

    Args:
        folder: Made if missing.
        seed: Of the weights.
        phrases: Texts that the tokenizer reads as one token each; other text is read by bytes.
        shape: The sizes.
    """
    shape = shape or TinyShape()
    processor = make_processor(phrases, shape)
    save_tiny_llava(make_model(processor, shape, seed), processor, folder)
    return folder


def make_model(
    processor: LlavaProcessor, shape: TinyShape, seed: int = 0
) -> LlavaForConditionalGeneration:
    """An untrained model in fp32 for this processor's vocabulary."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(_config(processor.tokenizer, shape)).eval()


def make_processor(phrases: Sequence[str], shape: TinyShape) -> LlavaProcessor:
    """Image processor, tokenizer and chat template."""
    size = {"height": shape.image_side, "width": shape.image_side}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size=size,
            crop_size=size,
            do_resize=True,
            do_center_crop=False,
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
        ),
        tokenizer=make_tokenizer(phrases, shape.max_positions),
        patch_size=shape.patch,
        # CLIP's class token is counted here and dropped by the "default" strategy.
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
    )


def make_tokenizer(phrases: Sequence[str], max_positions: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that reads each phrase as one token, the longest first."""
    unique = list(dict.fromkeys(phrases))
    byte_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    # The byte-level spelling of a phrase is what the model's vocabulary holds ("Ġdog" for " dog").
    tokens += [byte_of.pre_tokenize_str(phrase)[0][0] for phrase in unique if len(phrase) > 1]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    splits: list[pre_tokenizers.PreTokenizer] = [byte_of]
    if unique:
        longest_first = sorted(unique, key=lambda phrase: (-len(phrase), phrase))
        pattern = Regex("|".join(_escape(phrase) for phrase in longest_first))
        splits.insert(0, pre_tokenizers.Split(pattern, behavior="isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIALS))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def _escape(phrase: str) -> str:
    return "".join(c if c.isalnum() or c.isspace() else f"\\{c}" for c in phrase)


def _config(tokenizer: PreTrainedTokenizerFast, shape: TinyShape) -> LlavaConfig:
    # A multiple of 64 keeps the output matrix aligned.
    vocabulary = -(-len(tokenizer) // 64) * 64
    special: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=4 * shape.vision_width,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=max(1, shape.vision_width // shape.head_dim),
        image_size=shape.image_side,
        patch_size=shape.patch,
        projection_dim=shape.vision_width,
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.text_width,
        intermediate_size=-(-8 * shape.text_width // 96) * 32,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.text_heads,
        num_key_value_heads=shape.text_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=False,
        **special,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIALS.index(IMAGE),
        image_seq_length=(shape.image_side // shape.patch) ** 2,
        # The last layer: a tower of two layers has none to spare.
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        **special,
    )


def save_tiny_llava(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path
) -> None:
    """Save a model made by `make_model`, in bf16 and with the published names of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    half = LlavaForConditionalGeneration(model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    text: Any = model.config.text_config
    half.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        do_sample=False,
    )
    half.save_pretrained(folder)
    processor.save_pretrained(folder)
    weights = folder / "model.safetensors"
    renamed = {published_name(name): tensor for name, tensor in load_file(weights).items()}
    save_file(renamed, weights, metadata={"format": "pt"})

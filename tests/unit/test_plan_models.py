"""A plan's figures against transformers: parameters, tokens of images, bytes that a layer keeps."""

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from sima_ray.config import LoraSettings, TrainingConfig
from sima_ray.plan.architecture import Language, find_architecture, published, read_architecture
from sima_ray.plan.training import activations
from sima_ray.policy.tiny import make_tokenizer

hf: Any = transformers  # its configs take more than their types say

PARAMETERS = {
    "llava-1.5-7b-hf": 7_063_427_072,
    "llava-1.5-13b-hf": 13_351_494_656,
    "llava-v1.6-vicuna-7b-hf": 7_063_431_168,
    "llava-v1.6-vicuna-13b-hf": 13_351_499_776,
    "llava-v1.6-mistral-7b-hf": 7_566_747_648,
    "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen3-VL-8B-Instruct": 8_767_123_696,
    "SmolVLM-Instruct": 2_246_272_880,
}
SIZES = [
    (640, 480),
    (480, 640),
    (640, 640),
    (640, 427),
    (333, 500),
    (64, 640),
    (1600, 900),
    (97, 96),
]


def meta_model(name: str) -> Any:
    config = dict(published()[name]["config"])
    with torch.device("meta"):
        made = hf.AutoConfig.for_model(**config)
        return hf.AutoModelForImageTextToText.from_config(made)


def test_all_published_models_are_counted() -> None:
    assert set(published()) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_real_classes(name: str) -> None:
    found, _ = find_architecture(f"/somewhere/{name}")
    model = meta_model(name)
    assert found.parameters == PARAMETERS[name] == sum(p.numel() for p in model.parameters())
    decoder = model.get_decoder()
    assert found.language.body == sum(
        p.numel() for n, p in decoder.named_parameters() if not n.startswith("embed_tokens")
    )


@pytest.mark.parametrize("name", ["llava-1.5-7b-hf", "Qwen3-VL-8B-Instruct", "SmolVLM-Instruct"])
def test_adapters_are_those_of_peft(name: str) -> None:
    from sima_ray.tuning.lora import add_lora, trainable

    settings = LoraSettings()
    with torch.device("meta"):
        tuned = add_lora(meta_model(name), settings, 0)
    found, _ = find_architecture(f"/somewhere/{name}")
    assert found.language.lora_parameters(settings.r, settings.targets) == sum(
        p.numel() for p in trainable(tuned).values()
    )


def test_what_a_config_leaves_out_is_as_transformers_says() -> None:
    for kind, config in (("llama", hf.LlamaConfig()), ("mistral", hf.MistralConfig())):
        text = {"model_type": kind, "vocab_size": config.vocab_size}
        vision = published()["llava-1.5-7b-hf"]["config"]["vision_config"]
        found = read_architecture(
            {"model_type": "llava", "text_config": text, "vision_config": vision}
        ).language
        assert (found.width, found.inner, found.layers, found.heads, found.kv_heads) == (
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        assert found.context == config.max_position_embeddings


def llava_next() -> Any:
    pinpoints = published()["llava-v1.6-mistral-7b-hf"]["config"]["image_grid_pinpoints"]
    return hf.LlavaNextProcessor(
        image_processor=hf.LlavaNextImageProcessor(
            size={"shortest_edge": 336},
            crop_size={"height": 336, "width": 336},
            image_grid_pinpoints=pinpoints,
        ),
        tokenizer=make_tokenizer([], 4096),
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )


@pytest.mark.parametrize("size", SIZES)
def test_tokens_of_an_image_llava_next(size: tuple[int, int]) -> None:
    width, height = size
    found = find_architecture("/x/llava-v1.6-mistral-7b-hf")[0].image.tokens(width, height)
    counted = llava_next()._get_num_multimodal_tokens(image_sizes=[(height, width)])
    assert found == counted.num_image_tokens[0]


@pytest.mark.parametrize("name", ["Qwen3-VL-8B-Instruct", "Qwen2.5-VL-7B-Instruct"])
@pytest.mark.parametrize("size", [*SIZES, (9000, 5000)])
def test_tokens_of_an_image_qwen(name: str, size: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    width, height = size
    facts = published()[name]
    patch, limits = facts["config"]["vision_config"]["patch_size"], facts["image"]
    high, wide = smart_resize(height, width, 2 * patch, **limits)
    found = find_architecture(f"/x/{name}")[0].image.tokens(width, height)
    assert found == (high // patch) * (wide // patch) // 4


@pytest.mark.parametrize("size", SIZES)
def test_tokens_of_an_image_smolvlm(size: tuple[int, int]) -> None:
    width, height = size
    tokenizer = make_tokenizer(["\n\n"], 4096)  # which SmolVLM's, too, reads as one token
    processor = hf.Idefics3Processor(
        image_processor=hf.Idefics3ImageProcessor(
            size={"longest_edge": 1536}, max_image_size={"longest_edge": 384}
        ),
        tokenizer=tokenizer,
        image_seq_len=81,
    )
    counted = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
    image = find_architecture("/x/SmolVLM-Instruct")[0].image
    assert image.tokens(width, height) == counted.num_image_tokens[0]
    assert image.patches(width, height) == counted.num_image_patches[0] * (384 // 14) ** 2


KINDS: dict[str, Any] = {
    "llama": hf.LlamaConfig,
    "mistral": hf.MistralConfig,
    "qwen3": hf.Qwen3Config,
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_keeps_so_many_bytes_of_a_token(kind: str, dtype: str) -> None:
    """Counted by autograd's own hooks, on models of one layer and of three."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4 if kind == "llama" else 2}
    training = TrainingConfig.model_validate({"dtype": dtype, "lora": {"r": 16}})
    kept = {layers: saved_bytes(kind, layers, sizes, training) for layers in (1, 3)}
    text = Language(128, 384, 1, 4, sizes["num_key_value_heads"], 32, 64, 64, False)
    if kind == "qwen3":
        text = Language(128, 384, 1, 4, 2, 32, 64, 64, False, qk_norm=True)
    measured = (kept[3] - kept[1]) / 2 / 256
    assert activations(text, training) == pytest.approx(measured, rel=0.03)


def saved_bytes(kind: str, layers: int, sizes: dict[str, int], training: TrainingConfig) -> int:
    """Of tensors kept for the backward pass over 256 tokens, parameters apart."""
    config = KINDS[kind](vocab_size=64, num_hidden_layers=layers, head_dim=32, **sizes)
    model: Any = hf.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, training.dtype))
    lora = LoraConfig(r=16, lora_alpha=16, target_modules=training.lora.targets)
    tuned: Any = get_peft_model(model, lora, autocast_adapter_dtype=False)
    own = {p.untyped_storage().data_ptr() for p in tuned.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (
                storage.nbytes(),
                tensor,
            )  # held, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        base = tuned.base_model.model.model
        state = base(input_ids=torch.zeros(1, 256, dtype=torch.long), use_cache=False)
    assert state.last_hidden_state.requires_grad
    return sum(size for size, _ in kept.values())

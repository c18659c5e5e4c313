"""LLaVA's own layout into the Hugging Face one and back: names, shapes, tokens, and above all logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from original_llava import (
    TEXTS,
    TOWER_PREFIX,
    VOCABULARY,
    Parts,
    make_parts,
    original_weights,
    write_original,
    write_tower,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from sima_ray.policy.checkpoint import load_policy, load_processor, weight_names
from sima_ray.policy.convert import convert, with_rows
from sima_ray.policy.convert_config import (
    KNOWN_TOWERS,
    Layout,
    original_config,
    read_original_config,
    tower_config,
)
from sima_ray.policy.convert_keys import (
    Skipped,
    original_name,
    published_name,
    published_shapes,
)
from sima_ray.policy.tiny import make_tiny_llava
from sima_ray.policy.weight_files import model_files, model_weights
from sima_ray.ports import text_part

GOLDEN = Path(__file__).parent / "golden" / "llava_weights.txt"
PUBLISHED_7B = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "image_aspect_ratio": "pad",
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava_llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "vocab_size": 32000,
}
PUBLISHED_13B = PUBLISHED_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}


@pytest.fixture(scope="module")
def parts() -> Parts:
    return make_parts()


@pytest.fixture(scope="module")
def original(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vision tower is in the checkpoint; its config, which has no known name, in a folder beside it."""
    folder = write_original(tmp_path_factory.mktemp("original") / "model", parts)
    write_tower(folder / "somebody" / "small-clip", parts)
    return folder


@pytest.fixture(scope="module")
def converted(original: Path) -> Path:
    output = original.parent / "converted"
    convert(original, output)
    return output


def logits_of(folder: Path, pixels: torch.Tensor, ids: list[int]) -> torch.Tensor:
    model, _ = load_policy(folder, "float32")
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]


def expanded(sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The golden list at these sizes: L and T count layers of the language model and of the vision tower."""
    shapes: dict[str, tuple[int, ...]] = {}
    for line in GOLDEN.read_text().splitlines():
        if line.startswith("#"):
            continue
        name, *symbols = line.split()
        layers = next((s for s in "LT" if f"{{{s}}}" in name), None)
        for n in range(sizes[layers] if layers else 1):
            shape = tuple(sizes[symbol] for symbol in symbols)
            shapes[name.format(**{layers: n}) if layers else name] = shape
    return shapes


def golden(config: Any) -> dict[str, tuple[int, ...]]:
    text, vision = config.text_config, config.vision_config
    return expanded(
        {
            "L": text.num_hidden_layers,
            "V": text.vocab_size,
            "D": text.hidden_size,
            "K": text.num_key_value_heads * text.head_dim,
            "F": text.intermediate_size,
            "T": vision.num_hidden_layers,
            "W": vision.hidden_size,
            "M": vision.intermediate_size,
            "P": vision.patch_size,
            "C": 3,
            "S": (vision.image_size // vision.patch_size) ** 2 + 1,
        }
    )


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: held.shape for name, held in model_weights(folder).items()}


@pytest.mark.parametrize(
    ("values", "weights", "size"),
    [
        # What the published index file says.
        pytest.param(PUBLISHED_7B, 686, 14_126_854_144, id="7b"),
        # 13,351,494,656 parameters: "13.4B".
        pytest.param(PUBLISHED_13B, 758, 26_702_989_312, id="13b"),
    ],
)
def test_published_models_have_the_golden_weights(
    values: dict[str, Any], weights: int, size: int
) -> None:
    tower = tower_config(Path("model"), values, None)
    config: Any = read_original_config(Path("model"), values, tower)
    config.text_config.vocab_size = 32064
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    of_model = {published_name(name): tuple(p.shape) for name, p in model.named_parameters()}
    assert of_model == golden(config) == published_shapes(config)
    assert len(of_model) == weights
    assert sum(2 * torch.Size(shape).numel() for shape in of_model.values()) == size
    assert [published_name(original_name(name)) for name in of_model] == list(of_model)


def test_the_published_config_comes_out() -> None:
    """The fields of llava-hf/llava-1.5-7b-hf, from those of liuhaotian/llava-v1.5-7b."""
    published = LlavaConfig(
        image_token_index=32000,
        projector_hidden_act="gelu",
        text_config={
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "vocab_size": 32000,
        },
        vision_config={
            "model_type": "clip_vision_model",
            **KNOWN_TOWERS["openai/clip-vit-large-patch14-336"],
        },
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    ).to_dict() | {"pad_token_id": 32001}
    for name in (PUBLISHED_7B["mm_vision_tower"], "/data/models/clip-vit-large-patch14-336/"):
        values = PUBLISHED_7B | {"mm_vision_tower": name}
        tower = tower_config(Path("model"), values, None)
        found: Any = read_original_config(Path("model"), values, tower)
        found.pad_token_id, found.image_token_index = 32001, 32000
        found.text_config.architectures = None
        assert found.to_dict() == published
    back = original_config(found, 32000, "float16")
    assert {key: back[key] for key in PUBLISHED_7B} == PUBLISHED_7B


def test_an_original_folder_computes_what_its_parts_compute(parts: Parts, converted: Path) -> None:
    pixels = torch.randn(1, 3, 56, 56, generator=torch.manual_seed(1))
    before, after = [1, 5, 7, 300, 449], [13, 8, 210, 44]
    expected = parts.logits(before, pixels, after)
    config = json.loads((converted / "config.json").read_text())
    ids = [*before, *[config["image_token_index"]] * 16, *after]
    logits = logits_of(converted, pixels, ids)
    assert logits.shape[1] == 512
    torch.testing.assert_close(logits[:, :VOCABULARY], expected, rtol=0, atol=1e-5)
    # The added rows are the mean, so that none of them is ever the largest.
    assert (logits[:, VOCABULARY:] < logits[:, :VOCABULARY].max(-1, keepdim=True).values).all()


def test_a_converted_folder_has_the_golden_weights_and_all_files(converted: Path) -> None:
    model, processor = load_policy(converted, "float32")
    config: Any = model.config
    assert shapes_in(converted) == golden(config)
    assert (config.image_token_index, config.pad_token_id) == (VOCABULARY, VOCABULARY + 1)
    assert config.text_config.vocab_size == 512
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert config.image_seq_length == 16
    generation: Any = model.generation_config
    ids = (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id)
    assert ids == (1, 2, VOCABULARY + 1)
    names = {file.name for file in converted.iterdir()}
    assert {"tokenizer.json", "tokenizer.model", "LICENSE.txt", "preprocessor_config.json"} <= names
    assert "sima" not in "".join(names)
    message: Any = {"role": "user", "content": [{"type": "image"}, text_part("What is it?")]}
    prompt: Any = processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "USER: <image>\nWhat is it? ASSISTANT:"
    turns: Any = [("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello.")]
    messages: Any = [{"role": role, "content": text} for role, text in turns]
    text = processor.apply_chat_template(messages, tokenize=False)
    assert text == "Be brief. USER: Hi. ASSISTANT: Hello.</s>"
    image = Image.new("RGB", (80, 40), (250, 10, 10))
    inputs: Any = processor(text=prompt, images=[image], return_tensors="pt")  # pyright: ignore[reportCallIssue]
    assert (inputs["input_ids"] == VOCABULARY).sum() == 16
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_become_sentencepieces_own_ids(parts: Parts, converted: Path, text: str) -> None:
    tokenizer: Any = load_processor(converted).tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    assert tokenizer(text).input_ids == [1, *parts.pieces.encode(text)]
    assert tokenizer.decode(parts.pieces.encode(text)) == text


def test_there_and_back_nothing_changes(original: Path, converted: Path, parts: Parts) -> None:
    """Weights bit by bit, the tokenizer byte by byte; the rows that were added are gone."""
    back, again = converted.parent / "back", converted.parent / "again"
    done = convert(converted, back, to=Layout.ORIGINAL, shard_bytes=100_000)
    assert (done.rows, done.read, done.written) == ((512, VOCABULARY), 105, 105)
    assert done.files > 1 and (back / "model.safetensors.index.json").is_file()
    weights = {k: v for f in model_files(back) for k, v in load_file(f).items()}
    expected = original_weights(parts)
    left_out = expected.keys() - weights.keys()
    assert {name.rpartition(".")[2] for name in left_out} == {"inv_freq", "position_ids"}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    model = (original / "tokenizer.model").read_bytes()
    assert (back / "tokenizer.model").read_bytes() == model
    assert "<image>" not in (back / "tokenizer.json").read_text()
    assert json.loads((back / "tokenizer_config.json").read_text())["pad_token"] == "<unk>"

    assert convert(back, again).rows == (VOCABULARY, 512)
    [first, second] = [load_file(model_files(f)[0]) for f in (converted, again)]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        assert json.loads((again / name).read_text()) == json.loads((converted / name).read_text())


def test_a_tiny_model_in_the_published_layout_there_and_back(tmp_path: Path) -> None:
    """Its two tokens are among the others, so that its vocabulary stays as it is; bfloat16 stays too."""
    tiny = make_tiny_llava(tmp_path / "tiny")
    convert(tiny, tmp_path / "original", to=Layout.ORIGINAL)
    names = weight_names(tmp_path / "original")
    assert f"{TOWER_PREFIX}vision_model.pre_layrnorm.bias" in names
    assert {"model.mm_projector.0.weight", "lm_head.weight", "model.norm.weight"} < names
    done = convert(tmp_path / "original", tmp_path / "hf")
    assert (done.dtype, done.cast, done.rows) == ("bfloat16", 0, (320, 320))
    one, other = (load_file(f / "model.safetensors") for f in (tiny, tmp_path / "hf"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name in ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        before, after = (json.loads((f / name).read_text()) for f in (tiny, tmp_path / "hf"))
        before.get("text_config", {})["architectures"] = ["LlamaForCausalLM"]
        assert after == before


def test_a_tower_of_its_own_is_read_from_its_folder(
    parts: Parts, converted: Path, tmp_path: Path
) -> None:
    source = write_original(tmp_path / "model", parts, with_tower=False)
    tower = write_tower(tmp_path / "clip", parts)
    # What pretraining left; the checkpoint holds the projector itself.
    left = {f"model.mm_projector.{k}": v * 9 for k, v in parts.projector.state_dict().items()}
    torch.save(left, source / "mm_projector.bin")
    seen: list[str] = []
    done = convert(
        source, tmp_path / "out", vision_tower=tower, on_step=lambda s: seen.append(s.file.name)
    )
    assert done.skipped == {
        Skipped.ROTARY: 3,
        Skipped.POSITIONS: 1,
        Skipped.CLIP_TEXT: 2,
        Skipped.REPEATED: 4,
    }
    assert done.read == done.written + 10
    assert seen == [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)] + ["pytorch_model.bin"]
    one, other = (load_file(f / "model.safetensors") for f in (converted, tmp_path / "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_types_are_kept_or_changed_as_asked(converted: Path, tmp_path: Path) -> None:
    done = convert(converted, tmp_path / "half", to=Layout.ORIGINAL, dtype="float16")
    assert (done.dtype, done.cast) == ("float16", 105)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "float16"
    done = convert(tmp_path / "half", tmp_path / "hf")
    assert (done.dtype, done.cast) == ("float16", 0)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float16"
    assert {s.dtype for s in model_weights(tmp_path / "hf").values()} == {torch.float16}


def test_padding_images_is_llavas_own_way(original: Path, converted: Path, tmp_path: Path) -> None:
    convert(original, tmp_path / "out", pad_images=True)
    wide = Image.new("RGB", (112, 56), (255, 0, 0))
    pads, crops = (AutoProcessor.from_pretrained(f) for f in (tmp_path / "out", converted))
    padded, cropped = (
        p.image_processor(wide, return_tensors="pt")["pixel_values"][0] for p in (pads, crops)
    )
    assert (cropped == cropped[:, :1, :1]).all()
    # Above and below is CLIP's mean colour, which is 0 once it is normalised.
    assert padded[:, 0].abs().max() < 0.02 and (padded[0, 28] > 1).all()


def test_added_rows_are_the_mean_at_every_conversion() -> None:
    rows = torch.randn(5000, 8, generator=torch.manual_seed(0)).bfloat16()
    grown = with_rows(rows, 5056)
    assert torch.equal(grown[:5000], rows)
    torch.testing.assert_close(
        grown[5000:].float(), rows.float().mean(0).expand(56, -1), rtol=8e-3, atol=1e-5
    )
    assert torch.equal(with_rows(grown, 5000), rows)

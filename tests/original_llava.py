"""A LLaVA in LLaVA's own layout, put together by hand from a Llama, a CLIP and a projector that stay apart."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 450
WIDTH, LAYERS = 64, 3
TOWER_PREFIX = "model.vision_tower.vision_tower."
TEXTS = ("USER: What is it? ASSISTANT:", "a  b", "日本 é 🙂", "trail ", "x\ny\n\nz", "1234", "\tq")


@dataclass(frozen=True, slots=True)
class Parts:
    """The three models, in float32, and the sentencepiece model that made the ids."""

    llama: LlamaForCausalLM
    tower: CLIPVisionModel
    projector: nn.Sequential
    pieces: sentencepiece.SentencePieceProcessor

    @torch.no_grad()
    def logits(self, before: list[int], pixels: Tensor, after: list[int]) -> Tensor:
        """Of ids, an image's features and ids again, as LLaVA's own code puts them together."""
        embed = self.llama.get_input_embeddings()
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[-2]
        features = self.projector(hidden[:, 1:])
        rows = [embed(torch.tensor([before])), features, embed(torch.tensor([after]))]
        return self.llama(inputs_embeds=torch.cat(rows, dim=1)).logits[0]


def make_parts(seed: int = 0) -> Parts:
    """Untrained models; the Llama has fewer key heads than query heads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=96,
                num_hidden_layers=LAYERS,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                rms_norm_eps=1e-5,
                tie_word_embeddings=False,
            )
        )
        tower = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=4,
                num_attention_heads=2,
                image_size=56,
                patch_size=14,
                projection_dim=32,
            )
        )
        projector = nn.Sequential(nn.Linear(32, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        with torch.no_grad():
            # Norms and biases that a wrong name would show in.
            for parameter in (*llama.parameters(), *tower.parameters()):
                parameter += torch.randn_like(parameter) * 0.05
    return Parts(llama.eval(), tower.eval(), projector.eval(), _pieces())


def original_weights(parts: Parts, *, with_tower: bool = True) -> dict[str, Tensor]:
    """As such checkpoints name them, with the buffers that old ones hold."""
    weights = dict(parts.llama.state_dict())
    for layer in range(LAYERS):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    weights |= {f"model.mm_projector.{k}": v for k, v in parts.projector.state_dict().items()}
    if with_tower:
        weights |= {TOWER_PREFIX + name: v for name, v in tower_weights(parts).items()}
    return weights


def tower_weights(parts: Parts) -> dict[str, Tensor]:
    """As CLIP's folders name them."""
    found = {
        f"vision_model.{name.removeprefix('vision_model.')}": tensor
        for name, tensor in parts.tower.state_dict().items()
    }
    return found | {"vision_model.embeddings.position_ids": torch.arange(17)[None]}


def original_config(**changes: Any) -> dict[str, Any]:
    """The fields of LLaVA-1.5's config.json, with these sizes."""
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_length": 512,
        "max_position_embeddings": 512,
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "somebody/small-clip",
        "model_type": "llava_llama",
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.31.0",
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": VOCABULARY,
        **changes,
    }


def write_original(folder: Path, parts: Parts, *, with_tower: bool = True) -> Path:
    """The folder: two `.bin` files with an index, sentencepiece's tokenizer, a licence."""
    folder.mkdir(parents=True)
    weights = original_weights(parts, with_tower=with_tower)
    names = sorted(weights)
    held: dict[str, str] = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, folder / file)
        held |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": held}
    write_json(folder / "pytorch_model.bin.index.json", index)
    write_json(folder / "config.json", original_config())
    write_tokenizer(folder, parts)
    (folder / "LICENSE.txt").write_text("As you like it.")
    return folder


def write_tower(folder: Path, parts: Parts) -> Path:
    """A CLIP folder with its text half, as OpenAI's are."""
    folder.mkdir(parents=True)
    text = {"text_model.final_layer_norm.weight": torch.ones(4), "logit_scale": torch.tensor(2.0)}
    torch.save(tower_weights(parts) | text, folder / "pytorch_model.bin")
    vision = parts.tower.config.to_dict()
    write_json(folder / "config.json", {"model_type": "clip", "vision_config": vision})
    write_json(
        folder / "preprocessor_config.json",
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 56, "crop_size": 56},
    )
    return folder


def write_tokenizer(folder: Path, parts: Parts) -> None:
    """tokenizer.model with the settings that Vicuna's have."""
    (folder / "tokenizer.model").write_bytes(parts.pieces.serialized_model_proto())
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    specials = {k: {"__type": "AddedToken", "content": v, **token} for k, v in names.items()}
    settings = {
        **{"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False},
        **{"legacy": False, "model_max_length": 2048, "pad_token": None, "padding_side": "right"},
        **{"sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer", **specials},
    }
    write_json(folder / "tokenizer_config.json", settings)
    specials = {k: {"content": v, **token} for k, v in names.items()}
    write_json(folder / "special_tokens_map.json", specials | {"pad_token": "<unk>"})


def write_json(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values))


def _pieces() -> sentencepiece.SentencePieceProcessor:
    """Trained on this very file, with the settings of Llama's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(Path(__file__).read_text().splitlines()),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())

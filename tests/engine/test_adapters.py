"""An adapter is one thing everywhere: in PEFT, merged into the weights, and as a LoRA request of vLLM."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from easy_pairs import easy_pairs
from peft import PeftModel
from PIL import Image
from stirred import in_float32, stirred_adapter

from sima_ray.config import MergeConfig
from sima_ray.policy.chat import render_prompt
from sima_ray.policy.checkpoint import load_policy
from sima_ray.policy.merge import merge
from sima_ray.ports import image_part, text_part

PROGRAM = Path(__file__).parents[1] / "lora_engine.py"
RANKS = (16, 128)
TOKENS = 12
QUESTIONS = ("Is it so?", "What is it? Say.")


@pytest.fixture(scope="module")
def root(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in float32, adapters of two ranks, and their merges: RANK, RANK-merged."""
    folder = tmp_path_factory.mktemp("adapters")
    base = in_float32(tiny_llava, folder / "base")
    pairs = easy_pairs(folder / "images", len(QUESTIONS))
    for r in RANKS:
        merge(
            str(base),
            str(stirred_adapter(base, folder / str(r), r)),
            str(folder / f"{r}-merged"),
            config=MergeConfig(parity_rows=2, tolerance=1e-5),
            probe=pairs,
            images=str(folder / "images"),
        )
    stirred_adapter(base, folder / "with-projector", 16, train_projector=True)
    return folder


def prompts(root: Path, processor: Any) -> list[dict[str, str]]:
    return [
        {
            "text": render_prompt(processor, [image_part(b""), text_part(question)]),
            "image": str(root / "images" / f"{number}.png"),
        }
        for number, question in enumerate(QUESTIONS)
    ]


def inputs(processor: Any, prompt: dict[str, str]) -> Any:
    image = Image.open(prompt["image"]).convert("RGB")
    return processor(text=prompt["text"], images=[image], return_tensors="pt")


@torch.no_grad()
def logits(model: Any, processor: Any, root: Path) -> list[torch.Tensor]:
    model = model.eval()
    return [model(**inputs(processor, prompt)).logits for prompt in prompts(root, processor)]


@torch.no_grad()
def greedy(folder: Path, root: Path) -> list[dict[str, list[Any]]]:
    """The greedy tokens of a policy folder, each with its log-probability, by transformers."""
    loaded: Any = load_policy(folder, "float32")
    model, processor = loaded
    found: list[dict[str, list[Any]]] = []
    for prompt in prompts(root, processor):
        asked = inputs(processor, prompt)
        start = asked["input_ids"].shape[1]
        made = model.eval().generate(**asked, max_new_tokens=TOKENS, do_sample=False)
        whole = asked | {"input_ids": made, "attention_mask": torch.ones_like(made)}
        logprobs_TV = model(**whole).logits[0, start - 1 : -1].log_softmax(-1)
        tokens = made[0, start:].tolist()
        steps = logprobs_TV[range(len(tokens)), tokens].tolist()
        found.append({"tokens": tokens, "logprobs": steps})
    return found


@pytest.mark.parametrize("r", RANKS)
def test_peft_computes_what_the_merged_policy_computes(root: Path, r: int) -> None:
    base, processor = load_policy(root / "base", "float32")
    before = logits(base, processor, root)
    tuned = PeftModel.from_pretrained(base, str(root / str(r)))
    merged, _ = load_policy(root / f"{r}-merged", "float32")
    for a, b, c in zip(
        logits(tuned, processor, root), logits(merged, processor, root), before, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert (a - c).abs().max() > 0.05


def test_vllm_answers_with_the_adapter_as_the_merged_policy_does(root: Path) -> None:
    """Greedy tokens and their log-probabilities, of the base too; one with a projector is refused in words."""
    _, processor = load_policy(root / "base", "float32")
    adapters = [str(root / str(r)) for r in RANKS] + [str(root / "with-projector")]
    asked = {"model": str(root / "base"), "adapters": adapters, "prompts": prompts(root, processor)}
    done = subprocess.run(
        [sys.executable, str(PROGRAM)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    *answers, refusal = json.loads(done.stdout.strip().splitlines()[-1])
    folders = [root / "base", *(root / f"{r}-merged" for r in RANKS)]
    wanted = [greedy(folder, root) for folder in folders]
    assert wanted[0] != wanted[1] != wanted[2]
    for found, policy in zip(answers, wanted, strict=True):
        for a, b in zip(found, policy, strict=True):
            assert a["tokens"] == b["tokens"]
            assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-4)
    assert "modules_to_save" in refusal

"""What a demo policy can do: its captions, its yes/no answers, and its verdicts on its own pairs."""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from sima_ray.config import GenerationConfig
from sima_ray.critic.prompt import CriticPrompt
from sima_ray.critic.verdict import parse_verdict
from sima_ray.demo.curriculum import Pair, draw_pair, relation
from sima_ray.demo.language import Caption, parse_caption, write_caption
from sima_ray.demo.oracle import caption_errors
from sima_ray.demo.scenes import Scene, render
from sima_ray.demo.world import POPE_KINDS, image_name, pope_questions
from sima_ray.metrics.pope import pope
from sima_ray.policy.chat import render_prompt
from sima_ray.ports import Part, image_part, text_part


@dataclass(frozen=True)
class Generator:
    """Answers many requests at once with plain transformers."""

    model: Any  # LlavaForConditionalGeneration; the types of transformers hide `generate`
    processor: Any  # LlavaProcessor
    batch: int = 125

    def answer(
        self,
        requests: Sequence[tuple[list[Part], Image.Image | None]],
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """One answer for each message and its image; greedy at temperature 0."""
        texts = []
        torch.manual_seed(seed)
        how: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        for at in range(0, len(requests), self.batch):
            part = requests[at : at + self.batch]
            images = [image for _, image in part if image is not None]
            inputs = self.processor(
                text=[render_prompt(self.processor, content) for content, _ in part],
                images=images or None,
                padding=True,
                return_tensors="pt",
            )
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            with torch.inference_mode():
                made = self.model.generate(**inputs, max_new_tokens=max_tokens, **how)
            made = made[:, inputs["input_ids"].shape[1] :]
            texts += self.processor.batch_decode(made, skip_special_tokens=True)
        return [text.strip() for text in texts]


def caption_figures(said: Sequence[Caption], truths: Sequence[Caption]) -> dict[str, float]:
    """CHAIR, recall, errors and objects a caption; every mention counts."""
    mentions = wrong = captions = named = present = errors = 0
    for caption, truth in zip(said, truths, strict=True):
        there = {entry.name for entry in truth.entries}
        names = [entry.name for entry in caption.entries]
        absent = [name for name in names if name not in there]
        mentions, wrong = mentions + len(names), wrong + len(absent)
        captions += bool(absent)
        named, present = named + len(there & set(names)), present + len(there)
        errors += caption_errors(caption, truth)
    return {
        "chair_s": captions / len(said),
        "chair_i": wrong / max(mentions, 1),
        "recall": named / present,
        "errors": errors / len(said),
        "objects": mentions / len(said),
    }


def critic_figures(
    truths: Sequence[Caption], pairs: Sequence[Pair], verdicts: Sequence[Sequence[int | None]]
) -> dict[str, Any]:
    """Accuracy against the oracle, by kind and order, without ties; and consistency, ties included.

    Args:
        truths: The exact descriptions.
        pairs: The candidates.
        verdicts: For each order, the choice for each pair, by the number it was shown under.
    """
    right: dict[str, list[list[bool]]] = defaultdict(lambda: [[], []])
    agreed = []
    for at, (truth, pair) in enumerate(zip(truths, pairs, strict=True)):
        first, swapped = verdicts[0][at], verdicts[1][at]
        kind = relation(truth, pair)
        consistent = first is not None and swapped is not None and first != swapped
        agreed.append((kind, consistent))
        if kind == "tie":
            continue
        a, b = caption_errors(pair.first, truth), caption_errors(pair.second, truth)
        best = 1 if a < b else 2
        for name in ("all", kind):
            right[name][0].append(first == best)
            right[name][1].append(swapped == 3 - best)
    kinds = Counter(kind for kind, _ in agreed)
    strict = [consistent for kind, consistent in agreed if kind != "tie"]
    flat = [verdict for order in verdicts for verdict in order]
    return {
        "pairs": dict(kinds),
        "accuracy": {
            n: [round(_mean(order), 4) for order in orders] for n, orders in right.items()
        },
        "consistent": round(_mean([consistent for _, consistent in agreed]), 4),
        "consistent_without_ties": round(_mean(strict), 4),
        "unparseable": round(_mean([verdict is None for verdict in flat]), 4),
    }


def judge(
    generator: Generator,
    prompt: CriticPrompt,
    question: str,
    truths: Sequence[Caption],
    pairs: Sequence[Pair],
    images: Sequence[Image.Image] | None,
    max_tokens: int = 160,
) -> list[list[int | None]]:
    """The critic's verdicts in both orders."""
    verdicts = []
    for swap in (False, True):
        requests = []
        for at, (truth, pair) in enumerate(zip(truths, pairs, strict=True)):
            shown = (pair.second, pair.first) if swap else (pair.first, pair.second)
            texts = [write_caption(caption) for caption in (truth, *shown)]
            content = prompt.content(b"" if images else None, question, *texts)
            requests.append((content, images[at] if images else None))
        answers = generator.answer(requests, max_tokens)
        verdicts.append([parse_verdict(answer)[1] for answer in answers])
    return verdicts


def balanced_pairs(truths: Sequence[Caption], seed: int) -> list[Pair]:
    """A drawn pair for each scene, as the critic is trained on."""
    rng = random.Random(f"balanced/{seed}")
    return [draw_pair(truth, rng) for truth in truths]


def candidates(
    generator: Generator, question: str, images: Sequence[Image.Image], seed: int = 0
) -> tuple[list[Caption], list[Caption]]:
    """What the policy says greedily, and what it says when sampled as in a run."""
    requests = [([image_part(b""), text_part(question)], image) for image in images]
    greedy = generator.answer(requests, 48)
    how = GenerationConfig()
    sampled = generator.answer(
        requests, 48, temperature=how.temperature, top_p=how.top_p, seed=seed
    )
    return [parse_caption(text) for text in greedy], [parse_caption(text) for text in sampled]


def pope_accuracy(
    generator: Generator, held: Sequence[Scene], kinds: Sequence[str] = POPE_KINDS
) -> dict[str, float]:
    """Accuracy on the yes/no questions of each kind about these scenes."""
    numbered = dict(enumerate(held))
    images = {image_name(number): render(scene) for number, scene in numbered.items()}
    figures: dict[str, float] = {}
    for kind in kinds:
        questions = pope_questions(numbered, kind, seed="held")
        requests = [
            ([image_part(b""), text_part(question["text"])], images[question["image"]])
            for question in questions
        ]
        answers = generator.answer(requests, 3)
        figures[kind] = pope(answers, [question["label"] for question in questions]).accuracy
    return figures


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / max(len(values), 1)

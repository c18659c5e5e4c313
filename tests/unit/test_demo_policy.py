"""The committed checkpoint does what its card says, on a few scenes of the validation world."""

import json
from itertools import islice

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from sima_ray.critic.prompt import CriticPrompt, Layout, load_examples
from sima_ray.demo.evaluate import (
    Generator,
    balanced_pairs,
    candidates,
    caption_figures,
    critic_figures,
    judge,
    pope_accuracy,
)
from sima_ray.demo.language import QUESTIONS
from sima_ray.demo.make_policy import EXAMPLES, POLICY
from sima_ray.demo.scenes import render, scenes

HELD = list(islice(scenes("validation"), 60))
TRUTHS = [scene.truth for scene in HELD]
IMAGES = [render(scene) for scene in HELD]


@pytest.fixture(scope="module")
def generator() -> Generator:
    model = LlavaForConditionalGeneration.from_pretrained(POLICY, dtype=torch.float32)
    return Generator(model, AutoProcessor.from_pretrained(POLICY))


def test_the_checkpoint_is_small() -> None:
    assert sum(path.stat().st_size for path in POLICY.iterdir()) < 15e6


def test_the_card_meets_the_bar() -> None:
    card = json.loads((POLICY / "card.json").read_text())["validation"]
    assert 0.4 <= card["greedy"]["chair_s"] <= 0.7
    assert card["greedy"]["recall"] >= 0.8
    assert min(card["pope"].values()) >= 0.8
    for layout in Layout:
        critic = card[f"critic_{layout}_own"]
        assert min(critic["accuracy"]["all"]) >= 0.8
        assert min(*critic["accuracy"]["equal"], *critic["accuracy"]["longer"]) >= 0.75
        assert critic["consistent"] >= 0.8
        assert critic["unparseable"] < 0.01


def test_captions_describe_and_hallucinate(generator: Generator) -> None:
    greedy, sampled = candidates(generator, QUESTIONS[0], IMAGES)
    figures = caption_figures(greedy, TRUTHS)
    assert figures["recall"] > 0.7
    assert 0.2 < figures["chair_s"] < 0.8
    assert sum(g != s for g, s in zip(greedy, sampled, strict=True)) > 15


@pytest.mark.parametrize("layout", list(Layout))
def test_the_critic_answers_in_its_format(generator: Generator, layout: Layout) -> None:
    prompt = CriticPrompt(layout, load_examples(EXAMPLES))
    pairs = balanced_pairs(TRUTHS, 5)
    verdicts = judge(generator, prompt, QUESTIONS[0], TRUTHS, pairs, IMAGES)
    figures = critic_figures(TRUTHS, pairs, verdicts)
    assert figures["unparseable"] < 0.05
    assert min(figures["accuracy"]["all"]) > 0.85


def test_the_policy_answers_yes_and_no(generator: Generator) -> None:
    assert pope_accuracy(generator, HELD, ["adversarial"])["adversarial"] > 0.9

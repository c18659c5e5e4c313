"""The committed checkpoint does what its card says, on a few scenes of the validation world."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from benchmarks.proof.settings import CHOICE_SEED, TEST_SEED
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
from sima_ray.demo.language import QUESTIONS, write_caption
from sima_ray.demo.maker import EXAMPLES, POLICY, Maker, gate, recipe
from sima_ray.demo.run import PROMPTS_SEED
from sima_ray.demo.scenes import render, scenes
from sima_ray.errors import ConfigError
from sima_ray.policy.checkpoint import fingerprint

HELD = list(islice(scenes("validation"), 60))
TRUTHS = [scene.truth for scene in HELD]
IMAGES = [render(scene) for scene in HELD]


@pytest.fixture(scope="module")
def generator() -> Generator:
    model = LlavaForConditionalGeneration.from_pretrained(POLICY, dtype=torch.float32)
    return Generator(model, AutoProcessor.from_pretrained(POLICY))


def test_the_checkpoint_is_small() -> None:
    assert sum(path.stat().st_size for path in POLICY.iterdir()) < 15e6


def test_the_card_meets_the_bar_and_is_of_these_weights() -> None:
    card = json.loads((POLICY / "card.json").read_text())
    assert card["fingerprint"] == fingerprint(POLICY)
    lines = gate(card)
    assert len(lines) == 21
    assert [str(line) for line in lines if not line.holds] == []
    card["validation"]["greedy"]["chair_s"] = 0.71
    card["validation"]["pope"]["adversarial"] = 0.79
    card["validation"]["critic_image_first_own"]["accuracy"]["longer"][1] = 0.74
    card["validation"]["critic_examples_first_own"]["unparseable"] = 0.011
    assert [line.what for line in gate(card) if not line.holds] == [
        "captions, CHAIR_s",
        "POPE, adversarial",
        "critic, image_first, the longer is better, 21",
        "critic, examples_first, parseable",
    ]


def test_phases_of_another_recipe_are_refused(tmp_path: Path) -> None:
    torch.save({"recipe": recipe(1), "weights": {}, "seconds": 1.0}, tmp_path / "vision.pt")
    with pytest.raises(ConfigError, match="made with another seed"):
        Maker(tmp_path, seed=0).phase("vision")


@pytest.mark.parametrize("seed", [PROMPTS_SEED, CHOICE_SEED, TEST_SEED])
def test_prompts_are_other_draws_than_the_policy_was_made_from(seed: int) -> None:
    def texts(split_seed: int, count: int) -> list[str]:
        return [write_caption(s.truth) for s in islice(scenes("train", split_seed), count)]

    seen = {text for made_from in (0, 1, 2) for text in texts(made_from, 3000)}
    asked = texts(seed, 800)
    # Scenes of one object are few: some are drawn again.
    assert sum(text in seen for text in asked) < 0.1 * len(asked)


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

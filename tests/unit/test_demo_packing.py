"""Packed rows compute what the plain sequences compute, and samples are what serving will read."""

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from sima_ray.critic.prompt import Layout, load_examples
from sima_ray.demo.curriculum import Curriculum
from sima_ray.demo.maker import EXAMPLES
from sima_ray.demo.packing import Sample, pack, shared_length
from sima_ray.demo.scenes import render, scenes
from sima_ray.demo.tokenizer import phrases
from sima_ray.demo.training import image_features, language_loss, pixels_of
from sima_ray.policy.chat import join_response, render_prompt
from sima_ray.policy.tiny import TinyShape, make_model, make_processor
from sima_ray.ports import image_part, text_part

SHAPE = TinyShape(vision_width=32, text_width=64)
SCENES = list(islice(scenes("train"), 6))


def _curriculum() -> Curriculum:
    processor = make_processor(phrases(), SHAPE)
    return Curriculum(processor, SCENES, load_examples(EXAMPLES), seed=3)


def test_what_samples_share() -> None:
    a, b = Sample((0, 3, 3, 7, 8, 9), 4, image=1), Sample((0, 3, 3, 7, 5, 9), 5, image=1)
    assert shared_length([a, b], image_token=3) == 3  # the loss of `a` begins at 4
    other = Sample(b.ids, b.start, image=2)
    assert shared_length([a, other], image_token=3) == 1  # another image stands there
    assert shared_length([b], image_token=3) == 4


def test_packing_changes_no_loss() -> None:
    processor = make_processor(phrases(), SHAPE)
    model = make_model(processor, SHAPE).bfloat16().float()
    model.set_attn_implementation("eager")
    tower = model.model.vision_tower.to(torch.bfloat16)
    features = image_features(model, pixels_of(SCENES, processor)).float()
    tower.float()
    curriculum = _curriculum()
    groups = [
        curriculum.captions(questions=3),
        curriculum.critiques(Layout.EXAMPLES_FIRST, examples=True, image=True, pairs=2),
        curriculum.critiques(Layout.IMAGE_FIRST, examples=True, image=True, pairs=1),
        curriculum.critiques(Layout.EXAMPLES_FIRST, examples=False, image=False, pairs=1),
    ]
    packed = language_loss(model, pack("all", groups, 3, 2), features)
    total, weight = 0.0, 0.0
    for sample in (sample for group in groups for sample in group):
        alone = language_loss(model, pack("one", [[sample]], 3, 2), features)
        tokens = sample.weight * (len(sample.ids) - sample.start)
        total, weight = total + float(alone.detach()) * tokens, weight + tokens
    torch.testing.assert_close(float(packed.detach()), total / weight, rtol=1e-5, atol=1e-5)


def test_a_sample_is_the_sequence_that_serving_reads() -> None:
    processor: Any = make_processor(phrases(), SHAPE)
    sample = _curriculum().captions(questions=0)[0]
    assert sample.image is not None
    tokenizer = processor.tokenizer
    start = sample.start
    asked = tokenizer.decode([i for i in sample.ids[:start] if i != processor.image_token_id])
    question = asked.removeprefix("<s>USER: \n").removesuffix(" ASSISTANT:")
    answer = tokenizer.decode(sample.ids[start:-1]).strip()
    assert sample.ids[-1] == tokenizer.eos_token_id
    text = join_response(render_prompt(processor, [image_part(b""), text_part(question)]), answer)
    image = render(SCENES[sample.image])
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == list(sample.ids[:-1])
    model = make_model(processor, SHAPE)
    with torch.no_grad():
        logits = model(**inputs).logits[0]
        bf16 = model.bfloat16()
        features = image_features(bf16, pixels_of([SCENES[sample.image]], processor))
        bf16.set_attn_implementation("eager")
        one = Sample(sample.ids, start, 0)
        ours = language_loss(bf16, pack("one", [[one]], 3, 2), features)
    theirs = cross_entropy(logits[start - 1 :], torch.tensor(sample.ids[start:]))
    torch.testing.assert_close(float(ours), float(theirs), rtol=2e-2, atol=2e-2)


def test_the_critic_prompt_costs_few_tokens() -> None:
    group = _curriculum().critiques(Layout.EXAMPLES_FIRST, examples=True, image=True, pairs=1)
    assert max(len(sample.ids) for sample in group) < 480
    assert Path(EXAMPLES).exists()

"""What the demo policy is taught: captions with habits, yes/no questions, balanced critiques."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import LlavaProcessor

from sima_ray.critic.prompt import CriticPrompt, Layout, WorkedExample
from sima_ray.demo.critique import write_critique, write_reason
from sima_ray.demo.language import NAMES, QUESTIONS, Caption, presence_question, write_caption
from sima_ray.demo.noise import habitual, perturbed
from sima_ray.demo.oracle import caption_errors
from sima_ray.demo.packing import Sample
from sima_ray.demo.scenes import Scene, scenes
from sima_ray.policy.chat import join_response, render_prompt
from sima_ray.policy.tiny import EOS, IMAGE
from sima_ray.ports import Part, image_part, text_part
from sima_ray.records import Choice

ERROR_COUNTS = (0, 1, 2, 3)
ERROR_WEIGHTS = (0.3, 0.35, 0.25, 0.1)
TIES = 0.06  # share of the training pairs; among the policy's own pairs about 7% are ties
POPE_WEIGHT = 3.0  # an answer is two tokens, a caption fifteen


@dataclass(frozen=True, slots=True)
class Pair:
    """Two captions of one scene, the second of which is not the first."""

    first: Caption
    second: Caption


def draw_pair(truth: Caption, rng: random.Random) -> Pair:
    """Two captions to compare, such that length tells nothing about which one is better.

    The better one is the shorter, the longer, or as long as the other, with one third each. Some
    are ties.
    """
    wanted = "tie" if rng.random() < TIES else rng.choice(("shorter", "longer", "equal"))
    for _ in range(200):
        pair = _any_pair(truth, rng)
        if pair.first != pair.second and relation(truth, pair) == wanted:
            break
    else:
        return draw_pair(truth, rng)
    return Pair(pair.second, pair.first) if rng.random() < 0.5 else pair


def relation(truth: Caption, pair: Pair) -> str:
    """The better caption's length beside the other's: "shorter", "longer", "equal"; or "tie"."""
    a, b = caption_errors(pair.first, truth), caption_errors(pair.second, truth)
    if a == b:
        return "tie"
    better, worse = (pair.first, pair.second) if a < b else (pair.second, pair.first)
    difference = len(better.entries) - len(worse.entries)
    return "equal" if difference == 0 else "longer" if difference > 0 else "shorter"


def _any_pair(truth: Caption, rng: random.Random) -> Pair:
    way = rng.random()
    if way < 0.4:
        return Pair(habitual(truth, rng, 0.5), habitual(truth, rng, 0.5))
    first = habitual(truth, rng, 0.5) if way < 0.6 else _perturbed(truth, rng)
    if way < 0.8:
        return Pair(first, perturbed(first, rng.choice((1, 1, 2)), rng))
    return Pair(first, _perturbed(truth, rng))


def _perturbed(truth: Caption, rng: random.Random) -> Caption:
    return perturbed(truth, rng.choices(ERROR_COUNTS, ERROR_WEIGHTS)[0], rng)


def right_choice(truth: Caption, pair: Pair) -> Choice:
    """The caption with fewer errors. A tie is given to the first.

    So a tie gets opposite verdicts in the two orders, which a run counts as no preference.
    """
    return 1 if caption_errors(pair.first, truth) <= caption_errors(pair.second, truth) else 2


class Curriculum:
    """Draws groups of samples that begin alike (see `packing`), all from one seed.

    Args:
        processor: Renders and tokenizes.
        seen: The scenes whose images may be shown; a sample's image is an index into them.
        examples: The worked examples that the demo's critic prompt has.
        seed: Of every draw.
    """

    def __init__(
        self,
        processor: LlavaProcessor,
        seen: Sequence[Scene],
        examples: Sequence[WorkedExample],
        seed: int,
    ) -> None:
        self._processor = processor
        self._seen = seen
        self._examples = tuple(examples)
        self._rng = random.Random(f"curriculum/{seed}")
        self._fresh: Iterator[Scene] = scenes("train", seed=seed + 1)

    def captions(self, questions: int) -> list[Sample]:
        """A caption with habits, and yes/no questions, about one image."""
        rng = self._rng
        image = rng.randrange(len(self._seen))
        truth = self._seen[image].truth
        said = write_caption(habitual(truth, rng))
        samples = [self._sample([_IMAGE, text_part(rng.choice(QUESTIONS))], said, image)]
        present = {entry.name for entry in truth.entries}
        for number in range(questions):
            absent = number % 2 == 1
            name = rng.choice([n for n in NAMES if (n not in present) == absent])
            asked = [_IMAGE, text_part(presence_question(name))]
            answer = "No" if absent else "Yes"
            samples.append(self._sample(asked, answer, image, POPE_WEIGHT))
        return samples

    def critiques(self, layout: Layout, examples: bool, image: bool, pairs: int) -> list[Sample]:
        """Pairs of captions of one scene, each judged in both orders."""
        rng = self._rng
        shown = rng.randrange(len(self._seen)) if image else None
        truth = (next(self._fresh) if shown is None else self._seen[shown]).truth
        prompt = CriticPrompt(layout, self._worked_examples() if examples else ())
        question = rng.choice(QUESTIONS)
        samples = []
        for _ in range(pairs):
            pair = draw_pair(truth, rng)
            for ordered in (pair, Pair(pair.second, pair.first)):
                texts = _texts(truth, ordered)
                content = prompt.content(None if shown is None else b"", question, *texts)
                answer = write_critique(*texts, right_choice(truth, ordered))
                samples.append(self._sample(content, answer, shown))
        return samples

    def _worked_examples(self) -> tuple[WorkedExample, ...]:
        """Mostly drawn fresh, so that the critic reads them as examples and not as facts."""
        if self._rng.random() < 0.3:
            return self._examples
        choices: list[Choice] = [1, 2]
        self._rng.shuffle(choices)
        return tuple(draw_example(choice, self._fresh, self._rng) for choice in choices)

    def _sample(
        self, content: list[Part], answer: str, image: int | None, weight: float = 1.0
    ) -> Sample:
        prompt = render_prompt(self._processor, content)
        whole = join_response(prompt, answer) + EOS
        tokenizer = self._processor.tokenizer
        ids, start = tokenizer(whole).input_ids, len(tokenizer(prompt).input_ids)
        return Sample(self._with_image(ids), start + self._extra(ids), image, weight)

    def _with_image(self, ids: list[int]) -> tuple[int, ...]:
        """Each image token as often as an image has tokens (a prompt has one image at most)."""
        token = self._processor.image_token_id
        if token not in ids:
            return tuple(ids)
        at = ids.index(token)
        return (*ids[:at], *([token] * (self._extra(ids) + 1)), *ids[at + 1 :])

    def _extra(self, ids: list[int]) -> int:
        processor = self._processor
        side = processor.image_processor.size["height"] // processor.patch_size
        return side * side - 1 if processor.image_token_id in ids else 0


_IMAGE = image_part(b"")  # the samples carry the image's index; no bytes are needed
assert IMAGE == "<image>"


def draw_example(choice: Choice, fresh: Iterator[Scene], rng: random.Random) -> WorkedExample:
    """A short worked example with this choice."""
    truth = next(scene.truth for scene in fresh if len(scene.truth.entries) <= 2)
    while True:
        pair = draw_pair(truth, rng)
        if relation(truth, pair) != "tie" and max(map(_length, (pair.first, pair.second))) <= 2:
            break
    if right_choice(truth, pair) != choice:
        pair = Pair(pair.second, pair.first)
    right, first, second = _texts(truth, pair)
    reason = write_reason(right, first, second)
    return WorkedExample(rng.choice(QUESTIONS), right, first, second, reason, choice)


def _texts(truth: Caption, pair: Pair) -> tuple[str, str, str]:
    return write_caption(truth), write_caption(pair.first), write_caption(pair.second)


def _length(caption: Caption) -> int:
    return len(caption.entries)

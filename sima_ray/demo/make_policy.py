"""Makes the demo's policy from its seed: `make policy`, or `python -m sima_ray.demo.make_policy`.

Three phases, each on one core, and each kept in the work folder: the command goes on where it was
stopped.

1. vision: the tower learns from dense labels what each patch shows;
2. compare, at the same time: the language model learns to compare texts, without images and worked
   examples;
3. joint: captions with habits, yes/no questions, and critiques with images and worked examples.

Then the figures of the checkpoint on the validation world are shown, and go to its `card.json`.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from sima_ray.critic.prompt import CriticPrompt, Layout, load_examples
from sima_ray.demo import evaluate, training
from sima_ray.demo.curriculum import Curriculum, Pair
from sima_ray.demo.language import QUESTIONS
from sima_ray.demo.packing import Batch, Sample, pack
from sima_ray.demo.scenes import Scene, crowded_scenes, render, scenes
from sima_ray.demo.tokenizer import phrases
from sima_ray.policy.tiny import TinyShape, make_model, make_processor, save_tiny_llava

ASSETS = Path(__file__).parent / "assets"
POLICY = ASSETS / "policy"
EXAMPLES = ASSETS / "critic_examples.yaml"
SHAPE = TinyShape(
    vision_width=160,
    vision_layers=4,
    text_width=160,
    text_layers=6,
    text_heads=5,
    max_positions=2048,
)
SCENES = 20_000
VISION_STEPS, COMPARE_STEPS, JOINT_STEPS = 1600, 1100, 900
# The comparing phase stops early: the joint phase goes on from a rate that is still high.
COMPARE_DECAY = 1500
COMPARE_RATE, JOINT_RATE = 2e-3, 1.5e-3


class Maker:
    """One run of the phases.

    Args:
        work: Where the phases are kept.
        seed: Of everything.
    """

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed = work, seed
        self.processor: LlavaProcessor = make_processor(phrases(), SHAPE)
        self.model: LlavaForConditionalGeneration = make_model(self.processor, SHAPE, seed)
        self.model.bfloat16().set_attn_implementation("eager")
        self.examples = load_examples(EXAMPLES)
        self.started = time.perf_counter()
        work.mkdir(parents=True, exist_ok=True)

    def log(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.started:5.0f}s] {text}", flush=True)

    def phase(self, name: str) -> float:
        """Run a phase and keep its weights, or load those that were kept; returns its seconds."""
        kept = self.work / f"{name}.pt"
        if kept.exists():
            saved = torch.load(kept)
            self.model.load_state_dict(saved["weights"])
            self.log(f"{name}: kept in {kept}")
            return saved["seconds"]
        {"vision": self.vision, "compare": self.compare, "joint": self.joint}[name]()
        seconds = round(time.perf_counter() - self.started, 1)
        torch.save({"weights": self.model.state_dict(), "seconds": seconds}, kept)
        return seconds

    def vision(self) -> None:
        crowded = list(islice(crowded_scenes(self.seed), SCENES))
        pixels = training.pixels_of(crowded, self.processor)
        labels = training.patch_labels(crowded, SHAPE.patch)
        training.train_vision(self.model, pixels, labels, VISION_STEPS, self.log, seed=self.seed)

    def compare(self) -> None:
        curriculum = Curriculum(self.processor, [], self.examples, self.seed)

        def batches() -> Iterator[list[Batch]]:
            while True:
                groups = [
                    curriculum.critiques(
                        Layout.EXAMPLES_FIRST, examples=False, image=False, pairs=1
                    )
                    for _ in range(24)
                ]
                yield [self._pack("compare", groups)]

        training.train_language(
            self.model,
            batches(),
            COMPARE_STEPS,
            self.log,
            COMPARE_RATE,
            decay_steps=COMPARE_DECAY,
            every=self._watch(CriticPrompt(Layout.EXAMPLES_FIRST, ()), with_images=False),
        )

    def joint(self) -> None:
        self._join("vision", "compare")
        seen = list(islice(scenes("train"), SCENES))
        features = self._features(seen)
        curriculum = Curriculum(self.processor, seen, self.examples, self.seed + 1)

        def batches() -> Iterator[list[Batch]]:
            step = 0
            while True:
                # One step in five reads the paper's layout; text alone keeps what was learnt.
                layout = Layout.IMAGE_FIRST if step % 5 == 4 else Layout.EXAMPLES_FIRST
                critiques = [
                    curriculum.critiques(layout, examples=True, image=True, pairs=2)
                    for _ in range(6)
                ]
                plain = [
                    curriculum.critiques(layout, examples=False, image=True, pairs=1)
                    for _ in range(4)
                ]
                captions = [curriculum.captions(questions=4) for _ in range(24)]
                yield [
                    self._pack("critique", critiques),
                    self._pack("plain", plain),
                    self._pack("caption", captions),
                ]
                step += 1

        training.train_language(
            self.model,
            batches(),
            JOINT_STEPS,
            self.log,
            JOINT_RATE,
            features,
            every=self._watch(CriticPrompt(Layout.EXAMPLES_FIRST, self.examples), with_images=True),
        )

    def _join(self, tower: str, language: str) -> None:
        """Take the vision tower from one phase and all the rest from the other."""
        weights = torch.load(self.work / f"{language}.pt")["weights"]
        seeing = torch.load(self.work / f"{tower}.pt")["weights"]
        weights |= {name: value for name, value in seeing.items() if "vision_tower" in name}
        self.model.load_state_dict(weights)

    def _features(self, seen: Sequence[Scene]) -> torch.Tensor:
        """The vision tower's features of scenes; it is not trained any more."""
        pixels = training.pixels_of(seen, self.processor)
        with torch.no_grad():
            parts = [training.image_features(self.model, part) for part in pixels.split(250)]
        return torch.cat(parts)

    def _pack(self, name: str, groups: Sequence[Sequence[Sample]]) -> Batch:
        tokenizer = self.processor.tokenizer
        return pack(name, groups, self.processor.image_token_id, tokenizer.pad_token_id)

    def _watch(self, prompt: CriticPrompt, with_images: bool) -> Any:
        """Logs free-running verdicts (and captions) on a few held-out scenes."""
        held = list(islice(scenes("validation", seed=1), 100))
        truths = [scene.truth for scene in held]
        pairs = evaluate.balanced_pairs(truths, self.seed)
        images = [render(scene) for scene in held] if with_images else None
        generator = evaluate.Generator(self.model, self.processor)

        def watch(step: int) -> None:
            verdicts = evaluate.judge(generator, prompt, QUESTIONS[0], truths, pairs, images)
            figures = evaluate.critic_figures(truths, pairs, verdicts)
            self.log(f"critic after {step}: {figures}")
            if images:
                greedy, _ = evaluate.candidates(generator, QUESTIONS[0], images)
                self.log(f"captions: {evaluate.caption_figures(greedy, truths)}")
                self.log(f"POPE: {evaluate.pope_accuracy(generator, held, ['random'])}")

        return watch


def figures_of(folder: Path, count: int = 500) -> dict[str, Any]:
    """The figures of a checkpoint on the validation world, through its saved files."""
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    model.set_attn_implementation("eager")
    generator = evaluate.Generator(model, processor)
    held = list(islice(scenes("validation"), count))
    truths, images = [scene.truth for scene in held], [render(scene) for scene in held]
    greedy, sampled = evaluate.candidates(generator, QUESTIONS[0], images)
    figures: dict[str, Any] = {
        "scenes": count,
        "greedy": evaluate.caption_figures(greedy, truths),
        "sampled": evaluate.caption_figures(sampled, truths),
        "pope": evaluate.pope_accuracy(generator, held),
    }
    own = [(t, Pair(g, s), i) for t, g, s, i in zip(truths, greedy, sampled, images, strict=True)]
    own = [row for row in own if row[1].first != row[1].second]
    drawn = list(zip(truths, evaluate.balanced_pairs(truths, 0), images, strict=True))
    for layout in (Layout.EXAMPLES_FIRST, Layout.IMAGE_FIRST):
        prompt = CriticPrompt(layout, load_examples(EXAMPLES))
        for name, rows in (("own", own), ("drawn", drawn[:300])):
            if not rows:
                continue
            right, pairs = [row[0] for row in rows], [row[1] for row in rows]
            shown = [row[2] for row in rows]
            verdicts = evaluate.judge(generator, prompt, QUESTIONS[0], right, pairs, shown)
            figures[f"critic_{layout}_{name}"] = evaluate.critic_figures(right, pairs, verdicts)
    return figures


def run_phase(name: str, work: Path, seed: int) -> float:
    """Run one phase in this process, on one core; returns its seconds."""
    torch.set_num_threads(1)
    return Maker(work, seed).phase(name)


def shown(card: dict[str, Any]) -> str:
    """The figures of a card, a line each."""
    figures = card["validation"]
    greedy = figures["greedy"]
    lines = [
        f"on {figures['scenes']} scenes of the validation world:",
        f"  captions   CHAIR_s {greedy['chair_s']:.3f}, recall {greedy['recall']:.3f},"
        f" errors {greedy['errors']:.2f}, objects {greedy['objects']:.2f}",
        "  POPE       " + ", ".join(f"{kind} {x:.3f}" for kind, x in figures["pope"].items()),
    ]
    for layout in Layout:
        critic = figures[f"critic_{layout}_own"]
        right = ", ".join(f"{k} {a:.3f} {b:.3f}" for k, (a, b) in critic["accuracy"].items())
        lines += [
            f"  critic     of its own pairs, {layout}; right in each order: {right}",
            f"             consistent {critic['consistent']:.3f},"
            f" unparseable {critic['unparseable']:.3f}",
        ]
    return "\n".join([*lines, f"took {card['seconds']['total'] / 60:.0f} min on two cores"])


def main() -> None:
    """Train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=POLICY, help="the checkpoint's folder")
    parser.add_argument("--work", type=Path, default=Path("runs/policy"), help="phases, kept")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        running = {
            name: pool.submit(run_phase, name, chosen.work, chosen.seed)
            for name in ("vision", "compare")
        }
        seconds = {name: future.result() for name, future in running.items()}
    torch.set_num_threads(1)
    maker = Maker(chosen.work, chosen.seed)
    seconds["joint"] = maker.phase("joint")
    save_tiny_llava(maker.model, maker.processor, chosen.out)
    card: dict[str, Any] = {"seed": chosen.seed, "shape": asdict(SHAPE), "seconds": seconds}
    started = time.perf_counter()
    card["validation"] = figures_of(chosen.out)
    seconds["measure"] = round(time.perf_counter() - started, 1)
    # Not this command's own wall time: it may have gone on with phases that were kept.
    side_by_side = max(seconds["vision"], seconds["compare"])
    seconds["total"] = round(side_by_side + seconds["joint"] + seconds["measure"], 1)
    (chosen.out / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    print(shown(card))


if __name__ == "__main__":
    main()

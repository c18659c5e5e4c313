"""How the demo's policy is made from its seed: three phases, and what the result is held to.

1. vision: the tower learns from dense labels what each patch shows;
2. compare, at the same time: the language model learns to compare texts, without images and worked
   examples;
3. joint: captions with habits, yes/no questions, and critiques with images and worked examples.
"""

import hashlib
import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
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
from sima_ray.errors import ConfigError
from sima_ray.policy.checkpoint import fingerprint
from sima_ray.policy.tiny import TinyShape, make_model, make_processor, save_tiny_llava

HERE = Path(__file__).parent
POLICY = HERE / "assets" / "policy"
EXAMPLES = HERE / "assets" / "critic_examples.yaml"
RECIPE = (
    *("critique.py", "curriculum.py", "language.py", "maker.py", "noise.py", "oracle.py"),
    *("packing.py", "scenes.py", "tokenizer.py", "training.py", "assets/critic_examples.yaml"),
    *("../policy/tiny.py", "../critic/prompt.py", "../critic/templates/case.j2"),
    *("../critic/templates/criteria.j2", "../critic/templates/example.j2"),
)
"""What decides, beside the seed and the installed packages, which policy comes out."""
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


def recipe(seed: int) -> str:
    """A short name of all that decides which policy comes out."""
    digest = hashlib.sha256(f"{seed}".encode())
    for name in RECIPE:
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()[:16]


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
        """A line with the seconds since the phase began."""
        print(f"[{time.perf_counter() - self.started:5.0f}s] {text}", flush=True)

    def phase(self, name: str) -> float:
        """Run a phase and keep its weights, or load those that were kept; returns its seconds.

        Raises:
            ConfigError: The kept ones were made with another seed or other code.
        """
        kept, made_by = self.work / f"{name}.pt", recipe(self.seed)
        if kept.exists():
            saved = torch.load(kept)
            if saved["recipe"] != made_by:
                raise ConfigError(
                    f"{kept}: made with another seed or by other code: remove {self.work}, "
                    "or give another --work"
                )
            self.model.load_state_dict(saved["weights"])
            self.log(f"{name}: kept in {kept}")
            return saved["seconds"]
        {"vision": self.vision, "compare": self.compare, "joint": self.joint}[name]()
        seconds = round(time.perf_counter() - self.started, 1)
        saved = {"recipe": made_by, "weights": self.model.state_dict(), "seconds": seconds}
        torch.save(saved, kept.with_suffix(".part"))
        kept.with_suffix(".part").rename(kept)
        return seconds

    def vision(self) -> None:
        """Train the tower on crowded scenes."""
        crowded = list(islice(crowded_scenes(self.seed), SCENES))
        pixels = training.pixels_of(crowded, self.processor)
        labels = training.patch_labels(crowded, SHAPE.patch)
        training.train_vision(self.model, pixels, labels, VISION_STEPS, self.log, seed=self.seed)

    def compare(self) -> None:
        """Train the language model on critiques without images and examples."""
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
        """Train the language model and the projector on all that the policy does."""
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


def make(work: Path, seed: int) -> tuple[Path, dict[str, Any]]:
    """Run all phases and measure the result; goes on after the last phase that had finished.

    Returns:
        The checkpoint's folder, within `work`, and its card.

    Raises:
        ConfigError: `work` holds phases made with another seed or by other code.
    """
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), _die_silently) as pool:
        running = {n: pool.submit(run_phase, n, work, seed) for n in ("vision", "compare")}
        seconds = {name: future.result() for name, future in running.items()}
    torch.set_num_threads(1)
    maker = Maker(work, seed)
    seconds["joint"] = maker.phase("joint")
    folder = work / "checkpoint"
    save_tiny_llava(maker.model, maker.processor, folder)
    started = time.perf_counter()
    figures = figures_of(folder)
    seconds["measure"] = round(time.perf_counter() - started, 1)
    # Not this command's own wall time: it may have gone on with phases that were kept.
    side_by_side = max(seconds["vision"], seconds["compare"])
    seconds["total"] = round(side_by_side + seconds["joint"] + seconds["measure"], 1)
    card: dict[str, Any] = {"seed": seed, "shape": asdict(SHAPE), "seconds": seconds}
    return folder, card | {"fingerprint": fingerprint(folder), "validation": figures}


def run_phase(name: str, work: Path, seed: int) -> float:
    """Run one phase in this process, on one core; returns its seconds."""
    torch.set_num_threads(1)
    return Maker(work, seed).phase(name)


def _die_silently() -> None:
    """Let Ctrl-C end a worker without a traceback of its own."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of what a checkpoint is held to; `least` and `most` are inclusive."""

    what: str
    value: float
    least: float = 0.0
    most: float = 1.0

    @property
    def holds(self) -> bool:
        """Whether the value is within the bounds."""
        return self.least <= self.value <= self.most

    def __str__(self) -> str:
        must = f"≥ {self.least:.2f}" if self.most == 1 else f"{self.least:.2f} … {self.most:.2f}"
        return f"{self.what:<52} {must:<12} {self.value:.3f}  {'yes' if self.holds else 'NO'}"


def gate(card: dict[str, Any]) -> list[Line]:
    """What a card's figures must be."""
    figures = card["validation"]
    lines = [
        Line("captions, CHAIR_s", figures["greedy"]["chair_s"], 0.4, 0.7),
        Line("captions, recall", figures["greedy"]["recall"], 0.8),
    ]
    lines += [Line(f"POPE, {kind}", value, 0.8) for kind, value in figures["pope"].items()]
    for layout in Layout:
        critic = figures[f"critic_{layout}_own"]
        for name, least in (("all", 0.8), ("equal", 0.75), ("longer", 0.75)):
            pairs = {"all": "own pairs", "equal": "equal lengths", "longer": "the longer is better"}
            for order, value in zip(("12", "21"), critic["accuracy"][name], strict=True):
                lines.append(Line(f"critic, {layout}, {pairs[name]}, {order}", value, least))
        lines.append(Line(f"critic, {layout}, consistent", critic["consistent"], 0.8))
        lines.append(Line(f"critic, {layout}, parseable", 1 - critic["unparseable"], 0.99))
    return lines

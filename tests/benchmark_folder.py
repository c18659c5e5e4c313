"""All benchmarks in small, in their published formats, and a policy that answers them from a table."""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from sima_ray.config import RunConfig
from sima_ray.ports import Completion, CompletionRequest, Policy

KINDS = ("attribute", "counting", "holistic", "other")
DAILY = [("rw_1.png", "A dog barks at a toy."), ("rw_2.png", "A man runs and jumps.")]
AMBER_QUESTIONS = [
    (1005, "discriminative-attribute-state", "yes", "attribute", "Is the sky sunny?"),
    (8633, "discriminative-hallucination", "no", "existence", "Is there a cloud in this image?"),
    (13557, "discriminative-relation", "yes", "relation", "Is there direct contact?"),
]


def picture(path: Path | None = None) -> bytes:
    """A small image, written where a path is given."""
    data = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(data, "PNG")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.getvalue())
    return data.getvalue()


def build(root: Path, judge_url: str) -> RunConfig:
    """Write the files, and return a run's config that names them."""
    _amber(root / "amber")
    _coco(root / "coco")
    for number in range(len(KINDS)):
        picture(root / "mmhal" / "images" / f"{number}_o.png")
    _write_json(
        root / "mmhal" / "response_template.json",
        [
            {
                "question_type": kind,
                "question_topic": "outdoor",
                "image_id": f"id{number}",
                "image_src": f"https://farm.example.org/{number}_o.png",
                "image_content": ["Tree"],
                "question": f"What about case {number}?",
                "gt_answer": "A tree.",
                "model_answer": "",
            }
            for number, kind in enumerate(KINDS)
        ],
    )
    lines = "".join(f'{name},"{text}"\n' for name, text in DAILY)
    (root / "mementos").mkdir()
    (root / "mementos" / "dl_description.csv").write_text(f"image_name,description\n{lines}")
    for name, _ in DAILY:
        picture(root / "mementos" / "images" / name)
    return RunConfig.parse(_settings(root, judge_url))


def _settings(root: Path, judge_url: str) -> dict[str, Any]:
    return {
        "name": "bench",
        "runs": str(root / "runs"),
        "data": {"prompts": "p.jsonl", "images": "i"},
        "policy": {"model": "m"},
        "evaluation": {
            "images": str(root / "coco" / "images"),
            "pope": [str(root / "coco" / "coco_pope_random.json")],
            "amber": {"data": str(root / "amber"), "images": str(root / "amber" / "image")},
            "halbench": {
                "questions": str(root / "coco" / "halbench.jsonl"),
                "instances": str(root / "coco" / "instances.json"),
            },
            "mmhal": {
                "questions": str(root / "mmhal" / "response_template.json"),
                "images": str(root / "mmhal" / "images"),
            },
            "mementos": {
                "descriptions": [str(root / "mementos" / "dl_description.csv")],
                "images": str(root / "mementos" / "images"),
            },
            "judge": {
                "base_url": judge_url,
                "model": "judge-1",
                "key_env": "JUDGE_KEY",
                "attempts": 2,
                "first_wait_s": 0.01,
                "price_in": 1.0,
                "price_out": 2.0,
            },
            "bootstrap_samples": 100,
        },
    }


def _amber(folder: Path) -> None:
    relation = {"sky": [], "person": ["man", "people"], "cloud": [], "bird": []}
    _write_json(folder / "relation.json", relation)
    (folder / "safe_words.txt").write_text("orange\nlight")
    annotations: list[dict[str, Any]] = [
        {"id": 1, "type": "generative", "truth": ["sky", "person"], "hallu": ["cloud"]}
    ]
    queries: dict[str, list[dict[str, Any]]] = {
        "generative": [{"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."}]
    }
    for number, kind, truth, part, text in AMBER_QUESTIONS:
        annotations.append({"id": number, "type": kind, "truth": truth})
        query = {"id": number, "image": "AMBER_1.jpg", "query": text}
        queries.setdefault(f"discriminative-{part}", []).append(query)
    _write_json(folder / "annotations.json", annotations)
    for part, rows in queries.items():
        _write_json(folder / "query" / f"query_{part}.json", rows)
    picture(folder / "image" / "AMBER_1.jpg")


def _coco(folder: Path) -> None:
    names = [f"COCO_val2014_{number:012d}.jpg" for number in (9, 25)]
    for name in names:
        picture(folder / "images" / name)
    _write_json(
        folder / "instances.json",
        {
            "images": [
                {"id": n, "file_name": name} for n, name in zip((9, 25), names, strict=True)
            ],
            "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
            "annotations": [
                {"image_id": 9, "category_id": 18},
                {"image_id": 25, "category_id": 1},
            ],
        },
    )
    questions = [
        {"question_id": n, "image": names[0], "text": f"Is there a {thing}?", "label": label}
        for n, thing, label in ((1, "dog", "yes"), (2, "cat", "no"))
    ]
    (folder / "coco_pope_random.json").write_text("".join(json.dumps(q) + "\n" for q in questions))
    encoded = base64.b64encode(picture()).decode()
    rows = [
        {"org_idx": k, "image_id": n, "question": f"Tell all of {n}.", "image": encoded}
        for k, n in enumerate((9, 25))
    ]
    (folder / "halbench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


@dataclass
class TableService(Policy):
    """A policy service in this process: an answer by question and round.

    Attributes:
        answer: What the policy after a round says to a text; None fails for good.
        asked: Every question, with the round.
        round: The round whose policy answers.
    """

    answer: Callable[[int, str], str | None]
    asked: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    round: int | None = None

    def ensure(self, number: int) -> None:
        self.round = number

    def connect(self) -> Callable[[], Policy]:
        return lambda: self

    async def complete(self, request: CompletionRequest) -> Completion:
        text = next(part["text"] for part in request["content"] if "text" in part)
        assert any("image" in part for part in request["content"]) and self.round is not None
        self.asked.append((self.round, text))
        answer = self.answer(self.round, text)
        return {"error": "too long"} if answer is None else {"text": answer}

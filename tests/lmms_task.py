"""lmms-eval in the tests: where its environment is, and a small task of our own."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

PYTHON = Path(__file__).parents[1] / ".venv-lmms" / "bin" / "python"

needs_lmms_eval = pytest.mark.skipif(
    not PYTHON.exists(), reason="lmms-eval's environment is missing: make lmms-setup"
)

CODE = """
from PIL import Image

def picture(doc):
    return [Image.open(doc["picture"]).convert("RGB")]

def process(doc, results):
    said, true = (set(text.lower().strip(".").split()) for text in (results[0], doc["answer"]))
    return {"named": len(said & true) / len(true), "exact": {"score": float(said == true)}}

def percent(rows):
    return 100 * sum(row["score"] for row in rows) / len(rows)
"""

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function {name}_code.picture
doc_to_text: "question"
doc_to_target: "answer"
generation_kwargs: {{max_new_tokens: 96, temperature: 0}}
process_results: !function {name}_code.process
metric_list:
  - {{metric: named, aggregation: mean, higher_is_better: true}}
  - {{metric: exact, aggregation: !function {name}_code.percent, higher_is_better: true}}
"""


def write_task(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """A task as lmms-eval reads one, over rows of picture (a path), question and answer."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}_code.py").write_text(CODE)
    (folder / f"{name}.yaml").write_text(textwrap.dedent(TASK.format(name=name, data=data)))

"""When figures of lmms-eval are there already, and when they are of another judge, environment or policy."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from sima_ray.config import RunConfig
from sima_ray.config.lmms import LmmsEval
from sima_ray.errors import ConfigError, ServiceError
from sima_ray.runtime import lmms_eval
from sima_ray.runtime.lmms_eval import run_lmms_eval
from sima_ray.runtime.lmms_identity import JUDGE, environment, identity, variables
from sima_ray.runtime.lmms_table import Asked
from sima_ray.runtime.progress import Progress
from sima_ray.runtime.run import Run

URL = "https://user:hunter2@judge.example.org/v1"


@pytest.fixture(autouse=True)
def _no_judge_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in JUDGE:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose policies are there, before and after; by their files alone."""
    for folder in (tmp_path / "model", tmp_path / "r" / "round-1" / "policy"):
        folder.mkdir(parents=True)
        for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
            (folder / name).write_text("{}")
        (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    values = {
        **{"name": "r", "runs": str(tmp_path), "policy": {"model": str(tmp_path / "model")}},
        "data": {"prompts": "p.jsonl", "images": "i"},
    }
    return Run.open(RunConfig.parse(values), Progress(io.StringIO()))


def asked(**changes: Any) -> LmmsEval:
    values = {"tasks": ["mmvet", "mme"], "rounds": [0, 1], "requirements": "lmms_eval==0.7.3\n"}
    return LmmsEval.model_validate(values | {"samples": 100} | changes)


def keep(run: Run, settings: LmmsEval) -> None:
    """What an evaluation of every task and round leaves."""
    for number in settings.rounds:
        for task in settings.tasks:
            folder = (f"round-{number}", "lmms-eval", task)
            run.folder.write_json({"results": {task: {"m,none": 1.0}}}, *folder, "results.json")
            run.folder.write_text('{"doc_id": 0, "m": 1.0}\n', *folder, f"samples_{task}.jsonl")
            run.folder.write_json(
                {"settings": identity(run, settings, number, task)}, *folder, "done.json"
            )


def left(run: Run, settings: LmmsEval, monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """What would be evaluated."""
    seen: list[Asked] = []

    def evaluate(run: Run, settings: LmmsEval, waiting: dict[Asked, Any]) -> dict[Asked, str]:
        seen.extend(waiting)
        return dict.fromkeys(waiting, "not here")

    with monkeypatch.context() as patch:
        patch.setattr(lmms_eval, "_evaluate", evaluate)
        try:
            run_lmms_eval(run, settings)
        except ServiceError:
            assert seen
    return seen


def test_figures_of_another_judge_are_not_reused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_URL", "https://one.example.org/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "first")
    settings = asked(variables=["OPENAI_API_KEY", "OPENAI_API_URL"])
    keep(run, settings)
    assert left(run, settings, monkeypatch) == []
    monkeypatch.setenv("OPENAI_API_KEY", "second")  # another key is no other judge
    assert left(run, settings, monkeypatch) == []
    # Another judge is, also where the head node has it and nobody names it; only for tasks that have one.
    judged = [(0, "mmvet"), (1, "mmvet")]
    assert left(run, asked(variables=["MODEL_VERSION=gpt-5"]), monkeypatch) == judged
    monkeypatch.setenv("OPENAI_API_URL", "https://two.example.org/v1")
    assert left(run, settings, monkeypatch) == judged
    assert left(run, asked(), monkeypatch) == judged


def test_figures_of_another_environment_are_not_reused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(run, asked())
    words = asked(requirements="# in other words\nlmms_eval==0.7.3  # this one\n\n")
    assert left(run, words, monkeypatch) == []
    newer = asked(requirements="lmms_eval==0.8.0\n")
    assert len(left(run, newer, monkeypatch)) == 4
    assert len(left(run, asked(variables=["NUM_IMAGE=2"]), monkeypatch)) == 4


def test_figures_of_other_task_files_are_not_reused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tmp_path / "tasks"
    (tasks / "deep").mkdir(parents=True)
    (tasks / "mine.yaml").write_text("task: mine")
    settings = asked(tasks=["mine"], include_path=str(tasks))
    keep(run, settings)
    (tasks / "data.jsonl").write_text("{}")
    assert left(run, settings, monkeypatch) == []
    for name in ("mine.yaml", "deep/code.py", "_default_template_yaml"):
        (tasks / name).write_text("# another")
        assert left(run, settings, monkeypatch) == [(0, "mine"), (1, "mine")], name
        keep(run, settings)
        assert left(run, settings, monkeypatch) == []
    (tasks / "deep" / "code.py").rename(tasks / "deep" / "renamed.py")
    assert len(left(run, settings, monkeypatch)) == 2


def test_no_value_is_kept_in_clear() -> None:
    settings = asked(variables=["OPENAI_API_KEY", "HF_TOKEN", "OPENAI_API_URL"])
    ours = {"OPENAI_API_KEY": "sk-secret", "HF_TOKEN": "hf-secret", "OPENAI_API_URL": URL}
    found = variables(settings, "mmvet", ours | {"MODEL_VERSION": "gpt-5"})
    assert found.keys() == {"OPENAI_API_URL", "MODEL_VERSION"}
    assert not [word for word in ("secret", "hunter2", "gpt-5") if word in json.dumps(found)]
    assert variables(settings, "mme", ours) == {}


def test_a_broken_result_is_evaluated_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(run, asked())
    run.folder.write_text("", "round-1", "lmms-eval", "mme", "samples_mme.jsonl")
    assert left(run, asked(), monkeypatch) == [(1, "mme")]


class Evaluator:
    """In the place of lmms-eval's process: as many questions as there are now, after `before` was called."""

    def __init__(
        self, run: Run, questions: dict[int, int], before: Callable[[int], object]
    ) -> None:
        self.run, self.questions, self.before = run, questions, before
        self.orders: list[Asked] = []

    def order(self, order: dict[str, Any], show: Any = None) -> str | None:
        if "check" in order:
            return None
        number = next(k for k in self.questions if self.run.version(k) == order["version"])
        self.orders.append((number, order["task"]))
        self.before(number)
        results = {"results": {order["task"]: {"m,none": 1.0}}}
        samples = [{"doc_id": n, "m": 1.0} for n in range(self.questions[number])]
        folder = Path(order["output"])
        (folder / "0_results.json").write_text(json.dumps(results))
        (folder / f"0_samples_{order['task']}.jsonl").write_text(
            "\n".join(map(json.dumps, samples))
        )


@pytest.fixture
def evaluator(run: Run, monkeypatch: pytest.MonkeyPatch) -> Evaluator:
    """Evaluations without a cluster."""
    found = Evaluator(run, {0: 2, 1: 2, 2: 2}, lambda number: None)
    monkeypatch.setattr(lmms_eval, "PolicyService", MagicMock())
    monkeypatch.setattr(lmms_eval, "LmmsProcess", lambda *_: nullcontext(found))
    monkeypatch.setattr(lmms_eval, "prepare", lambda *_: "python")
    monkeypatch.setattr(lmms_eval, "_open_door", lambda *_: "http://127.0.0.1/v1")
    monkeypatch.setattr(lmms_eval, "remove", lambda _: None)
    return found


def test_figures_are_those_of_the_weights_that_were_there_at_the_beginning(
    run: Run, evaluator: Evaluator
) -> None:
    """A round that is made anew meanwhile is evaluated again, by the same command."""
    settings = asked(tasks=["mme"])
    first = identity(run, settings, 1, "mme")
    evaluator.before = lambda number: Path(run.policy(1), "config.json").write_text('{"new": 1}')
    run_lmms_eval(run, settings)
    assert run.folder.read_json("round-1", "lmms-eval", "mme", "done.json")["settings"] == first
    assert first != identity(run, settings, 1, "mme")
    run_lmms_eval(run, settings)
    assert evaluator.orders == [(0, "mme"), (1, "mme"), (1, "mme")]


def test_what_is_wrong_with_an_environment_is_said_before_anything_is_evaluated(
    run: Run, evaluator: Evaluator, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="cannot be run on the head node"):
        run_lmms_eval(run, asked(python=str(tmp_path / "nowhere")))
    assert evaluator.orders == []


def test_rounds_that_were_asked_other_questions_are_asked_anew(
    run: Run, evaluator: Evaluator
) -> None:
    """By the same command, as it says; a task whose rounds are a pair is left as it is."""
    shutil.copytree(run.policy(1), run.policy(2))
    Path(run.policy(2), "config.json").write_text('{"round": 2}')
    settings = asked(tasks=["mme"])
    run_lmms_eval(run, settings)
    evaluator.questions = {0: 3, 1: 3, 2: 3}  # its data has grown
    settings = asked(tasks=["mme", "mmvet"], rounds=[0, 1, 2])
    with pytest.raises(ServiceError, match=r"1 of 6 .* failed or has no pair, and nothing else"):
        run_lmms_eval(run, settings)
    said = run.folder.read_text("lmms-eval.md")
    assert "mme, round 2: the two policies were not asked the same questions (2 and 3)" in said
    evaluator.orders.clear()
    assert len(run_lmms_eval(run, settings).rows[2]) == 2
    assert evaluator.orders == [(0, "mme"), (1, "mme"), (2, "mme")]
    evaluator.orders.clear()
    run_lmms_eval(run, settings)
    assert evaluator.orders == []


def test_a_named_environment_is_known_by_what_it_has(tmp_path: Path) -> None:
    found: list[str] = []
    for version in ("0.7.3", "0.8.0"):
        python = tmp_path / f"python-{version}"
        python.write_text(f"#!/bin/sh\necho lmms_eval=={version}\n")
        python.chmod(0o755)
        found.append(environment(asked(python=str(python))))
    assert found[0] != found[1]
    with pytest.raises(ConfigError, match=r"has no lmms-eval \(.*PackageNotFoundError.*lmms_eval"):
        environment(asked(python=sys.executable))
    with pytest.raises(ConfigError, match="nowhere: cannot be run on the head node"):
        environment(asked(python=str(tmp_path / "nowhere")))

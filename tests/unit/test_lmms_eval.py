"""lmms-eval's results into a paired table, its process as we see it, and the command line."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sima_ray.cli import app
from sima_ray.config.lmms import LmmsEval
from sima_ray.errors import ClusterError, ConfigError, DataError
from sima_ray.metrics.benchmarks import TaskResult, compare_task
from sima_ray.runtime import lmms_environment
from sima_ray.runtime.lmms_environment import prepare
from sima_ray.runtime.lmms_process import LmmsProcess, bar_of, environment
from sima_ray.runtime.lmms_table import compare, markdown, plain, to_json

DRAWS: Any = {"samples": 400, "confidence": 0.95, "seed": 0}


def result(task: str, figures: dict[str, float], rows: list[dict[str, Any]]) -> TaskResult:
    """As lmms-eval's files have it."""
    values = {f"{name},none": value for name, value in figures.items()}
    noise = {"alias": task, "stderr_of_none": 3, "submission,none": None}
    stderr = {f"{name}_stderr,none": 0.1 for name in figures}
    samples = [
        {"doc_id": n, "input": f"q{n}", "target": "", "filtered_resps": "yes"} | row
        for n, row in enumerate(rows)
    ]
    better = {task: dict.fromkeys(figures, True)}
    return TaskResult.of(
        task,
        {"results": {task: values | noise | stderr}, "higher_is_better": better},
        samples[::-1],
    )


def mme(scores: list[tuple[str, int, float, float]]) -> TaskResult:
    """MME of images (category, id, score of either question), by its own rule."""
    points: dict[str, list[float]] = {}
    rows: list[dict[str, Any]] = []
    for category, image, *two in scores:
        points.setdefault(category, []).append(100 * (sum(two) / 2 + (sum(two) == 2)))
        rows += [
            {"mme": {"category": category, "question_id": f"{image}", "score": one}} for one in two
        ]
    return result("mme", {"mme": sum(sum(v) / len(v) for v in points.values())}, rows)


def numbers(values: list[float]) -> TaskResult:
    return result("t", {"m": sum(values) / len(values)}, [{"m": value} for value in values])


def letters(chosen: str) -> TaskResult:
    rows = [{"m": {"pred": one, "answer": "A", "question_id": 1}} for one in chosen]
    return result("t", {"m": chosen.lower().count("a") / len(chosen)}, rows)


def judged(pairs: list[list[float]]) -> TaskResult:
    counted = [pair for pair in pairs if -999 not in pair]
    share = 100 * sum(pair[1] for pair in counted) / sum(pair[0] for pair in counted)
    rows = [{"m": {"scores": pair, "eval_model": "gpt"}} for pair in pairs]
    return result("t", {"m": round(share, 1)}, rows)


def said(answers: str) -> TaskResult:
    """POPE's figures of yes (y), no (n) and other answers (?) to two questions each: yes, no."""
    words = {"y": "yes", "n": "no", "?": "perhaps"}
    rows = [(words[one], truth) for one, truth in zip(answers, "yn" * len(answers), strict=False)]
    pairs = [(said, {"y": "yes", "n": "no"}[truth]) for said, truth in rows]
    hits, wrong = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    missed = pairs.count(("no", "yes"))
    figures = {
        "accuracy": sum(said == truth for said, truth in pairs) / len(pairs),
        "precision": hits / (hits + wrong),
        "recall": hits / (hits + missed),
        "f1_score": 2 * hits / (2 * hits + wrong + missed),
    }
    values = [
        {"prediction": said, "ground_truth": truth, "score": float(said == truth)}
        for said, truth in pairs
    ]
    return result("t", figures, [dict.fromkeys(figures, value) for value in values])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (numbers([0, 1, 0, 0.5]), numbers([1, 1, 0, 0.5])),
        (letters("ABCA"), letters("aAxA")),
        (judged([[8, 4], [-999, -999], [9, 7]]), judged([[8, 6], [-999, -999], [7, 7]])),
        (said("ynyn?y?n"), said("ynynyyyn")),
        (
            mme([("count", 1, 1, 1), ("count", 2, 1, 0), ("OCR", 1, 0, 0), ("OCR", 2, 1, 1)]),
            mme([("count", 1, 1, 1), ("count", 2, 1, 1), ("OCR", 1, 0, 1), ("OCR", 2, 1, 1)]),
        ),
    ],
    ids=["numbers", "letters", "judged", "yes or no", "mme"],
)
def test_every_known_form_has_an_interval(before: TaskResult, after: TaskResult) -> None:
    rows = compare_task(before, after, **DRAWS)
    assert {row.metric for row in rows} == set(before.metrics)
    for row in rows:
        assert (row.before, row.after) == (before.metrics[row.metric], after.metrics[row.metric])
        assert row.interval is not None, row
        low, high = row.interval
        assert low - 0.06 <= row.change <= high + 0.06
        assert low >= -1e-9  # nothing got worse on any question
        same = compare_task(before, before, **DRAWS)
        assert all(one.interval == (0, 0) and one.change == 0 for one in same)


def test_the_interval_is_of_the_pairs() -> None:
    """Two policies that differ on few of many questions: far narrower than of two independent means."""
    draw = random.Random(1)
    one = [float(draw.random() < 0.5) for _ in range(400)]
    other = [1.0 if n < 20 else value for n, value in enumerate(one)]
    [row] = compare_task(numbers(one), numbers(other), **DRAWS)
    assert row.interval is not None and row.n == 400
    assert row.interval[1] - row.interval[0] < 0.05  # independent: about 0.14


def test_a_figure_that_the_samples_do_not_give_has_no_interval() -> None:
    rows = [{"m": {"score": 1.0}}, {"m": {"score": 0.0}}]
    before, after = result("t", {"m": 0.7}, rows), result("t", {"m": 0.8}, rows)
    [row] = compare_task(before, after, **DRAWS)
    assert (row.interval, row.change) == (None, pytest.approx(0.1))
    assert " – |" in markdown(
        compare(SETTINGS, {(0, "t"): {"t": before}, (1, "t"): {"t": after}}, {}, 0), SETTINGS, "r"
    )


SETTINGS = LmmsEval(tasks=["t", "u"], rounds=[0, 1], samples=200)
FAILED = "[LMMS_EVAL_REQUEST_FAILED after 5 retries] Error code: 413"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"filtered_resps": FAILED, "m": 0.0}, "1 of 3 requests failed"),
        ({"filtered_resps": [FAILED], "m": 0.0}, "1 of 3 requests failed"),
        (
            {"m": {"scores": [-1, -1], "eval_model": "gpt"}, "k": {"scores": [-999, -999]}},
            "1 of 3 judgements failed",
        ),
        ({"m": {"score": 0.0, "eval_model": ""}}, "1 of 3 judgements failed"),
    ],
)
def test_what_failed_is_named_and_not_scored(row: dict[str, Any], reason: str) -> None:
    good = result("t", {"m": 1.0}, [{"m": 1.0}] * 3)
    bad = result("t", {"m": 2 / 3}, [{"m": 1.0}, {"m": 1.0}, row])
    assert (good.problem, bad.problem) == (None, reason)
    other = result("u", {"m": 1.0}, [{"m": 1.0}] * 3)
    sides = {(0, "t"): {"t": good}, (1, "t"): {"t": bad}, (0, "u"): {"u": other}}
    found = compare(SETTINGS, sides, {(1, "u"): "gone"}, seed=0)
    assert found.problems == {(1, "u"): "gone", (1, "t"): reason} and found.rows == {1: []}
    page = markdown(found, SETTINGS, "run")
    assert f"Not scored: t, round 1: {reason}." in page and "0.667" not in page
    assert f"not scored: t, round 1: {reason}" in plain(found, SETTINGS)
    assert to_json(found, SETTINGS)["problems"][1] == {"task": "t", "round": 1, "reason": reason}


def test_a_judge_that_writes_no_score_is_no_zero() -> None:
    results = {"results": {"mmvet": {"gpt_eval_score,none": 40.0}}, "unscored": 2}
    rows = [{"doc_id": n, "gpt_eval_score": {"score": 0.4, "eval_model": "gpt"}} for n in range(5)]
    assert TaskResult.of("mmvet", results, rows).problem == "2 of 5 judgements failed"
    assert TaskResult.of("mmvet", results | {"unscored": 0}, rows).problem is None


def test_other_questions_leave_the_rest_of_the_table() -> None:
    sides = {
        (0, "t"): {"t": numbers([1, 0])},
        (1, "t"): {"t": numbers([1, 0, 0])},
        (0, "u"): {"u": result("u", {"m": 0.0}, [{"m": 0.0}])},
        (1, "u"): {"u": result("u", {"m": 1.0}, [{"m": 1.0}])},
    }
    found = compare(SETTINGS, sides, {}, seed=0)
    assert [(row.task, row.change) for row in found.rows[1]] == [("u", 1.0)]
    assert found.problems == {
        (1, "t"): "the two policies were not asked the same questions (2 and 3): "
        "the same command asks every round anew"
    }


def test_other_questions_are_no_pairs() -> None:
    with pytest.raises(DataError, match="not asked the same questions"):
        compare_task(numbers([1, 0]), numbers([1, 0, 0]), **DRAWS)
    with pytest.raises(DataError, match="no samples"):
        result("t", {"m": 1.0}, [])
    with pytest.raises(DataError, match="not results of lmms-eval"):
        TaskResult.of("t", {"results": {}}, [{"doc_id": 0}])
    assert result("t", {"m": float("nan")}, [{"m": 1.0}]).problem == "lmms-eval gave no figure"


def test_its_process_has_what_it_needs_and_no_token_in_sight() -> None:
    ours = {"PATH": "/bin", "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "judge"}
    theirs = environment(ours, ["OPENAI_API_KEY", "MODEL_VERSION=gpt=4"])
    assert theirs == {"PATH": "/bin", "OPENAI_API_KEY": "judge", "MODEL_VERSION": "gpt=4"}
    assert environment(ours, ["HF_HUB_OFFLINE=1"])["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(ConfigError, match="--env HF_TOKEN: not set"):
        environment(ours, ["HF_TOKEN"])
    with pytest.raises(ConfigError, match="no such file"):
        LmmsProcess("/nowhere/python", "t")
    assert "secret" not in " ".join(LmmsProcess(sys.executable, "secret").command)


def test_a_task_that_fails_is_a_reply_and_a_process_that_dies_is_begun_anew(tmp_path: Path) -> None:
    heard: list[str] = []
    with LmmsProcess(sys.executable, "secret", on_line=heard.append) as process:
        # This environment has no lmms-eval.
        order = {"task": "t", "output": str(tmp_path)}
        assert "No module named 'lmms_eval'" in (process.order(order) or "")
        assert any("Traceback" in line for line in heard)
        first = process.pid
        assert first is not None
        os.kill(first, 9)
        assert "ended with -9" in (process.order(order) or "")
        assert "No module named 'lmms_eval'" in (process.order(order) or "")
        assert process.pid != first


def test_progress_is_read_off_its_bars() -> None:
    line = "Model Responding:  42%|████▏     | 1042/2374 [01:05<01:23, 16.0it/s, tokens=9,876]"
    assert bar_of(line) == ("answers", 1042, 2374)
    assert bar_of("Postprocessing: 100%|██████████| 6/6 [00:00<00:00, 740it/s]") == ("scores", 6, 6)
    assert bar_of("Model Responding: 3 failed") is None


def test_an_environment_that_cannot_be_made_is_not_half_there(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="cannot be made here"):
        prepare(tmp_path / "env", "no such requirement\n")
    assert not list(tmp_path.iterdir())


def test_what_killed_jobs_left_of_an_environment_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a job that finds one ready; what another job may be making now stays."""

    def run(*command: str) -> None:
        if "venv" in command:
            (Path(command[-1]) / "bin").mkdir(parents=True)
            (Path(command[-1]) / "bin" / "python").touch()

    def leave(age_s: float) -> Path:
        part = tmp_path / f"env.{age_s:08.0f}.part"
        (part / "lib").mkdir(parents=True)
        os.utime(part, times=(time.time() - age_s, time.time() - age_s))
        return part

    monkeypatch.setattr(lmms_environment, "_run", run)
    old, young, others = leave(7200), leave(900), tmp_path / "other.1.part"
    others.mkdir()
    os.utime(others, (0, 0))
    for _ in range(2):
        prepare(tmp_path / "env", "")
        assert set(tmp_path.iterdir()) == {tmp_path / "env", young, others}
        assert old == leave(7200)


def test_clean_removes_what_is_left_of_environments_too() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "clean"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert " .venv-lmms* " in done.stdout


@pytest.mark.parametrize("other", ["ends first", "goes on", "is another's"])
def test_two_jobs_that_make_an_environment_do_not_touch_each_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """The second begins while the first is at work; what it makes is not taken away."""
    folder, begun = tmp_path / "env", list[Path]()

    def run(*command: str) -> None:
        if "venv" not in command:
            return
        part = Path(command[-1])
        (part / "bin").mkdir(parents=True)
        (part / "bin" / "python").write_text(f"{len(begun)}")
        begun.append(part)
        if len(begun) == 1 and other == "goes on":
            with pytest.raises(RuntimeError):
                prepare(folder, "")
            assert (part / "bin" / "python").exists()
        elif len(begun) == 1:
            prepare(folder, "" if other == "ends first" else "x==1")
        elif other == "goes on":
            raise RuntimeError("interrupted")

    monkeypatch.setattr(lmms_environment, "_run", run)
    python = prepare(folder, "")
    assert python.read_text() == ("1" if other == "ends first" else "0")
    assert len(set(begun)) == 2 and list(tmp_path.iterdir()) == [folder]
    assert prepare(folder, "") == python and len(begun) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "paper"], "a judge scores llava_in_the_wild and mmvet"),
        (["--tasks", "mmvet"], "--env OPENAI_API_KEY"),
        (["--tasks", "mme", "--env", "MY_KEY=x"], "set MY_KEY on the head node"),
        (["--tasks", "mme", "--env", "1x"], "variables: '1x' will not do"),
        (["--tasks", "../x"], "tasks: '../x' will not do"),
        (["--tasks", ","], "tasks: [] will not do"),
        (["--tasks", "mme", "--round", "0"], "give two or more"),
        (["--tasks", "mme"], "no run there"),
        (["--tasks", "unjudged"], "no run there"),
        (["--tasks", "paper", "--env", "OPENAI_API_KEY"], "no run there"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    done = CliRunner().invoke(app, ["lmms-eval", str(tmp_path / "none"), *arguments])
    assert message in str(done.exception), done


def test_settings_travel_as_json() -> None:
    settings = LmmsEval(tasks=["mme"], include_path="tasks", variables=["A=b"])
    assert LmmsEval.model_validate(json.loads(settings.model_dump_json())) == settings
    assert settings.include_path == str(Path("tasks").absolute())

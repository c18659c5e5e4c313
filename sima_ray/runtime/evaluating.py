"""The evaluation of a round: its suites one by one, each kept as it finishes, and pairs of rounds compared."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from sima_ray.config import EvaluationConfig
from sima_ray.config.evaluation import SuiteName
from sima_ray.errors import ConfigError
from sima_ray.metrics.bootstrap import interval
from sima_ray.metrics.summary import compare
from sima_ray.ports import JsonDict, Policy
from sima_ray.runtime import evaluation
from sima_ray.runtime.asking import ask
from sima_ray.runtime.judge import Failure, Judge, Judged, Spent
from sima_ray.runtime.progress import Stage
from sima_ray.runtime.run import Run, RunFolder
from sima_ray.runtime.suites import Suite, columns, counts, labels, open_suite

_SHOWN = 3


class Service(Protocol):
    """What answers: the run's policy service, or a fake in a test."""

    def ensure(self, number: int) -> None:
        """Make it answer with the model after that many rounds."""
        ...

    def connect(self) -> Callable[[], Policy]:
        """A factory of clients."""
        ...


def evaluate(
    run: Run, number: int, service: Service, names: Sequence[str] | None = None
) -> dict[SuiteName, JsonDict]:
    """Score the policy after `number` rounds; what is done is not done again.

    Args:
        run: The run.
        number: 0 is the model that the run began with.
        service: Answers.
        names: The suites; None: all that the config has.

    Raises:
        ConfigError: No `evaluation` section, or a suite that it has not.
    """
    wanted, settings = chosen(run, names), _settings(run)
    # Read before the first is asked: a file that cannot be used must not cost what others take.
    suites = {
        name: open_suite(name, settings, run.config)
        for name in wanted
        if name != "chair" and run.done_of(marker(name, number), _digest(name, settings)) is None
    }
    judges = {name: _judge(run, settings) for name, suite in suites.items() if suite.judging}
    return {
        name: _chair(run, number, service)
        if name == "chair"
        else _suite(run, number, service, name, suites.get(name), judges.get(name))
        for name in wanted
    }


def chosen(run: Run, names: Sequence[str] | None = None) -> tuple[SuiteName, ...]:
    """The suites that are meant, in the order in which they run.

    Raises:
        ConfigError: As `evaluate`.
    """
    settings = _settings(run)
    if unknown := [name for name in names or () if name not in settings.suites]:
        raise ConfigError(
            f"{run.config.name}: the config has no files for the suite {', '.join(unknown)}; "
            f"it has {', '.join(settings.suites)}"
        )
    return tuple(name for name in settings.suites if names is None or name in names)


def marker(name: SuiteName, number: int) -> str:
    """The stage marker of a suite in a round."""
    return f"round-{number}-evaluate" + ("" if name == "chair" else f"-{name}")


def first_left(run: Run, names: Sequence[str] | None = None) -> int:
    """The first round whose policy is there and that lacks one of the suites; else the last such round."""
    wanted = chosen(run, names)
    there = [
        k
        for k in range(run.config.rounds + 1)
        if k == 0 or run.done(f"round-{k}-merge") is not None
    ]
    left = (k for k in there if any(_done(run, name, k) is None for name in wanted))
    return next(left, there[-1])


def _done(run: Run, name: SuiteName, number: int) -> JsonDict | None:
    """What a suite left in a round, if that was by the present settings: another judge's is no comparison."""
    key = marker(name, number)
    return run.done(key) if name == "chair" else run.done_of(key, _digest(name, _settings(run)))


def compared(run: Run, before: int, after: int) -> dict[str, JsonDict]:
    """Each suite beside CHAIR on two rounds: the figures of both, and the paired change where both ran.

    Returns:
        By suite: title-free JSON of `before`, `after` (null where it did not run), `difference`,
        `pairs` (questions that have a score on both sides) and `labels`. What was scored by other settings
        than the present ones did not run.
    """
    settings = _settings(run)
    result: dict[str, JsonDict] = {}
    for name in settings.suites:
        if name == "chair":
            continue
        done = [_done(run, name, number) for number in (before, after)]
        sides = [found["result"] if found else None for found in done]
        if not any(sides):
            continue
        ran = [side for side in sides if side]
        figures = dict.fromkeys(figure for side in ran for figure in side["figures"])
        entry: JsonDict = {
            "before": sides[0],
            "after": sides[1],
            "difference": {},
            "pairs": 0,
            "labels": labels(name, figures, [side.get("counts", {}) for side in ran]),
        }
        if all(sides) and before != after:
            entry |= _difference(run, name, before, after)
        result[name] = entry
    return result


def _chair(run: Run, number: int, service: Service) -> JsonDict:
    settings = _settings(run)

    def work(stage: Stage) -> tuple[JsonDict, str]:
        result = evaluation.evaluate(settings, run.config, service.connect(), stage)
        run.folder.write_text(result.captions_jsonl(), f"round-{number}", "captions.jsonl")
        figures = result.figures()
        return figures, evaluation.headline(figures)

    if run.done(marker("chair", number)) is None:
        service.ensure(number)
    return run.once(marker("chair", number), "evaluate", work)


def _suite(
    run: Run,
    number: int,
    service: Service,
    name: SuiteName,
    suite: Suite | None,
    judge: Judge | None,
) -> JsonDict:
    """One suite, read and with its judge; None for one that is done."""

    kept = _kept_answers(run, number, name, suite) if suite and suite.judging else None

    def work(stage: Stage) -> tuple[JsonDict, str]:
        assert suite is not None, "a suite that is not done was read"
        answers = kept or _answers(run, number, service, name, suite, stage)
        verdicts = _verdicts(suite, judge, answers, stage)
        rows = _rows(suite, answers, verdicts)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        run.folder.write_text(text, f"round-{number}", "evaluation", f"{name}.jsonl")
        if judge is not None:
            judge.tolerate(list(verdicts.values()))
        result = _figures(run, name, rows)
        if judge is not None:
            result["judge"] = judge.to_json()
        return result, headline(name, result)

    if suite is not None and kept is None:
        service.ensure(number)
    return run.once(marker(name, number), name, work, of=_digest(name, _settings(run)))


def headline(name: SuiteName, result: JsonDict) -> str:
    """The figures that a suite's last line shows."""
    shown = list(labels(name, result["figures"]).items())[:_SHOWN]
    parts = [f"{result['rows']:,} questions"]
    parts += [
        f"{label.rstrip(' ↑↓')} {result['figures'][figure]['value']:.3f}" for figure, label in shown
    ]
    parts += [f"{count} {kind}" for kind, count in result["failed"].items()]
    if judge := result.get("judge"):
        parts.append(f"judge {judge['asked']} asked, {judge['cached']} kept from before")
        if judge["cost"] is not None:
            parts.append(f"cost {judge['cost']:.2f}")
    return " · ".join(parts)


def _answers(
    run: Run, number: int, service: Service, name: SuiteName, suite: Suite, stage: Stage
) -> dict[str, str | None]:
    """The policy's answers by question; those of a judged suite are kept before it is judged."""
    found = ask(
        suite.questions,
        suite.load,
        service.connect(),
        stage,
        max_tokens=suite.max_tokens,
        concurrency=run.config.generation.in_flight,
    )
    answers = {q.row_id: answer for q, answer in zip(suite.questions, found, strict=True)}
    if suite.judging:
        key = {"of": _digest(name, _settings(run), judged=False)}
        lines = [key, *({"row_id": k, "response": v} for k, v in answers.items())]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        run.folder.write_text(text, *_answers_file(name, number))
    return answers


def _kept_answers(
    run: Run, number: int, name: SuiteName, suite: Suite
) -> dict[str, str | None] | None:
    """The answers of a suite that was asked before and not judged to its end; None without them."""
    if not run.folder.exists(*_answers_file(name, number)):
        return None
    text = run.folder.read_text(*_answers_file(name, number))
    key, *lines = (json.loads(line) for line in text.splitlines())
    same = key == {"of": _digest(name, _settings(run), judged=False)}
    answers = {line["row_id"]: line["response"] for line in lines}
    return answers if same and list(answers) == [q.row_id for q in suite.questions] else None


def _answers_file(name: SuiteName, number: int) -> tuple[str, ...]:
    return f"round-{number}", "evaluation", f"{name}.answers.jsonl"


def _verdicts(
    suite: Suite, judge: Judge | None, answers: dict[str, str | None], stage: Stage
) -> dict[str, Judged[JsonDict]]:
    """What the judge says of each answer; empty for a suite that has none."""
    if judge is None or suite.judging is None:
        return {}
    prompts = {
        question.row_id: suite.judging.prompt(question, answer)
        for question in suite.questions
        if (answer := answers[question.row_id]) is not None
    }

    def show(done: int, spent: Spent) -> None:
        failed = f", {spent.failures.total()} failed" if spent.failures else ""
        stage.update(f"{done:,}/{len(prompts):,} judged, {spent.cached} from before{failed}")

    return judge.judge(prompts, suite.judging.read, show)


def _rows(
    suite: Suite, answers: dict[str, str | None], verdicts: dict[str, Judged[JsonDict]]
) -> list[JsonDict]:
    rows: list[JsonDict] = []
    for question in suite.questions:
        answer = answers[question.row_id]
        row: JsonDict = {
            "row_id": question.row_id,
            "image": question.image,
            "text": question.text,
            "response": answer,
            "failure": Failure.POLICY if answer is None else None,
        }
        if answer is not None:
            row |= suite.score(question, answer)
        if judged := verdicts.get(question.row_id):
            row |= {"failure": judged.failure, "judge": judged.answer, **(judged.verdict or {})}
        rows.append(row)
    return rows


def _figures(run: Run, name: SuiteName, rows: Sequence[JsonDict]) -> JsonDict:
    settings = _settings(run)
    ratios = columns(name, rows)
    failed = Counter(str(row["failure"]) for row in rows if row["failure"] is not None)
    return {
        "figures": {
            figure: interval(
                ratio,
                samples=settings.bootstrap_samples,
                confidence=settings.confidence,
                seed=run.config.seed,
            ).to_json()
            for figure, ratio in ratios.items()
        },
        "counts": counts(name, rows),
        "rows": len(rows) - failed.total(),
        "failed": dict(sorted(failed.items())),
    }


def _difference(run: Run, name: SuiteName, before: int, after: int) -> JsonDict:
    """after − before over the questions that have a score on both sides."""
    sides = [_scored(run, name, number) for number in (before, after)]
    both = [row_id for row_id in sides[0] if row_id in sides[1]]
    settings = _settings(run)
    found = compare(
        *(columns(name, [side[row_id] for row_id in both]) for side in sides),
        samples=settings.bootstrap_samples,
        confidence=settings.confidence,
        seed=run.config.seed,
    )
    return {
        "difference": {figure: estimate.to_json() for figure, estimate in found.items()},
        "pairs": len(both),
    }


def _scored(run: Run, name: SuiteName, number: int) -> dict[str, JsonDict]:
    text = run.folder.read_text(f"round-{number}", "evaluation", f"{name}.jsonl")
    rows = [json.loads(line) for line in text.split("\n") if line]
    return {row["row_id"]: row for row in rows if row["failure"] is None}


def _judge(run: Run, settings: EvaluationConfig) -> Judge:
    assert settings.judge is not None, "a judged suite has a judge"
    return Judge(settings.judge, RunFolder(settings.judge.cache or run.folder.path("judge")))


def _settings(run: Run) -> EvaluationConfig:
    if run.config.evaluation is None:
        raise ConfigError(f"{run.config.name}: the config has no `evaluation` section")
    return run.config.evaluation


_SHARED: dict[SuiteName, tuple[str, ...]] = {
    "pope": ("pope_rule", "images", "max_tokens"),
    "halbench": ("instances", "captions", "chair_synonyms"),
}
"""Settings of the whole section that a suite depends on."""


def _digest(name: SuiteName, settings: EvaluationConfig, judged: bool = True) -> str:
    """What a suite's result depends on: with other settings it is run again."""
    values = settings.model_dump(mode="json")
    of = {key: values[key] for key in (name, *_SHARED.get(name, ()))}
    if judged and settings.judge is not None and name in ("mmhal", "mementos"):
        judge = settings.judge
        of["judge"] = [judge.base_url, judge.model, judge.temperature, judge.max_tokens]
    if judged:
        of["intervals"] = [settings.bootstrap_samples, settings.confidence]
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]

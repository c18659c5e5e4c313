"""The LLaVA benchmarks by lmms-eval, against the served policy: before and after, in one paired table.

RUN/round-K/lmms-eval/TASK/   lmms-eval's results and samples of the policy after K rounds, and `done.json`
RUN/lmms-eval.md, .json       the paired table
"""

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from pyarrow import fs

from sima_ray.config import ServiceConfig
from sima_ray.config.lmms import LmmsEval
from sima_ray.data.locations import open_location
from sima_ray.errors import ConfigError, DataError, ServiceError
from sima_ray.metrics.benchmarks import TaskResult
from sima_ray.policy.checkpoint import check_policy
from sima_ray.ports import JsonDict
from sima_ray.runtime.critic_token import new_token, token_hash
from sima_ray.runtime.lmms_environment import default_folder, prepare
from sima_ray.runtime.lmms_identity import identity, most_tokens
from sima_ray.runtime.lmms_process import LmmsProcess
from sima_ray.runtime.lmms_table import FOLDER, Asked, Comparison, compare, markdown, plain, to_json
from sima_ray.runtime.run import Run
from sima_ray.runtime.serving import deploy_critic, remove
from sima_ray.runtime.stages import PolicyService


def run_lmms_eval(run: Run, settings: LmmsEval) -> Comparison:
    """Evaluate each round's policy on each task, keep lmms-eval's files, and write the table.

    What was evaluated before, with the same weights and settings and without a failure, is not done again, unless
    a task's rounds were then asked other questions.

    Raises:
        ConfigError: No rounds are given, and none is merged; `python` or `include_path` will not do; a task that
            lmms-eval does not know.
        ModelError: A round without a policy.
        ServiceError: Requests, judgements or whole tasks failed: the table is there, and says which.
    """
    settings = settings.model_copy(update={"rounds": settings.rounds or _default_rounds(run)})
    for number in settings.rounds:
        check_policy(run.policy(number))
    wanted = [(number, task) for number in settings.rounds for task in settings.tasks]
    # Before anything is evaluated: what is kept must not be taken for that of weights which came meanwhile.
    identities = {key: identity(run, settings, *key) for key in wanted}
    kept = _kept(run, identities)
    for number, task in sorted(kept):
        run.progress.say(f"{task:<12} done before · round {number}")
    failed: dict[Asked, str] = {}
    if waiting := {key: identities[key] for key in wanted if key not in kept}:
        failed = _evaluate(run, settings, waiting)
    sides = {key: read_results(run, *key) for key in wanted if key not in failed}
    found = compare(settings, sides, failed, run.config.seed)
    run.folder.write_json(to_json(found, settings) | {"run": run.config.name}, f"{FOLDER}.json")
    path = run.folder.write_text(markdown(found, settings, run.config.name), f"{FOLDER}.md")
    for line in plain(found, settings).splitlines():
        run.progress.say(line)
    run.progress.say(f"{'table':<12} {path}")
    if found.problems:
        raise ServiceError(
            f"{len(found.problems)} of {len(wanted)} evaluations have no figures: the lines above say why; "
            "the same command asks again what failed or has no pair, and nothing else"
        )
    return found


def _default_rounds(run: Run) -> list[int]:
    merged = [k for k in range(1, run.config.rounds + 1) if run.done(f"round-{k}-merge")]
    if not merged:
        raise ConfigError(f"{run.folder.root}: no round is merged yet: name two with --round")
    return [0, merged[-1]]


def _evaluate(run: Run, settings: LmmsEval, waiting: Mapping[Asked, JsonDict]) -> dict[Asked, str]:
    """Evaluate what is left, a round's tasks while its weights are served; why some could not be.

    Args:
        waiting: What is left, and what to keep of each as its identity.
    """
    python = settings.python
    if python is None:
        with run.progress.stage("environment") as stage:
            python = str(prepare(default_folder(settings.requirements), settings.requirements))
            stage.result(python)
    token, failed = new_token(), dict[Asked, str]()
    service = PolicyService(run)
    try:
        with LmmsProcess(python, token, settings.variables) as process:
            tasks = list(dict.fromkeys(task for _, task in waiting))
            wrong = process.order({"check": tasks, "include_path": settings.include_path})
            if wrong is not None:
                raise ConfigError(f"--tasks: {wrong.removeprefix('LookupError: ')}")
            url = None
            for (number, task), its_identity in waiting.items():
                service.ensure(number)
                url = url or _open_door(run, service, token)
                order = {
                    "task": task,
                    "url": url,
                    "model": "policy",
                    "version": run.version(number),
                    "limit": settings.limit,
                    "max_tokens": most_tokens(run, settings),
                    "concurrency": run.config.generation.in_flight,
                    "retries": 1 + run.config.generation.retries,
                    "include_path": settings.include_path,
                }
                reason = _evaluate_task(run, process, order, number, its_identity)
                if reason is not None:
                    run.progress.say(f"  {task}, round {number}: {reason}")
                    failed[number, task] = reason
    finally:
        remove(_door(service))
        service.release()
    return failed


def _open_door(run: Run, service: PolicyService, token: str) -> str:
    """OpenAI's routes to the policy for this job alone; the endpoint's URL."""
    unlimited: JsonDict = {
        "requests_per_minute": None,
        "concurrent_per_token": None,
        "token_file": None,
    }
    url = deploy_critic(
        run.config.critic,
        ServiceConfig.model_validate(run.config.policy.service.model_dump() | unlimited),
        token_hashes=[token_hash(token)],
        policy=service.app,
        name=_door(service),
        route_prefix=f"/{_door(service)}",
    )
    return f"{url}/v1"


def _door(service: PolicyService) -> str:
    return f"lmms-{service.app}"


def _evaluate_task(
    run: Run, process: LmmsProcess, order: JsonDict, number: int, its_identity: JsonDict
) -> str | None:
    """Have lmms-eval evaluate one task and keep its files; why it could not, or None."""
    task = order["task"]
    with (
        run.progress.stage(task) as stage,
        tempfile.TemporaryDirectory(prefix="sima-lmms-") as temporary,
    ):

        def show(what: str, done: int, of: int) -> None:
            stage.update(f"round {number} · {done:,}/{of:,} {what}")

        if (reason := process.order(order | {"output": temporary}, show)) is not None:
            stage.result(f"round {number} · failed")
            return reason
        try:
            files = _sorted_out(Path(temporary))
            _keep(run, number, task, files, {"settings": its_identity})
            stage.result(f"round {number} · {_headline(read_results(run, number, task))}")
        except (ServiceError, DataError) as error:
            stage.result(f"round {number} · failed")
            return str(error)
    return None


def _sorted_out(folder: Path) -> Path:
    """lmms-eval's files without its folders and dates: results.json and samples_TASK.jsonl.

    Raises:
        ServiceError: It left no results.
    """
    flat = folder / "flat"
    flat.mkdir()
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        for ending in ("results.json", "samples_"):
            before, found, after = file.name.partition(f"_{ending}")
            if found and before.replace("_", "").isdigit():
                shutil.move(file, flat / f"{ending}{after}")
                break
        else:
            shutil.move(file, flat / file.name)
    if not (flat / "results.json").exists() or not list(flat.glob("samples_*.jsonl")):
        raise ServiceError("lmms-eval wrote no results or no samples: its log says why")
    return flat


def _keep(run: Run, number: int, task: str, files: Path, marker: JsonDict) -> None:
    """Put a task's files into the run's folder, in place of former ones; the marker comes last."""
    target, path = open_location(run.round_path(number, FOLDER, task))
    if target.get_file_info(path).type is not fs.FileType.NotFound:
        target.delete_dir(path)
    target.create_dir(path, recursive=True)
    fs.copy_files(
        str(files), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=target
    )
    run.folder.write_json(
        marker | {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())},
        *(f"round-{number}", FOLDER, task, "done.json"),
    )


def _kept(run: Run, identities: Mapping[Asked, JsonDict]) -> set[Asked]:
    """What is there by these weights and settings, without a failure, and with the same questions in all rounds.

    Of a task whose rounds were asked other questions, none counts: which of them has today's is not known.
    """
    asked: dict[str, dict[Asked, JsonDict]] = {}
    for key, its_identity in identities.items():
        if (questions := _kept_questions(run, *key, its_identity)) is not None:
            asked.setdefault(key[1], {})[key] = questions
    kept: set[Asked] = set()
    for task, rounds in asked.items():
        first, *others = rounds.values()
        if all(questions == first for questions in others):
            kept.update(rounds)
        else:
            run.progress.say(
                f"{task:<12} its rounds were asked other questions · all are asked anew"
            )
    return kept


def _kept_questions(run: Run, number: int, task: str, its_identity: JsonDict) -> JsonDict | None:
    """What a task's kept figures were asked, by part; None where there are none that may be used."""
    name = (f"round-{number}", FOLDER, task, "done.json")
    if not run.folder.exists(*name) or run.folder.read_json(*name)["settings"] != its_identity:
        return None
    try:
        results = read_results(run, number, task)
    except DataError:
        return None
    if any(result.problem for result in results.values()):
        return None
    return {part: result.questions for part, result in results.items()}


def read_results(run: Run, number: int, task: str) -> dict[str, TaskResult]:
    """What was kept of a task; of a group of tasks, each."""
    folder = (f"round-{number}", FOLDER, task)
    filesystem, path = open_location(run.folder.path(*folder))
    listed = filesystem.get_file_info(fs.FileSelector(path))
    names = sorted(file.base_name for file in listed if file.base_name.startswith("samples_"))
    results = run.folder.read_json(*folder, "results.json")
    return {
        part: TaskResult.of(
            part,
            results,
            # Not splitlines: answers may hold line separators of Unicode.
            [
                json.loads(line)
                for line in run.folder.read_text(*folder, name).split("\n")
                if line.strip()
            ],
        )
        for name in names
        if (part := name.removeprefix("samples_").removesuffix(".jsonl"))
    }


def _headline(results: Mapping[str, TaskResult]) -> str:
    """The figures that a task's last line shows, or why there are none."""
    problems = [f"{name}: {result.problem}" for name, result in results.items() if result.problem]
    figures = [
        f"{metric} {value:.4g}"
        for result in results.values()
        for metric, value in result.metrics.items()
    ]
    return " · ".join(problems or figures[:4])

"""What a task's figures by lmms-eval depend on: kept beside them, so that no others are taken for them."""

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from sima_ray.config.lmms import MOST_TOKENS, PRESETS, LmmsEval, is_secret
from sima_ray.errors import ConfigError, why
from sima_ray.policy.checkpoint import fingerprint
from sima_ray.ports import JsonDict
from sima_ray.runtime.run import Run

JUDGE = (
    "API_TYPE",
    "API_VERSION",
    "AWS_REGION",
    "AZURE_ENDPOINT",
    "JUDGE_BASE_URL",
    "JUDGE_MODEL_NAME",
    "LLM_JUDGE_URL",
    "MODEL_VERSION",
    "OPENAI_API_URL",
    "OPENAI_BASE_URL",
    "OPENAI_JUDGE_MODEL",
    "USE_LLM_JUDGE",
)
"""The variables by which lmms-eval and its tasks choose a judge. They count also where no `--env` names them: its
process has the head node's."""

_TELL = """
import importlib.metadata as found, re
asked = [line for line in found.requires("lmms_eval") or () if "extra ==" not in line]
for name in ["lmms_eval", *(re.match(r"[\\w.-]+", line)[0] for line in asked)]:
    for one in list(found.distributions(name=name))[:1]:
        print(f"{name}=={one.version}")
"""
_TELL_TIMEOUT_S = 120

_ASKS_OR_SCORES = re.compile(r"yaml$|\.py$")
"""Files of a task; templates are called `_default_template_yaml` and the like."""


def identity(run: Run, settings: LmmsEval, number: int, task: str) -> JsonDict:
    """What the figures of a task depend on, for the policy after `number` rounds.

    Raises:
        ConfigError: `settings.python` has no lmms-eval; a file of `settings.include_path` cannot be read.
    """
    return {
        "task": task,
        "weights": fingerprint(run.policy(number)),
        "limit": settings.limit,
        "max_tokens": most_tokens(run, settings),
        "include_path": settings.include_path and own_tasks(settings.include_path),
        "variables": variables(settings, task, os.environ),
        "environment": environment(settings),
    }


def own_tasks(folder: str) -> JsonDict:
    """A folder of further tasks, and a digest of the files that say how they ask and score.

    Raises:
        ConfigError: One that cannot be read.
    """
    try:
        contents = {
            str(path.relative_to(folder)): _digest(path.read_bytes())
            for path in sorted(Path(folder).rglob("*"))
            if _ASKS_OR_SCORES.search(path.name) and path.is_file()
        }
    except OSError as error:
        raise ConfigError(f"--include-path {folder}: cannot be read: {error}") from error
    return {"path": folder, "files": _digest(json.dumps(contents))}


def most_tokens(run: Run, settings: LmmsEval) -> int:
    """The longest answer that a task may ask for: a request that has no room for it would be refused."""
    return settings.max_tokens or min(MOST_TOKENS, run.config.policy.engine.max_model_len // 2)


def variables(settings: LmmsEval, task: str, ours: Mapping[str, str]) -> dict[str, str]:
    """A digest of each variable that figures depend on: all that were asked for, and those that choose the judge.

    Never a value: a URL may hold a password. Keys are left out: another key is no other judge. A judge is left
    out for tasks that are known to have none.
    """
    parts = [variable.partition("=") for variable in settings.variables]
    given = {name: value for name, equals, value in parts if equals}
    names = {name for name, _, _ in parts}
    names = names - set(JUDGE) if task in PRESETS["unjudged"] else names | set(JUDGE)
    values = {name: given.get(name, ours.get(name)) for name in sorted(names)}
    return {
        name: _digest(value)
        for name, value in values.items()
        if value is not None and not is_secret(name)
    }


def environment(settings: LmmsEval) -> str:
    """A digest of what lmms-eval runs in: the pins of its own environment, or what a named one has.

    Raises:
        ConfigError: A named one without lmms-eval.
    """
    if settings.python is not None:
        return _digest(_installed(settings.python))
    lines = (line.partition("#")[0].strip() for line in settings.requirements.splitlines())
    return _digest("\n".join(sorted(filter(None, lines))))


@cache
def _installed(python: str) -> str:
    """The versions of lmms-eval and of what it needs, as a Python finds them."""
    try:
        done = subprocess.run(
            (python, "-I", "-c", _TELL),
            capture_output=True,
            text=True,
            timeout=_TELL_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"--python {python}: cannot be run on the head node: {why(error)}"
        ) from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise ConfigError(
            f"--python {python}: has no lmms-eval ({said}): make an environment with `make lmms-setup`"
        )
    return done.stdout


def _digest(content: str | bytes) -> str:
    content = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(content).hexdigest()[:16]

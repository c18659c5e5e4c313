"""The direction of imports, and what importing the pure parts costs.

Every module has a level (below). It may import modules of its own level and of those further down,
whether at its top or inside a function; the strings that Serve and the Jobs API import by are not
imports.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LEVELS: list[tuple[str, ...]] = [
    (
        "jobs",
        "serve_apps",
        "sima_ray.cli",
        "sima_ray.cli_config",
        "sima_ray.cli_data",
        "sima_ray.cli_evaluate",
        "sima_ray.cli_jobs",
        "sima_ray.cli_models",
        "sima_ray.cli_lmms",
        "sima_ray.cli_plan",
        "sima_ray.cli_runs",
    ),
    ("sima_ray.runtime", "sima_ray.client"),
    ("sima_ray.data", "sima_ray.tuning", "sima_ray.policy", "sima_ray.plan"),
    ("sima_ray.critic", "sima_ray.pairs", "sima_ray.ledger", "sima_ray.metrics", "sima_ray.loss"),
    (
        *("sima_ray.ports", "sima_ray.config", "sima_ray.records", "sima_ray.errors"),
        *("sima_ray.images", "sima_ray.together"),
    ),
]
PURE = (*LEVELS[3], *LEVELS[4])
DEMO = "sima_ray.demo"
WITH_RAY = ("jobs", "serve_apps", "sima_ray.runtime", "sima_ray.data", DEMO)


def within(module: str, parts: tuple[str, ...]) -> bool:
    """Whether a module is one of these, or inside one."""
    return any(module == part or module.startswith(f"{part}.") for part in parts)


def level(module: str) -> int:
    """The row of LEVELS that a module of this project is in."""
    found = [n for n, parts in enumerate(LEVELS) if within(module, parts)]
    assert found, f"{module} has no level: give it one in {Path(__file__).name}"
    return found[0]


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the project by its dotted name, parsed."""
    found: dict[str, ast.Module] = {}
    for top in ("sima_ray", "jobs", "serve_apps"):
        for file in sorted((ROOT / top).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    return found


def imported(name: str) -> Iterator[str]:
    """The dotted names that a module imports, anywhere in it."""
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: line {node.lineno}: relative import"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules() else node.module


def ours(module: str) -> bool:
    return within(module, ("sima_ray", "jobs", "serve_apps")) and module != "sima_ray"


@cache
def edges() -> list[tuple[str, str]]:
    """Every import as (importer, imported), the bare package `sima_ray` left out."""
    users = [name for name in modules() if name != "sima_ray"]
    return sorted({(name, other) for name in users for other in imported(name)})


def test_imports_point_down() -> None:
    upwards = [
        f"{name} imports {other}"
        for name, other in edges()
        if ours(other) and not within(name, (DEMO,)) and not within(other, (DEMO,))
        if level(other) < level(name)
    ]
    assert not upwards, upwards


def test_the_package_itself_imports_nothing() -> None:
    assert list(imported("sima_ray")) == []


def test_demo_is_used_by_the_command_line_alone() -> None:
    users = {name for name, other in edges() if within(other, (DEMO,))}
    assert {user for user in users if not within(user, (DEMO, "sima_ray.cli"))} == set()


@pytest.mark.parametrize("library", ["ray", "vllm", "deepspeed", "torch", "transformers", "peft"])
def test_pure_parts_import_no_engines(library: str) -> None:
    allowed = {"sima_ray.loss"} if library == "torch" else set[str]()
    users = {name for name, other in edges() if within(other, (library,)) and within(name, PURE)}
    assert users - allowed == set()


def test_ray_stays_where_it_belongs() -> None:
    users = {name for name, other in edges() if within(other, ("ray",))}
    assert {user for user in users if not within(user, WITH_RAY)} == set()


def test_importing_pure_parts_loads_no_engines() -> None:
    pure = [name for name in modules() if within(name, PURE) and name != "sima_ray.loss"]
    assert {"sima_ray.config", "sima_ray.records", "sima_ray.metrics.chair"} <= set(pure)
    program = f"import json, sys, {', '.join(pure)}; print(json.dumps(list(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(result.stdout))
    assert loaded & {"torch", "ray", "vllm", "deepspeed", "transformers"} == set()

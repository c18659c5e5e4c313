"""The README and the other pages speak of commands, files and settings that exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from sima_ray.cli import app
from sima_ray.config import RunConfig
from sima_ray.config.lmms import PAPER_TASKS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "cluster" / "README.md", ROOT / "docs" / "results.md"]

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def code(page: Path) -> list[str]:
    """Lines of the page's code blocks, and its inline code."""
    text = page.read_text()
    blocks = re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL)
    indented = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line for block in blocks for line in block.splitlines()] + indented + inline


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sima_commands_and_options_exist(page: Path) -> None:
    for line in code(page):
        for words in re.findall(r"(?:^|[\s;&(])sima ((?:[\w./:,=<>-]+ ?)+)", line):
            verb, *rest = shlex.split(words)
            if not re.fullmatch(r"[a-z]+(-[a-z]+)*", verb):
                continue
            assert verb in COMMANDS, f"{page.name}: sima {words}"
            command = COMMANDS[verb]
            if rest and rest[0] in (under := getattr(command, "commands", {})):
                command = under[rest[0]]
            known = {name for option in command.params for name in option.opts}
            known |= {name for option in command.params for name in option.secondary_opts}
            for word in rest:
                assert not word.startswith("--") or word in known, f"{page.name}: sima {words}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_exist(page: Path) -> None:
    for line in code(page):
        for target in re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)\b", line):
            assert target in TARGETS, f"{page.name}: make {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_exist(page: Path) -> None:
    tops = (
        "cluster/",
        "sima_ray/",
        "serve_apps/",
        "jobs/",
        "tests/",
        "docker/",
        "configs/",
        "docs/",
    )
    tops += ("requirements/", "benchmarks/")
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    words = [word.strip("`'\",.:;()") for line in code(page) for word in line.split()]
    for word in [*links, *words]:
        if word.startswith(tops) and not re.search(r"[*{<…]|[A-Z]{3}", word):
            assert (ROOT / word).exists(), f"{page.name}: {word}"
    for link in links:
        assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


def test_nothing_is_left_to_fill_in() -> None:
    for page in PAGES:
        assert "@@" not in page.read_text(), page.name


def test_modules_that_are_run_exist() -> None:
    for page in PAGES:
        for line in code(page):
            for module in re.findall(r"python -m ((?:sima_ray|benchmarks|jobs)[\w.]*)", line):
                path = ROOT / module.replace(".", "/")
                assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_configs_parse(file: Path) -> None:
    config = RunConfig.load(file)
    assert RunConfig.parse(config.model_dump()) == config


def test_the_readme_shows_the_committed_proof() -> None:
    proof = json.loads((ROOT / "docs" / "proof.json").read_text())
    text = (ROOT / "README.md").read_text()
    labels = {
        "base": "base",
        "critic": "**self-critic**",
        "random": "random preferences",
        "shorter": "always the shorter",
        "greedy": "always the greedy one",
        "oracle": "a judge that cannot err",
    }
    for name, label in labels.items():
        arm = proof["arms"][name]
        chair_s, recall, errors = (
            f"{arm[key]['value']:.3f}" for key in ("chair_s", "recall", "errors")
        )
        objects = f"{arm['objects']['value']:.2f}"
        assert f"| {label} | {chair_s} | {recall} | {objects} | {errors} |" in text
    held = sum(line["holds"] for line in proof["gate"])
    assert f"{held} of {len(proof['gate'])} lines of the gate hold" in " ".join(text.split())


def test_the_readme_shows_the_committed_tuning_figures() -> None:
    found = json.loads((ROOT / "docs" / "tuning.json").read_text())
    text = (ROOT / "README.md").read_text()
    trainers = [found["trainers"][name] for name in ("ours", "trl", "released")]
    for key, scale, form in (
        ("cpu_s_per_pair", 1, ".2f"),
        ("peak_bytes", 2**20, ",.0f"),
        ("working_bytes", 2**20, ",.0f"),
    ):
        cells = [f"{trainer[key]['median'] / scale:{form}}" for trainer in trainers]
        assert f"| {' | '.join(cells)} |" in text, key
    for key in ("speedup", "steps_speedup"):
        cells = [
            f"{found[name]:.2f} [{found['spread'][name][0]:.2f}, {found['spread'][name][1]:.2f}]"
            for name in (f"{key}_vs_trl", f"{key}_vs_sima")
        ]
        assert f"| 1 | {' | '.join(cells)} |" in text, key
    assert f"Of ours {found['reference_share']:.0%} is the reference" in text


def test_the_results_show_the_committed_proof() -> None:
    proof = json.loads((ROOT / "docs" / "proof.json").read_text())
    text = (ROOT / "docs" / "results.md").read_text()
    for name, label in (("base", "base"), ("critic", "tuned on its own verdicts")):
        values = {
            key: figure["value"] for key, figure in proof["arms"][name].items() if "value" in figure
        }
        shown = [f"{values[key]:.3f}" for key in ("chair_s", "chair_i", "recall")]
        shown += [f"{values['objects']:.2f}", f"{values['errors']:.3f}"]
        assert f"| {label} | {' | '.join(shown)} |" in text
        when = "base" if name == "base" else "after one round"
        pope = {line["what"]: line["measured"] for line in proof["gate"]}
        shown = [
            f"{pope[f'POPE, {kind}, {when}']:.3f}" for kind in ("random", "popular", "adversarial")
        ]
        assert f"| {label} | {' | '.join(shown)} |" in text


def test_the_results_name_the_tasks_that_the_preset_has() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    [table] = re.findall(r"\| column \|.*?\n\n", text, re.DOTALL)
    assert tuple(re.findall(r"^\| [^|]+ \| `(\w+)` \|", table, re.MULTILINE)) == PAPER_TASKS
    requirements = (ROOT / "requirements" / "lmms-eval.txt").read_text()
    [version] = re.findall(r"^lmms_eval==(.+)$", requirements, re.MULTILINE)
    assert f"(https://pypi.org/project/lmms-eval/) {version} as a Ray job" in text


def test_the_results_have_the_configs_settings() -> None:
    training = RunConfig.load(ROOT / "configs" / "llava-1.5-7b.yaml").training
    text = (ROOT / "docs" / "results.md").read_text()
    ours = {
        cells[0].strip(): cells[-1].strip()
        for line in text.splitlines()
        if len(cells := line.strip("|").split("|")) == 4
    }
    assert ours["loss"] == f"DPO, β {training.beta}" and training.loss.kind == "sigmoid"
    assert ours["LoRA"].startswith(f"r {training.lora.r}, α {training.lora.alpha} ")
    assert ours["batch"].startswith(f"{training.batch_size} pairs a step")
    assert ours["epochs"] == f"{training.epochs}"
    assert (training.learning_rate, training.warmup_ratio) == (1e-7, 0.03)
    assert (training.zero_stage, training.max_tokens, training.dtype) == (2, 2048, "bfloat16")

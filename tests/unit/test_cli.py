"""The command line: quick to answer, and one clear line for everything that a user can get wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sima_ray.runtime import cluster

SIMA = Path(sys.executable).parent / "sima"


def sima(*arguments: str, cwd: Path | None = None, home: Path | None = None):
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home or cwd or "/tmp"), "NO_COLOR": "1"}
    return subprocess.run(
        [str(SIMA), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
        cwd=cwd,
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    values = {
        "name": "r",
        "runs": str(tmp_path / "runs"),
        "data": {"prompts": str(tmp_path / "prompts.jsonl"), "images": str(tmp_path)},
        "policy": {"model": str(tmp_path / "model")},
    }
    file.write_text(yaml.safe_dump(values))
    return file


def assert_one_line(done: "subprocess.CompletedProcess[str]", *words: str, code: int = 1) -> None:
    assert done.returncode == code, done
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("sima: ")
    for word in words:
        assert word in lines[0]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['sima', '--help']\n"
        "from sima_ray.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'pyarrow', 'numpy'} & sys.modules.keys()\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "submit" in done.stdout


def test_dry_run_prints_the_resolved_config(config: Path) -> None:
    done = sima("submit", "pipeline", str(config), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["training"]["beta"] == 0.1


def test_unknown_config_key(config: Path) -> None:
    config.write_text(config.read_text() + "trainig: {}\n")
    done = sima("submit", "pipeline", str(config), "--dry-run")
    assert_one_line(done, str(config), "trainig: unknown key", code=2)


def test_missing_config(tmp_path: Path) -> None:
    done = sima("submit", "pipeline", str(tmp_path / "no.yaml"))
    assert_one_line(done, "no.yaml", "No such file", code=2)


def test_unknown_stage(config: Path) -> None:
    assert_one_line(sima("submit", "tune", str(config)), "no stage 'tune'", "pipeline", code=2)


def test_no_cluster(config: Path, tmp_path: Path) -> None:
    done = sima("submit", "pipeline", str(config), home=tmp_path)
    assert_one_line(done, "sima up", "--address")


def test_dead_address(config: Path, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{cluster.free_port()}"
    done = sima("submit", "pipeline", str(config), "--address", address, home=tmp_path)
    assert_one_line(done, address)


def test_an_address_without_scheme_is_a_dashboards_as_in_rays_own_commands(
    config: Path, tmp_path: Path
) -> None:
    address = f"127.0.0.1:{cluster.free_port()}"
    done = sima("submit", "pipeline", str(config), "--address", address, home=tmp_path)
    assert_one_line(done, f"http://{address}: no Ray cluster answers")


def test_an_address_that_is_no_dashboards(config: Path) -> None:
    done = sima("submit", "pipeline", str(config), "--address", "ray://head:10001")
    assert_one_line(done, "--address ray://head:10001: ", "http://HEAD:8265", code=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--min", "3", "--max", "2"), "--min 3 --max 2: at least 3 and at most 2 cannot be"),
        ((), "give a number of replicas, or --min and --max"),
        (("1", "--app", "a b"), "--app a b: letters"),
    ],
)
def test_what_scale_refuses_without_a_cluster(
    arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    assert_one_line(sima("scale", *arguments, home=tmp_path), words, code=2)


def test_a_bad_application_name_is_refused_without_a_cluster(config: Path, tmp_path: Path) -> None:
    for command in (("serve", str(config)), ("unserve",)):
        done = sima(*command, "--app", "a b", home=tmp_path)
        assert_one_line(done, "--app a b: letters", code=2)


def test_unserve_without_a_cluster(tmp_path: Path) -> None:
    assert_one_line(sima("unserve", home=tmp_path), "no cluster", "sima up", "--address")


def test_busy_port(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_one_line(sima("up", "--port", port, home=tmp_path), f"port {port} is in use")


def test_down_without_a_cluster(tmp_path: Path) -> None:
    assert_one_line(sima("down", home=tmp_path), "sima up")


def test_validate_names_a_missing_model_and_prompts(config: Path, tmp_path: Path) -> None:
    assert_one_line(sima("validate", str(config)), "prompts.jsonl")
    (tmp_path / "prompts.jsonl").write_text(
        '{"image": "a.png", "text": "?", "ground_truth": "b"}\n'
    )
    done = sima("validate", str(config))
    assert done.returncode == 1
    assert "prompts.jsonl:1: missing_image" in done.stdout
    assert f"{tmp_path / 'model'}" in done.stdout
    assert "1 prompts: 0 good, 1 set aside" in done.stdout


def test_report_of_no_run(tmp_path: Path) -> None:
    done = sima("report", str(tmp_path))
    assert_one_line(done, "summary.json: no finished run there (No such file or directory)")


def test_a_file_that_is_missing_is_named_once_and_so_is_the_cause(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("")
    (tmp_path / "one.json").write_text('[{"image": "a.png", "text": "?", "ground_truth": "b"}]')
    for arguments, words in (
        (("validate", "no.jsonl", "--no-images"), "no.jsonl: cannot be read: No such file"),
        (("data", "images", "no.jsonl", "-o", "x"), "no.jsonl: cannot be read: No such file"),
        (("data", "prompts", "no.json", "-o", "x"), "no.json: cannot be read: No such file"),
        (("data", "prompts", "one.json", "-o", "taken/x"), "taken/x: cannot be written: "),
    ):
        done = sima(*arguments, cwd=tmp_path)
        assert_one_line(done, words)
        assert "rrno" not in done.stderr and done.stderr.count(words.split(":")[0]) == 1


def test_evaluate_names_what_the_config_lacks(config: Path, tmp_path: Path) -> None:
    assert_one_line(sima("evaluate", str(config)), "it has no `evaluation` section", code=2)
    setting = f"evaluation.amber={{data: {tmp_path}, images: {tmp_path}}}"
    options = ("--set", setting, "--set", "evaluation.amber.limit=5")
    done = sima("evaluate", str(config), *options, "--suite", "pope")
    assert_one_line(done, "no files for the suite pope; it has amber", code=2)
    assert_one_line(sima("evaluate", str(config), "--set", "seed"), "give KEY=VALUE", code=2)
    done = sima("evaluate", str(config), *options, "--round", "2")
    assert_one_line(done, "--round 2: the run has 1 rounds", code=2)
    done = sima("evaluate", str(config), *options, "--suite", "amber", "--dry-run")
    assert yaml.safe_load(done.stdout)["evaluation"]["amber"]["limit"] == 5
    done = sima("evaluate", str(config), *options, home=tmp_path)
    assert_one_line(done, "sima up", "--address")

"""`sima critique` against a fake critic over real HTTP: what it shows, writes, and exits with."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fake_critic import PNG, TOKEN, FakeCritic, problem, ranked, report, says
from rich.console import Console
from test_cli import SIMA, assert_one_line

from sima_ray.client.command import read_cases, show
from sima_ray.client.results import read_result
from sima_ray.runtime.cluster import free_port

PAIR = ("--response", "score=1", "--response", "score=2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A home with a token, and one image."""
    (tmp_path / ".sima").mkdir()
    (tmp_path / ".sima" / "critic-token").write_text(TOKEN)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "cup.png").write_bytes(PNG)
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "HOME": str(folder), "NO_COLOR": "1", "LC_ALL": "C.UTF-8"}


def critique(
    folder: Path, *arguments: str, url: str, stdin: str = ""
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(SIMA), "critique", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(folder) | {"SIMA_CRITIC_URL": url},
        cwd=folder,
    )


def test_one_case(server: FakeCritic, folder: Path) -> None:
    words = ("--image", "images/cup.png", "--question", "What is it?", "--ground-truth", "A cup.")
    done = critique(folder, *words, *PAIR, url=server.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "winner       response 2, in both orders",
        "shown 1, 2   response 2: Reason 12.",
        "shown 2, 1   response 2: Reason 21.",
        "model        fake-1 · prompt 0123456789ab · 18 tokens · 0.01 s",
    ]
    sent = server.requests[0]
    assert sent["image"].startswith("data:image/png;base64,")
    assert (sent["ground_truth"], sent["responses"]) == ("A cup.", ["score=1", "score=2"])


def test_the_whole_report(server: FakeCritic, folder: Path) -> None:
    server.script = [says(200, report(1, novelty="é"))]
    image = "https://images.example.org/cup.png?size=2"
    ask = ("--image", image, "--question", "?", *PAIR, "--json")
    done = critique(folder, *ask, url=server.url)
    assert json.loads(done.stdout) == report(1, novelty="é")
    assert server.requests[0]["image"] == image  # fetching is the critic's business


def test_more_than_two_responses(server: FakeCritic, folder: Path) -> None:
    server.script = [says(200, ranked())]
    done = critique(folder, "--question", "?", *PAIR, "--response", "c", url=server.url)
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        "winner       response 2",
        "ranking      2 > 1 > 3 (best first)",
        "agreement    67% of the pairs have one verdict in both orders",
    ]
    assert "1 against 2  response 2 · preferred first · 0.20 that 1 is better" in lines
    assert "1 against 3  a tie · inconsistent · 0.50 that 1 is better" in lines
    assert "shown 3, 2   response 3: Reason 21." in lines
    assert len(server.requests[0]["responses"]) == 3


def shown(answer: dict[str, Any], **options: Any) -> str:
    out = io.StringIO()
    show(read_result(answer), Console(file=out, highlight=False, **options))
    return out.getvalue()


def test_a_terminal_gets_columns_and_colours() -> None:
    answer = report(1, probability=0.91)
    answer["orders"][0]["reason"] = "word " * 40
    lines = shown(answer, force_terminal=True, width=60).splitlines()
    assert "\x1b[" in lines[0] and "response 1, in both orders" in lines[0]
    assert "0.91 that response 1 is better than 2" in lines[1]
    assert len(lines) > 7 and lines[3].startswith(" " * 13)
    assert "\x1b" not in shown(answer)
    assert "word " * 39 in shown(answer)  # elsewhere a line stays one line


def test_a_models_words_steer_no_terminal() -> None:
    answer = report(None, model_version="[red]\x1b]0;title\x07")
    answer["orders"][0]["reason"] = "a\x1b[2Jb\nc\r\u202ed [bold]e"
    text = shown(answer)
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text
    assert "a [2Jb c d [bold]e" in text and "[red] ]0;title" in text
    assert text.startswith("winner       none: the two orders do not agree")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "--question"),
        (("--question", "?"), "two or more --response"),
        (("--question", "?", "--response", "a"), "two or more --response"),
        (("--file", "cases.jsonl", "--question", "?"), "--file holds the cases"),
        (("--question", "?", *PAIR, "--url", "head:8000"), "http://HOST:8000"),
    ],
)
def test_a_wrong_command_line(folder: Path, arguments: tuple[str, ...], word: str) -> None:
    assert_one_line(critique(folder, *arguments, url="http://127.0.0.1:1"), word, code=2)


def test_errors_are_one_line(server: FakeCritic, folder: Path) -> None:
    ask = ("--question", "?", *PAIR)
    done = critique(folder, *ask, "--image", "no.png", url=server.url)
    assert_one_line(done, "no.png: there is no such file")
    done = critique(folder, "--question", "please refuse", *PAIR, url=server.url)
    assert_one_line(done, "at most 7 tokens")
    done = critique(folder, *ask, "--token-file", "none", url=server.url)
    assert_one_line(done, "none: the critic's token cannot be read")
    (folder / "wrong").write_text("wrong")
    done = critique(folder, *ask, "--token-file", "wrong", url=server.url)
    assert_one_line(done, "refuses the token of wrong", "$SIMA_CRITIC_TOKEN")
    server.script = [says(503, problem("overloaded", "busy"), Retry_After="60")]
    done = critique(folder, *ask, "--timeout", "5", url=server.url)
    assert_one_line(done, "busy (1 try in", "try again later")
    dead = f"http://127.0.0.1:{free_port()}"
    for arguments in (ask, ("--file", "-")):
        done = critique(folder, *arguments, url=dead, stdin="{}")
        assert_one_line(done, f"{dead}: no critic can be reached", "sima serve CONFIG")


def lines_of(*cases: dict[str, Any] | str) -> str:
    return "".join(f"{case if isinstance(case, str) else json.dumps(case)}\n" for case in cases)


GOOD = {"question": "?", "responses": ["score=1", "score=2"]}


def test_a_file_of_cases(server: FakeCritic, folder: Path) -> None:
    (folder / "images" / "cases.jsonl").write_text(
        lines_of(
            GOOD | {"id": "first", "image": "cup.png", "ground_truth": "A cup."},
            "",
            "{",
            GOOD | {"image": "lost.png"},
            GOOD | {"question": "please refuse", "id": 7},
            GOOD | {"truth": "A cup."},
            GOOD | {"responses": ["score=3", "score=2"], "image": None},
            "[]",
        )
    )
    done = critique(folder, "--file", "images/cases.jsonl", "--concurrency", "2", url=server.url)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(r["id"], r["line"], r.get("winner")) for r in results] == [
        ("first", 1, 2),
        ("3", 3, None),
        ("4", 4, None),
        ("7", 5, None),
        ("6", 6, None),
        ("7", 7, 1),
        ("8", 8, None),
    ]
    errors = [r["error"]["message"] for r in results if "error" in r]
    assert [error.split(":")[0] for error in errors] == [
        "not JSON",
        "images/lost.png",
        "too long",
        "unknown field 'truth'",
        "not a JSON object",
    ]
    assert results[3]["error"] | {"message": ""} == {
        "status": 422,
        "code": "invalid_request",
        "message": "",
        "request_id": "r-1",
    }
    assert results[0] == {**report(2), "id": "first", "line": 1}
    assert done.returncode == 1
    summary, error = done.stderr.splitlines()
    assert summary.startswith("critic ") and summary.endswith("2 of 7 judged")
    assert error.startswith("sima: images/cases.jsonl: 5 of 7 cases have no verdict; the first is")
    assert "line 3: not JSON" in error


def test_a_file_whose_cases_are_all_judged(server: FakeCritic, folder: Path) -> None:
    cases = lines_of(*[GOOD | {"image": "images/cup.png"}] * 40)
    done = critique(folder, "--file", "-", url=server.url, stdin=cases)
    assert done.returncode == 0 and done.stderr.endswith("40 of 40 judged\n")
    assert [json.loads(line)["line"] for line in done.stdout.splitlines()] == [*range(1, 41)]


def test_files_that_cannot_be_used(server: FakeCritic, folder: Path) -> None:
    for name, words in ((".", "cannot be read"), ("no.jsonl", "cannot be read: No such file")):
        assert_one_line(critique(folder, "--file", name, url=server.url), words)
    dead = f"http://127.0.0.1:{free_port()}"  # is not asked
    assert_one_line(critique(folder, "--file", "no.jsonl", url=dead), "no.jsonl: cannot be read")
    done = critique(folder, "--file", "-", url=server.url, stdin="\n\n")
    assert_one_line(done, "holds no cases")
    (folder / ".sima" / "critic-token").write_text("wrong")
    done = critique(folder, "--file", "-", url=server.url, stdin=lines_of(*[GOOD] * 9))
    assert_one_line(done, "refuses the token of")  # once, not for each line
    assert done.stdout == ""


def test_ctrl_c(server: FakeCritic, folder: Path) -> None:
    busy = says(503, problem("overloaded", "busy"), Retry_After="100")
    for mode in (("--question", "?", *PAIR), ("--file", "cases.jsonl")):
        (folder / "cases.jsonl").write_text(lines_of(GOOD))
        server.script, server.requests = [busy], []
        running = subprocess.Popen(
            [str(SIMA), "critique", *mode],
            env=environment(folder) | {"SIMA_CRITIC_URL": server.url},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while not server.requests and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(running.pid, signal.SIGINT)
        out, err = running.communicate(timeout=60)
        assert (running.returncode, out) == (130, ""), err
        assert "Traceback" not in err


@pytest.mark.parametrize(
    "line",
    [
        b"\xff",
        b"[" * 100_000,
        b"1",
        b'{"question": 1, "responses": ["a", "b"]}',
        b'{"question": "?", "responses": "ab"}',
        b'{"question": "?", "responses": ["a", "b"], "image": 1}',
        b'{"question": "?", "responses": ["a", "b"], "ground_truth": 1}',
    ],
)
def test_bad_lines_have_a_reason(line: bytes) -> None:
    (found,) = read_cases([line], Path("."))
    assert found.number == 1 and isinstance(found.case, Exception) and str(found.case)


def test_help_is_light_and_short() -> None:
    code = (
        "import sys; sys.argv = ['sima', 'critique', '--help']\n"
        "from sima_ray.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'httpx'} & sys.modules.keys()\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("--image", "--file", "--token-file", "--json"))

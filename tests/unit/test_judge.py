"""The judge against a real HTTP server that is busy, silent, broken or talks nonsense: never a made-up score."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_critic import Answer, drips, resets, says
from fake_judge import KEY, FakeJudge, completion

from sima_ray.config import JudgeConfig
from sima_ray.errors import ConfigError, ServiceError
from sima_ray.metrics.mmhal import read_rating
from sima_ray.runtime.cluster import free_port
from sima_ray.runtime.judge import Failure, Judge, Judged
from sima_ray.runtime.run import RunFolder


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJudge]:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with FakeJudge() as server:
        yield server


def config(url: str, **changes: object) -> JudgeConfig:
    values: dict[str, Any] = {
        "base_url": url,
        "model": "judge-1",
        "key_env": "JUDGE_KEY",
        "attempts": 3,
        "first_wait_s": 0.01,
        "timeout_s": 30.0,
        "give_up_s": 20.0,
    }
    return JudgeConfig.model_validate(values | changes)


def patience(trouble: Answer) -> float:
    """Seconds a try has: short where all of them pass, which a busy machine must not use up elsewhere."""
    return 2.0 if trouble is drips else 30.0


def asked(
    url: str, folder: Path, *prompts: str, **changes: object
) -> tuple[list[Judged[int]], Judge]:
    judge = Judge(config(url, **changes), RunFolder(str(folder)))
    found = judge.judge({str(n): prompt for n, prompt in enumerate(prompts)}, read_rating)
    return list(found.values()), judge


def test_verdicts_come_in_order_and_are_paid_for(fake: FakeJudge, tmp_path: Path) -> None:
    four = threading.Barrier(4, timeout=10)  # `concurrency`: fewer in flight would never pass it

    def answer(prompt: str) -> str:
        four.wait()
        return f"Because.\nRating: {prompt[-1]}"

    fake.answer = answer
    prompts = [f"case {n} {n % 7}" for n in range(8)]
    found, judge = asked(fake.url, tmp_path, *prompts, price_in=3, price_out=15, timeout_s=10)
    assert [one.verdict for one in found] == [0, 1, 2, 3, 4, 5, 6, 0]
    assert judge.to_json() == {
        "model": "judge-1",
        "asked": 8,
        "cached": 0,
        "tries": 8,
        "prompt_tokens": 800,
        "answer_tokens": 80,
        "cost": pytest.approx((800 * 3 + 80 * 15) / 1e6),
        "cost_before": 0,
        "failures": {},
    }
    assert fake.most == 4
    assert fake.bodies[0]["temperature"] == 0 and fake.bodies[0]["max_tokens"] == 1024


@pytest.mark.parametrize(
    ("trouble", "kind", "tries"),
    [
        (says(429, {"error": "slow down"}), Failure.RATE_LIMIT, 3),
        (says(503), Failure.SERVER_ERROR, 3),
        (says(500, {"error": "oops"}), Failure.SERVER_ERROR, 3),
        (drips, Failure.TIMEOUT, 3),
        (resets, Failure.UNREACHABLE, 3),
        (says(400, {"error": "content policy"}), Failure.REFUSED, 1),
        (says(200, completion(None, refusal="I will not.")), Failure.REFUSED, 1),
        (says(200, b"<html>hello</html>"), Failure.MALFORMED, 1),
        (says(200, {"choices": []}), Failure.MALFORMED, 1),
        (says(200, completion(None)), Failure.MALFORMED, 1),
        (says(200, completion("It is good.")), Failure.UNPARSEABLE, 2),
        (says(200, completion("Rating: 2 or Rating: 5")), Failure.UNPARSEABLE, 2),
    ],
)
def test_trouble_is_counted_and_never_a_score(
    fake: FakeJudge, tmp_path: Path, trouble: Answer, kind: Failure, tries: int
) -> None:
    fake.answer = lambda prompt: trouble if prompt == "bad" else "Rating: 5"
    found, judge = asked(fake.url, tmp_path, "good", "bad", timeout_s=patience(trouble))
    good, bad = found
    assert (good.verdict, good.failure) == (5, None)
    assert (bad.verdict, bad.failure) == (None, kind)
    assert fake.prompts.count("bad") == tries
    assert judge.spent.failures == {kind: 1}
    with pytest.raises(ServiceError, match=rf"no verdict on 1 of 2 questions \(1 {kind}\)"):
        judge.tolerate(found)
    lenient = config(fake.url, max_failed_share=0.5)
    Judge(lenient, RunFolder(str(tmp_path))).tolerate(found)


@pytest.mark.parametrize(
    "trouble", [says(429), says(502), drips, resets, says(200, completion("nonsense"))]
)
def test_what_passes_is_tried_again(fake: FakeJudge, tmp_path: Path, trouble: Answer) -> None:
    fake.script = [trouble]
    found, judge = asked(fake.url, tmp_path, "case", timeout_s=patience(trouble))
    assert [one.verdict for one in found] == [4]
    assert judge.spent.tries == 2 and not judge.spent.failures


def test_retry_after_is_waited_for(fake: FakeJudge, tmp_path: Path) -> None:
    fake.script = [says(429, {}, Retry_After="1")]
    start = time.monotonic()
    found, _ = asked(fake.url, tmp_path, "case")
    assert found[0].verdict == 4 and time.monotonic() - start > 0.9


def test_a_time_limit_ends_what_the_tries_would_not(fake: FakeJudge, tmp_path: Path) -> None:
    fake.answer = lambda prompt: says(429, {}, Retry_After="3600")
    start = time.monotonic()
    found, _ = asked(fake.url, tmp_path, "case")
    assert found[0].failure is Failure.RATE_LIMIT and time.monotonic() - start < 5


def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    found, _ = asked(f"http://127.0.0.1:{free_port()}/v1", tmp_path, "case")
    assert found[0].failure is Failure.UNREACHABLE
    assert "connection refused" in found[0].answer and "3 tries" in found[0].answer


def test_nothing_is_asked_twice(fake: FakeJudge, tmp_path: Path) -> None:
    fake.answer = lambda prompt: "?" if prompt == "b" else "Rating: 1"
    asked(fake.url, tmp_path, "a", "b", price_in=1, price_out=1)
    assert fake.prompts.count("a") == 1 and fake.prompts.count("b") == 2
    fake.prompts.clear()
    fake.answer = lambda prompt: "Rating: 6"
    found, judge = asked(fake.url, tmp_path, "a", "b", price_in=1, price_out=1)
    assert [(one.verdict, one.cached) for one in found] == [(1, True), (6, False)]
    assert fake.prompts == ["b"]  # what could not be read was not kept
    spent = judge.to_json()
    assert spent["cost"] == spent["cost_before"] == pytest.approx(110 / 1e6)
    # Another model, or other settings of it, is another judge.
    found, _ = asked(fake.url, tmp_path, "a", model="judge-2")
    assert [(one.verdict, one.cached) for one in found] == [(6, False)]


def test_a_refused_key_ends_it_at_once_and_is_not_shown(fake: FakeJudge, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-wrong\n")
    changes: dict[str, Any] = {"key_env": None, "key_file": str(tmp_path / "key")}
    with pytest.raises(ServiceError, match=r"refuses the key \(401, model judge-1\)") as caught:
        asked(fake.url, tmp_path, *map(str, range(50)), **changes)
    assert "sk-wrong" not in str(caught.value)
    (tmp_path / "key").write_text(f"{KEY}\n")
    assert asked(fake.url, tmp_path, "case", **changes)[0][0].verdict == 4


def test_an_unknown_model_ends_it_at_once(fake: FakeJudge, tmp_path: Path) -> None:
    fake.answer = lambda prompt: says(404, {"error": {"message": f"no model for {KEY}"}})
    with pytest.raises(ServiceError, match="has no such model or address") as caught:
        asked(fake.url, tmp_path, *map(str, range(50)))
    assert KEY not in str(caught.value) and "[key]" in str(caught.value)
    assert len(fake.prompts) < 10


def test_the_key_lies_in_no_file(fake: FakeJudge, tmp_path: Path) -> None:
    asked(fake.url, tmp_path, "case")
    kept = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert kept and not any(KEY in text for text in kept)
    assert KEY not in config(fake.url).model_dump_json()


@pytest.mark.parametrize(
    ("key", "words"),
    [("", r"\$JUDGE_KEY holds no key here"), ("two words", "one line of plain characters")],
)
def test_a_key_that_is_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, words: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(ConfigError, match=words) as caught:
        Judge(config("http://127.0.0.1:9/v1"), RunFolder(str(tmp_path)))
    assert not key or key not in str(caught.value)


def test_progress_is_shown(fake: FakeJudge, tmp_path: Path) -> None:
    seen: list[int] = []
    show: Callable[..., None] = lambda done, spent: seen.append(done)  # noqa: E731
    Judge(config(fake.url), RunFolder(str(tmp_path))).judge({"a": "1", "b": "2"}, read_rating, show)
    assert seen == [1, 2]

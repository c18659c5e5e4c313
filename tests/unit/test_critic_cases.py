"""The critic's client, sync and async, against scripted answers."""

import asyncio
import base64
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_critic import JPEG, PNG, TOKEN, WEBP, judge, problem, ranked
from fake_critic import report as a_report

from sima_ray.client import (
    AsyncCriticClient,
    Case,
    CaseRefused,
    CriticClient,
    CriticError,
    CriticFailed,
    CriticUnavailable,
    CritiqueResult,
    Retry,
    TokenRefused,
)
from sima_ray.client.case import MAX_BODY_BYTES, image_url
from sima_ray.config import ServiceConfig
from sima_ray.errors import ServiceError
from sima_ray.runtime.cluster import free_port

pytestmark = pytest.mark.usefixtures("home")

QUICK = Retry(attempts=3, first_wait_s=0.01)
PAIR = ["score=1", "score=2"]

Handler = Callable[[httpx.Request], httpx.Response]


def scripted(handler: Handler, **options: Any) -> CriticClient:
    transport = httpx.MockTransport(handler)
    return CriticClient(token=TOKEN, transport=transport, **{"retry": QUICK, **options})


def answers(status: int, body: Any, **headers: str) -> Handler:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda request: httpx.Response(status, headers=headers, content=content)


def judges(request: httpx.Request) -> httpx.Response:
    status, answer = judge(json.loads(request.content))
    return httpx.Response(status, json=answer)


def failure(handler: Handler, **case: Any) -> CriticError:
    with scripted(handler) as client, pytest.raises(CriticError) as caught:
        client.critique(**({"image": None, "question": "?", "responses": PAIR} | case))
    return caught.value


def test_what_is_sent_and_what_comes_back() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=a_report(2), headers={"x-request-id": "r-9"})

    with scripted(handler) as client:
        result = client.critique(PNG, "What is it?", PAIR, "A cup.")
    assert (str(seen[0].url), seen[0].method) == ("http://127.0.0.1:8000/v1/critique", "POST")
    assert seen[0].headers["authorization"] == f"Bearer {TOKEN}"
    assert seen[0].headers["content-type"] == "application/json"
    image = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    sent = {"question": "What is it?", "responses": PAIR, "ground_truth": "A cup.", "image": image}
    assert json.loads(seen[0].content) == sent
    assert (result.winner, result.consistent, result.outcome) == (2, True, "preferred_second")
    assert [(o.order, o.choice, o.winner) for o in result.orders] == [("12", 2, 2), ("21", 1, 2)]
    assert (result.model_version, result.tokens, result.request_id) == ("fake-1", 18, "r-9")
    assert (result.probability, result.ranking, result.comparisons) == (None, None, ())
    assert result.report == a_report(2)


def test_new_fields_are_read_and_unknown_ones_kept() -> None:
    sent = a_report(1, probability=1, novelty={"a": 1})
    sent["orders"][0] |= {"probability": 0.75, "novelty": 1}
    with scripted(answers(200, sent)) as client:
        result = client.critique(None, "?", PAIR)
    assert (result.probability, result.orders[0].probability) == (1.0, 0.75)
    assert result.report["novelty"] == {"a": 1}


def test_more_than_two_responses() -> None:
    with scripted(answers(200, ranked())) as client:
        result = client.critique(None, "?", [*PAIR, "score=0"])
    assert (result.winner, result.ranking, result.agreement) == (2, (2, 1, 3), 2 / 3)
    assert [c.responses for c in result.comparisons] == [(1, 2), (1, 3), (2, 3)]
    assert [c.winner for c in result.comparisons] == [2, None, 2]
    assert [c.probability for c in result.comparisons] == [0.2, 0.5, None]
    assert len(result.comparisons[0].orders) == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        {},
        a_report() | {"winner": "2"},
        a_report() | {"winner": True},
        a_report() | {"orders": [1]},
        a_report() | {"orders": {}},
        a_report(2, probability="high"),
        a_report(2, ranking=[1, "2"]),
        a_report(2, comparisons=[{"responses": [1]}]),
    ],
)
def test_what_is_no_critics_answer(answer: Any) -> None:
    error = failure(answers(200, answer))
    assert isinstance(error, CriticFailed) and error.code == "unreadable_answer"


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (302, CriticFailed, "is the URL a critic's"),
        (400, CaseRefused, "the words"),
        (401, TokenRefused, "refuses the token given: give the critic's own token"),
        (404, CriticFailed, "answered 404 (the words): is the URL a critic's"),
        (413, CaseRefused, "the words"),
        (422, CaseRefused, "the words"),
        (429, CriticUnavailable, "the words (3 tries in"),
        (500, CriticFailed, "failed with 500 (2 tries in"),
        (503, CriticUnavailable, "the words (3 tries in"),
        (504, CriticUnavailable, "policy.service.request_timeout_s"),
    ],
)
def test_errors_say_what_where_and_what_to_do(
    status: int, kind: type[CriticError], words: str
) -> None:
    error = failure(answers(status, problem("the_code", "the\nwords")))
    assert type(error) is kind and words in str(error) and "\n" not in str(error)
    assert (error.status, error.code, error.request_id) == (status, "the_code", "r-1")
    assert error.message == str(error) and TOKEN not in str(error)
    assert isinstance(error, ServiceError) and error.exit_code == 1
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.status) == (kind, str(error), status)


def test_errors_without_our_shape() -> None:
    for body in (b"<html>", b"[]", b'{"error": 1}', b'{"error": {"code": 1}}'):
        error = failure(answers(503, body, **{"x-request-id": "r-7"}))
        assert (error.status, error.code, error.request_id) == (503, "http_error", "r-7")


def test_without_a_token_the_error_says_so() -> None:
    transport = httpx.MockTransport(answers(401, problem("unauthorized", "no")))
    with (
        CriticClient(transport=transport) as client,
        pytest.raises(TokenRefused, match="needs a token, and none was found"),
    ):
        client.critique(None, "?", PAIR)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"responses": ["one"]}, "1 responses: give two or more"),
        ({"responses": "two"}, "a list of texts"),
        ({"responses": ["a", 1]}, "a list of texts"),
        ({"question": ""}, "question: is empty"),
        ({"image": b"GIF89a"}, "image: not a JPEG, PNG or WebP"),
        ({"image": b""}, "image: not a JPEG, PNG or WebP"),
        ({"image": "no/such.png"}, "no/such.png: there is no such file"),
        ({"image": "/"}, "/: is no file"),
        ({"image": "a\0b"}, "a\0b: "),
        ({"image": PNG + b"x" * MAX_BODY_BYTES}, "MB once encoded, over the 20.0 MB"),
        ({"responses": ["x" * MAX_BODY_BYTES, ""]}, "the request: 20.0 MB once encoded"),
    ],
)
def test_cases_that_are_not_sent(case: dict[str, Any], words: str) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise AssertionError("was sent")

    error = failure(handler, **case)
    assert isinstance(error, CaseRefused) and words in str(error)
    assert error.status is None and error.code


def test_images_are_known_by_their_first_bytes(tmp_path: Path) -> None:
    for data, kind in ((JPEG, "jpeg"), (PNG, "png"), (WEBP, "webp")):
        file = tmp_path / "image.dat"
        file.write_bytes(data)
        url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        assert image_url(data) == image_url(file) == image_url(str(file)) == image_url(url) == url


@pytest.mark.parametrize("url", ["https://example.com/cat.png", "http://10.0.0.1:8080/a?b=c"])
def test_a_url_is_sent_as_it_is(url: str) -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return judges(request)

    with scripted(handler) as client:
        client.critique(url, "?", PAIR)
    assert json.loads(seen[0].content)["image"] == url


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "large.png"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(CaseRefused, match=r"large\.png: 1,466,015\.5 MB once encoded"):
        image_url(file)


def test_the_limit_is_the_services_own() -> None:
    assert ServiceConfig.model_fields["max_body_bytes"].default == MAX_BODY_BYTES


def test_a_busy_service_is_asked_again() -> None:
    calls: list[int] = []

    def handler(request: httpx.Request) -> httpx.Response:
        calls.append(1)
        if len(calls) == 1:
            raise httpx.RemoteProtocolError("gone", request=request)
        return judges(request) if len(calls) == 3 else httpx.Response(503)

    with scripted(handler) as client:
        assert client.critique(None, "?", PAIR).winner == 2
    assert len(calls) == 3


def many(count: int) -> list[Case]:
    """Every third is refused by the service, every fourth by ourselves; the others' winner is 1 or 2."""
    return [
        Case(
            "please refuse" if n % 3 == 0 else "?",
            ["lonely"] if n % 4 == 0 else [f"score={n % 2}", "score=0"],
            id=str(n),
        )
        for n in range(1, count + 1)
    ]


def check_many(results: list[CritiqueResult | CriticError]) -> None:
    for n, result in enumerate(results, 1):
        if n % 3 == 0 or n % 4 == 0:
            assert isinstance(result, CaseRefused)
            assert result.status == (None if n % 4 == 0 else 422)
        else:
            assert isinstance(result, CritiqueResult) and result.winner == 1


def test_many_keep_their_order_and_their_errors() -> None:
    with scripted(judges) as client:
        results = client.critique_many(many(50), concurrency=7)
        assert len(results) == 50 and client.critique_many([]) == []
        check_many(results)
        with pytest.raises(ValueError, match="concurrency=0"):
            client.critique_many(many(1), concurrency=0)


async def test_the_async_client_does_the_same() -> None:
    async def handler(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.001 * (len(request.content) % 5))
        return judges(request)

    async with AsyncCriticClient(token=TOKEN, transport=httpx.MockTransport(handler)) as client:
        check_many(await client.critique_many(many(50), concurrency=7))
        assert (await client.critique(PNG, "?", PAIR)).winner == 2
        with pytest.raises(CaseRefused, match="at most 7 tokens"):
            await client.critique(None, "please refuse", PAIR)
        with pytest.raises(ValueError, match="concurrency=0"):
            await client.critique_many(many(1), concurrency=0)


async def test_no_more_at_once_than_was_asked_for() -> None:
    inside, most = 0, 0

    async def handler(request: httpx.Request) -> httpx.Response:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0.005)
        inside -= 1
        return judges(request)

    async with AsyncCriticClient(token=TOKEN, transport=httpx.MockTransport(handler)) as client:
        await client.critique_many([Case("?", PAIR)] * 20, concurrency=3)
    assert most == 3


def test_a_stream_holds_few_cases_at_once() -> None:
    taken: list[int] = []

    def cases() -> Iterator[Case]:
        for n in range(100):
            taken.append(n)
            yield Case("?", PAIR)

    with scripted(judges) as client:
        stream = client.critique_stream(cases(), concurrency=2)
        next(stream)
        assert len(taken) <= 4
        assert len(list(stream)) == 99


def test_leaving_a_stream_stops_it() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        text = request.content.decode()
        return judges(request) if "score=2" in text else httpx.Response(503)

    cases = [Case("?", PAIR), *[Case("?", ["a", "b"])] * 7]
    start = time.monotonic()
    with scripted(handler, retry=Retry(first_wait_s=30, longest_wait_s=30)) as client:
        stream = client.critique_stream(cases, concurrency=4)
        assert isinstance(next(stream), CritiqueResult)
        stream.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 10


def test_a_batch_is_one_request() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/v1/critique/batch"
        cases = json.loads(request.content)["cases"]
        assert [case["question"] for case in cases] == ["?", "please refuse", "busy"]
        second = problem("invalid_request", "too long")
        third = {"error": {"code": "unavailable", "message": "busy"}}
        return httpx.Response(200, json={"results": [a_report(1), second, third]})

    cases = [Case("?", PAIR), Case("please refuse", PAIR), Case("busy", PAIR)]
    with scripted(handler) as client:
        first, second, third = client.critique_batch(cases)
    assert isinstance(first, CritiqueResult) and first.winner == 1
    assert isinstance(second, CaseRefused) and str(second) == "too long"
    assert (second.code, second.request_id) == ("invalid_request", "r-1")
    assert isinstance(third, CriticUnavailable)


async def test_a_batch_that_fails_as_a_whole() -> None:
    for handler, words in (
        (answers(404, problem("not_found", "not found")), "answered 404"),
        (answers(200, {"results": []}), "does not have its 1 results"),
        (answers(200, []), "does not have its 1 results"),
    ):
        transport = httpx.MockTransport(handler)
        async with AsyncCriticClient(token=TOKEN, transport=transport) as client:
            with pytest.raises(CriticFailed, match=words):
                await client.critique_batch([Case("?", PAIR)])
            with pytest.raises(CaseRefused, match="case 2: 0 responses"):
                await client.critique_batch([Case("?", PAIR), Case("?", [])])


def test_readiness() -> None:
    assert scripted(answers(200, {"status": "ready"})).ready() is True
    assert scripted(answers(503, problem("unavailable", "no"))).ready() is False
    with pytest.raises(CriticFailed):
        scripted(answers(404, b"nothing")).ready()
    with pytest.raises(CriticUnavailable, match="connection refused; 3 tries"):
        CriticClient(f"http://127.0.0.1:{free_port()}", retry=QUICK).ready()


def test_importing_the_client_is_light() -> None:
    program = (
        "import json, sys, time; start = time.perf_counter(); import sima_ray.client; "
        "print(json.dumps([time.perf_counter() - start, list(sys.modules)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    _, loaded = json.loads(done.stdout)
    heavy = {"torch", "ray", "vllm", "deepspeed", "transformers", "pyarrow", "numpy", "PIL"}
    heavy |= {"pydantic", "fastapi", "serve_apps", "jobs"}
    assert heavy & {name.split(".")[0] for name in loaded} == set()

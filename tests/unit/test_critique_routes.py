"""The critic's own routes in one process: reports, rankings, batches, forms, symmetry, and examples that run."""

import asyncio
import json
import math
import random
from typing import Any

import httpx
import pytest
from critic_app import (
    Noisy,
    ScoringPolicy,
    Tally,
    case,
    client,
    data_url,
    error_of,
    judge,
    png,
)

MIRROR = {1: 2, 2: 1, None: None}
OUTCOMES = {"preferred_first": "preferred_second", "preferred_second": "preferred_first"}


async def test_a_verdict_and_its_probability() -> None:
    async with client(ScoringPolicy()) as http:
        report = await judge(http, case(1, 3, image=data_url(png())))
    assert (report["winner"], report["consistent"], report["ranking"]) == (2, True, [2, 1])
    assert (report["outcome"], report["agreement"], report["comparisons"]) == (
        "preferred_second",
        1.0,
        [],
    )
    assert report["probability"] == pytest.approx(1 / (1 + math.exp(2)))
    assert [order["probability"] for order in report["orders"]] == [report["probability"]] * 2
    assert [order["choice"] for order in report["orders"]] == [2, 1]
    assert (report["tokens"], report["model_version"]) == (18, "fake-1")


@pytest.mark.parametrize(
    ("question", "scores", "winner", "outcome", "probability", "ranking"),
    [
        ("please be partial", (1, 2), None, "inconsistent", 0.5, [1, 2]),
        ("please mumble", (1, 2), None, "unparseable", None, [1, 2]),
        ("What?", (3, 3), None, "identical", 0.5, [1, 2]),
        ("please hide", (1, 2), 2, "preferred_second", None, [2, 1]),
    ],
)
async def test_outcomes(
    question: str,
    scores: tuple[float, float],
    winner: int | None,
    outcome: str,
    probability: float | None,
    ranking: list[int],
) -> None:
    async with client(ScoringPolicy()) as http:
        report = await judge(http, case(*scores, question=question))
    found = (report["winner"], report["outcome"], report["probability"], report["ranking"])
    assert found == (winner, outcome, probability, ranking)


async def test_swapped_responses_mirror_the_report_exactly() -> None:
    """Pairs drawn at random, with a critic that has no symmetry of its own; every one of them."""
    draw = random.Random(5)
    pairs = [(draw.random(), draw.random()) for _ in range(600)]
    async with client(Noisy(), max_ongoing_requests=600, request_timeout_s=120) as http:
        there = await asyncio.gather(*(judge(http, case(a, b)) for a, b in pairs))
        back = await asyncio.gather(*(judge(http, case(b, a)) for a, b in pairs))
    for one, other in zip(there, back, strict=True):
        assert other["winner"] == MIRROR[one["winner"]]
        assert other["outcome"] == OUTCOMES.get(one["outcome"], one["outcome"])
        assert other["consistent"] == one["consistent"]
        assert [o["raw"] for o in other["orders"]] == [o["raw"] for o in one["orders"]][::-1]
        if one["probability"] is None:
            assert other["probability"] is None
        else:
            assert one["probability"] + other["probability"] == 1
    kinds = {report["outcome"] for report in there}
    assert kinds == {"preferred_first", "preferred_second", "inconsistent", "unparseable"}
    assert len({report["probability"] for report in there}) > 400


async def test_more_than_two_are_ranked() -> None:
    policy = ScoringPolicy()
    async with client(policy) as http:
        report = await judge(http, case(2, 5, 3, 5, 9))
    assert (report["ranking"], report["winner"], report["outcome"]) == (
        [5, 2, 4, 3, 1],
        5,
        "preferred",
    )
    assert (report["consistent"], report["agreement"], report["orders"]) == (True, 1.0, [])
    assert report["probability"] is None and len(report["comparisons"]) == 10
    by_pair = {tuple(c["responses"]): c for c in report["comparisons"]}
    assert (by_pair[1, 5]["winner"], by_pair[2, 3]["winner"]) == (5, 2)
    same = by_pair[2, 4]  # nobody is asked about those
    assert (same["outcome"], same["winner"], same["orders"]) == ("identical", None, [])
    assert len(policy.requests) == 18 and report["tokens"] == 9 * 18
    assert by_pair[1, 3]["probability"] == pytest.approx(1 / (1 + math.e))
    assert [o["choice"] for o in by_pair[1, 5]["orders"]] == [2, 1]


async def test_a_ranking_without_a_winner() -> None:
    async with client(ScoringPolicy()) as http:
        partial = await judge(http, case(1, 2, 3, question="please be partial"))
        same = await judge(http, case(4, 4, 4))
    assert (partial["winner"], partial["outcome"], partial["ranking"]) == (
        None,
        "undecided",
        [1, 2, 3],
    )
    assert (partial["agreement"], partial["consistent"]) == (0.0, False)
    assert (same["winner"], same["outcome"], same["agreement"]) == (None, "identical", 1.0)
    assert (same["model_version"], same["tokens"]) == ("", 0)


async def test_permuted_responses_permute_the_ranking() -> None:
    draw = random.Random(1)
    async with client(ScoringPolicy()) as http:
        for _ in range(10):
            scores = draw.sample(range(20), 4)
            report = await judge(http, case(*scores))
            assert [scores[number - 1] for number in report["ranking"]] == sorted(scores)[::-1]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"responses": ["one"]}, "responses: "),
        ({"responses": ["x"] * 9}, "responses: over the 8 allowed"),
        ({"responses": ["x", "x" * 2001]}, "responses.1: over"),
        ({"image": "https://example.com/cat.png"}, "image: only data: URLs"),
        ({"image": "data:image/gif;base64,R0lG"}, "image: must be a data:"),
        ({"probability": 1}, "probability: "),
    ],
)
async def test_bad_cases(bad: dict[str, Any], words: str) -> None:
    async with client(ScoringPolicy()) as http:
        reply = await http.post("/v1/critique", json=case(1, 2) | bad)
    status, code, message = error_of(reply)
    assert (status, code) == (422, "invalid_request") and message.startswith(words), message


async def test_a_batch_keeps_its_order_and_a_bad_case_spoils_no_other() -> None:
    policy, tally = ScoringPolicy(), Tally()
    cases: list[Any] = [
        case(1, 2),
        {"question": "?"},
        case(1, 2, question="please refuse"),
        "no case",
        case(1, 2, question="please be down"),
        case(1, 2, question="please break"),
        case(3, 1, 2),
        case(1, 2, image="data:image/png;base64,AAAA"),
        case(1, 2, question="please wait"),
    ]
    async with client(policy, tally, request_timeout_s=1) as http:
        reply = await http.post("/v1/critique/batch", json={"cases": cases})
    assert reply.status_code == 200 and "secret" not in reply.text
    results = reply.json()["results"]
    assert [result.get("winner") for result in results] == [2, *[None] * 5, 1, None, None]
    assert [result.get("error", {}).get("code") for result in results] == [
        None,
        "invalid_request",
        "invalid_request",
        "invalid_request",
        "unavailable",
        "internal",
        None,
        "invalid_request",
        "timeout",
    ]
    assert "at most 7 tokens" in results[2]["error"]["message"]
    assert len(tally.reports) == 2 and len(tally.codes) == 7
    assert sum(report.tokens for report in tally.reports) == 18 + 54


async def test_a_batch_is_bounded() -> None:
    policy = ScoringPolicy()
    async with client(policy) as http:
        cases = [case(n, n + 1, n + 2) for n in range(64)]
        reply = await http.post("/v1/critique/batch", json={"cases": cases})
        assert [r["ranking"] for r in reply.json()["results"]] == [[3, 2, 1]] * 64
        assert len(policy.requests) == 64 * 6 and 16 < policy.most <= 32
        for wrong in ([], [*cases, cases[0]]):
            reply = await http.post("/v1/critique/batch", json={"cases": wrong})
            assert error_of(reply)[:2] == (422, "invalid_request")


@pytest.mark.parametrize("prefix", ["", "/critic-b"])
async def test_a_form_with_an_image_file(prefix: str) -> None:
    policy = ScoringPolicy()
    fields = {"question": "Was ißt sie?", "responses": ["score=1", "score=4"]}
    async with client(policy, prefix=prefix) as http:
        file = {"image": ("cat.png", png(), "image/png")}
        reply = await http.post("/v1/critique", data=fields, files=file)
        assert reply.status_code == 200, reply.text
        assert reply.json()["winner"] == 2
        assert "1 images" in reply.json()["orders"][0]["reason"]
        (part,) = [p for p in policy.requests[0]["content"] if p["type"] == "image"]
        assert part["image"] == png()
        assert any("Was ißt sie?" in p.get("text", "") for p in policy.requests[0]["content"])


@pytest.mark.parametrize(
    ("data", "files", "words"),
    [
        ({}, {"image": b"GIF89a"}, "image: not a readable"),
        ({}, {"question": png()}, "question: only the image may be a file"),
        ({"question": ["one", "two"]}, {"image": png()}, "question: more than once"),
        ({"extra": "1"}, {"image": png()}, "extra: "),
        ({"responses": ["score=1"]}, {"image": png()}, "responses: "),
    ],
)
async def test_bad_forms(data: dict[str, Any], files: dict[str, bytes], words: str) -> None:
    fields = {"question": "What?", "responses": ["score=1", "score=4"]} | data
    async with client(ScoringPolicy()) as http:
        reply = await http.post("/v1/critique", data=fields, files=files)
    status, code, message = error_of(reply)
    assert (status, code) == (422, "invalid_request") and message.startswith(words), message


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("multipart/form-data; boundary=x", b"nonsense", 422),
        ("multipart/form-data; boundary=x", b"--x\r\nnonsense", 422),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="q"',
            422,
        ),
        ("multipart/form-data; boundary=", b"--x--", 422),
        ("multipart/form-data; b=x", b"--x--", 422),
        ("multipart/form-data", b"--x--", 415),
        ("text/plain", b"{}", 415),
    ],
)
async def test_broken_forms(content_type: str, body: bytes, status: int) -> None:
    async with client(ScoringPolicy()) as http:
        headers = {"Content-Type": content_type}
        reply = await http.post("/v1/critique", content=body, headers=headers)
        assert error_of(reply)[0] == status
        elsewhere = await http.post("/v1/critique/batch", content=body, headers=headers)
        assert error_of(elsewhere)[0] == 415


async def test_every_example_of_the_schema_runs() -> None:
    async with client(_Any()) as http:
        schema = (await http.get("/openapi.json")).json()
        ran = 0
        for path, methods in schema["paths"].items():
            if "post" not in methods:
                assert (await http.get(path)).status_code == 200
                continue
            content = methods["post"]["requestBody"]["content"]
            kinds = {"application/json"} | ({"multipart/form-data"} & {*content})
            assert {*content} == kinds
            name = content["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
            for example in schema["components"]["schemas"][name]["examples"]:
                reply = await http.post(path, json=example)
                assert reply.status_code == 200, (path, reply.text)
                ran += 1
        assert ran == 5
    text = json.dumps(schema)
    names = {ref.split('"')[0] for ref in text.split("#/components/schemas/")[1:]}
    assert names <= {*schema["components"]["schemas"]}


async def test_the_schema_needs_a_token() -> None:
    from serve_apps.critic import CriticApp, make_app

    transport = httpx.ASGITransport(make_app(CriticApp.model_validate({}), ScoringPolicy()))
    async with httpx.AsyncClient(transport=transport, base_url="http://critic") as http:
        for path in ("/openapi.json", "/v1/models"):
            assert error_of(await http.get(path))[:2] == (401, "unauthorized")


class _Any(Noisy):
    """Answers requests of all kinds."""

    async def complete(self, request: Any) -> Any:
        return await super().complete(request) | {"finish_reason": "stop"}

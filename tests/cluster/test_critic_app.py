"""The critic over real HTTP on real Serve, asking a fake policy that says which verdict it gives and why."""

import base64
import io
import json
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image

from sima_ray.config import CriticConfig, ServiceConfig
from sima_ray.errors import ServiceError
from sima_ray.ports import Policy

TOKEN = "a-token-of-the-tests"
SERVICE = ServiceConfig(
    max_body_bytes=200_000, max_image_pixels=1_000_000, max_text_chars=2_000, request_timeout_s=20
)


class FakePolicy(Policy):
    """Prefers the response with the higher `score=N`; words in the question make it do other things."""

    async def complete(self, request: Any) -> Any:
        text = "".join(part.get("text", "") for part in request["content"])
        images = [part for part in request["content"] if part["type"] == "image"]
        if "please refuse" in text:
            return {"error": "too long: the model reads at most 7 tokens"}
        if "please go on" in text:
            return {
                "text": "on and on " * 60_000 + "Choice: [[1]]",
                "tokens": 9,
                "finish_reason": "stop",
            }
        if "please fail" in text:
            raise RuntimeError("secret: the engine at 10.0.0.1 pid 42 died")
        if "Response 1:" not in text:
            return {"text": f"{len(images)} images", "tokens": 2, "finish_reason": "stop"}
        scores = [int(score) for score in re.findall(r"score=(\d+)", text)]
        choice = 1 if "please be partial" in text or scores[-2] >= scores[-1] else 2
        verdict = "I cannot say." if "please mumble" in text else f"Choice: [[{choice}]]"
        answer = f"Reason with {len(images)} images.\n{verdict}"
        said = [-0.1, -2.4] if choice == 1 else [-2.4, -0.1]
        told = {"tokens": 9, "model_version": "fake-1", "finish_reason": "stop"}
        return {"text": answer, "alternatives": said, **told}


@pytest.fixture(scope="module")
def url(ray_cluster: None) -> Iterator[str]:
    """A deployed critic with the fake policy behind it."""
    from ray import cloudpickle, serve

    from sima_ray.runtime.critic_token import token_hash
    from sima_ray.runtime.serving import deploy_critic, start_serve

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    start_serve(port=0)
    fake: Any = serve.deployment(FakePolicy, name="Policy", ray_actor_options={"num_cpus": 0.1})
    serve.run(fake.bind(), name="policy", route_prefix=None)
    yield deploy_critic(CriticConfig(), SERVICE, token_hashes=[token_hash(TOKEN)])
    serve.shutdown()


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120
    ) as client:
        yield client


def body(
    question: str = "What is it?", scores: tuple[int, int] = (1, 2), **more: Any
) -> dict[str, Any]:
    return {"question": question, "responses": [f"score={s}" for s in scores], **more}


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def png(width: int = 32, height: int = 32) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 40, 40)).save(file, "PNG")
    return file.getvalue()


def judge(http: httpx.Client, **request: Any) -> dict[str, Any]:
    reply = http.post("/v1/critique", json=request)
    assert reply.status_code == 200, reply.text
    return reply.json()


def error_of(reply: httpx.Response) -> dict[str, str]:
    """The error, which has one shape and tells nothing of the inside."""
    assert set(reply.json()) == {"error"}
    error = reply.json()["error"]
    assert set(error) == {"code", "message", "request_id"}
    assert error["request_id"] == reply.headers["x-request-id"]
    assert not re.search(r"Traceback|File \"|pid|10\.0\.0\.1|0x[0-9a-f]{6}|ray", reply.text)
    return error


def test_a_verdict(http: httpx.Client) -> None:
    report = judge(http, **body(scores=(1, 5), image=data_url(png()), ground_truth="A cup."))
    assert (report["winner"], report["consistent"]) == (2, True)
    assert report["outcome"] == "preferred_second"
    assert [(o["order"], o["choice"]) for o in report["orders"]] == [("12", 2), ("21", 1)]
    assert all(o["reason"] == "Reason with 1 images." for o in report["orders"])
    assert report["orders"][0]["raw"].endswith("[[2]]")
    assert (report["model_version"], report["tokens"]) == ("fake-1", 18)
    assert len(report["prompt_version"]) == 12 and report["seconds"] < 10
    assert (
        report["probability"] == report["orders"][0]["probability"] == pytest.approx(0.09, abs=0.01)
    )


def test_all_routes_over_real_http(http: httpx.Client) -> None:
    """What tests/unit does in one process, once each through Serve's proxy."""
    ranked = judge(http, question="What?", responses=["score=1", "score=3", "score=2"])
    assert (ranked["ranking"], ranked["winner"]) == ([2, 3, 1], 2)
    cases = [body(scores=(1, 2)), {}, body(scores=(2, 1))]
    results = http.post("/v1/critique/batch", json={"cases": cases}).json()["results"]
    assert [result.get("winner") for result in results] == [2, None, 1]
    form = {"question": "What?", "responses": ["score=1", "score=3"]}
    uploaded = http.post("/v1/critique", data=form, files={"image": png()}).json()
    assert uploaded["winner"] == 2 and "1 images" in uploaded["orders"][0]["reason"]
    chat = {"model": "policy", "messages": [{"role": "user", "content": "Hello"}]}
    answer = http.post("/v1/chat/completions", json=chat).json()
    assert answer["choices"][0]["message"]["content"] == "0 images"


def test_verdicts_are_counted_on_rays_metrics_endpoint(http: httpx.Client) -> None:
    import ray

    judge(http, **body("please mumble"))
    http.post("/v1/critique", json={})
    (node,) = ray.nodes()
    endpoint = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = (
        r'ray_sima_critiques(_total)?{[^}]*outcome="unparseable"',
        r"ray_sima_critique_seconds_bucket{",
        r"ray_sima_critique_tokens(_total)?{",
    )
    deadline, text = time.monotonic() + 60, ""
    while time.monotonic() < deadline:
        text = httpx.get(endpoint).text
        if all(re.search(pattern, text) for pattern in wanted):
            return
        time.sleep(1)  # Ray exports every few seconds
    pytest.fail("\n".join(line for line in text.splitlines() if "sima" in line))


@pytest.mark.parametrize(
    ("question", "scores", "winner", "consistent", "outcome"),
    [
        ("please be partial", (1, 2), None, False, "inconsistent"),
        ("please mumble", (1, 2), None, False, "unparseable"),
        ("What is it?", (3, 3), None, True, "identical"),
        ("What is it?", (4, 3), 1, True, "preferred_first"),
    ],
)
def test_outcomes(
    http: httpx.Client,
    question: str,
    scores: tuple[int, int],
    winner: int | None,
    consistent: bool,
    outcome: str,
) -> None:
    report = judge(http, **body(question, scores))
    assert (report["winner"], report["consistent"]) == (winner, consistent)
    assert report["outcome"] == outcome


def test_swapped_responses_mirror_the_verdict(http: httpx.Client) -> None:
    mirrored = {1: 2, 2: 1, None: None}
    pairs = [(a, b) for a in range(1, 9) for b in range(1, 9)]
    with ThreadPoolExecutor(16) as pool:
        there = list(pool.map(lambda p: judge(http, **body(scores=p)), pairs))
        back = list(pool.map(lambda p: judge(http, **body(scores=(p[1], p[0]))), pairs))
    for a, b in zip(there, back, strict=True):
        assert b["winner"] == mirrored[a["winner"]] and b["consistent"] == a["consistent"]
        assert [o["raw"] for o in a["orders"]] == [o["raw"] for o in reversed(b["orders"])]


@pytest.mark.parametrize(
    "change",
    [
        {"responses": ["one"]},
        {"responses": [f"score={n}" for n in range(9)]},
        {"responses": "ab"},
        {"responses": [1, 2]},
        {"question": ""},
        {"question": None},
        {"question": {"a": 1}},
        {"question": "x" * 2_001},
        {"question": "\ud800"},
        {"ground_truth": "x" * 2_001},
        {"extra": 1},
        {"image": "https://example.com/cat.png"},
        {"image": "file:///etc/passwd"},
        {"image": "data:text/html;base64,AAAA"},
        {"image": "data:image/png;base64,!!!"},
        {"image": "data:image/png;base64,"},
        {"image": data_url(b"GIF89a not an image")},
        {"image": data_url(png(2000, 1000))},
        {"image": data_url(png(2000, 1))},
    ],
)
def test_malformed_requests_get_422(http: httpx.Client, change: dict[str, Any]) -> None:
    raw = json.dumps(body() | change)  # httpx itself would not send half a surrogate pair
    reply = http.post("/v1/critique", content=raw, headers={"Content-Type": "application/json"})
    assert (reply.status_code, error_of(reply)["code"]) == (422, "invalid_request"), reply.text


@pytest.mark.parametrize(
    ("raw", "statuses"),
    [
        (b"", {422}),
        (b"{", {422}),
        (b"[]", {422}),
        (b"null", {422}),
        (b"\xff\xfe", {400, 422}),
        (b"[" * 50_000, {400, 422}),
        (b'{"question": NaN}', {422}),
        (b"x" * 200_001, {413}),
        (b'{"question": "a", "question": "b"}', {422}),
        (b"9" * 5_000, {422}),
    ],
)
def test_raw_nonsense_gets_4xx(http: httpx.Client, raw: bytes, statuses: set[int]) -> None:
    reply = http.post("/v1/critique", content=raw, headers={"Content-Type": "application/json"})
    assert reply.status_code in statuses
    error_of(reply)


def test_a_chunked_flood_is_cut(http: httpx.Client) -> None:
    reply = http.post("/v1/critique", content=(b"x" * 10_000 for _ in range(500)))
    assert (reply.status_code, error_of(reply)["code"]) == (413, "too_large")


def test_the_token_is_needed(url: str, http: httpx.Client) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
        for path in ("/v1/critique", "/openapi.json", "/no-such-route"):
            reply = httpx.post(f"{url}{path}", json=body(), headers=headers)
            assert (reply.status_code, error_of(reply)["code"]) == (401, "unauthorized")
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{url}/readyz").status_code in (200, 503)


def test_unknown_routes_and_methods(http: httpx.Client) -> None:
    for reply, status in ((http.get("/no-such-route"), 404), (http.get("/v1/critique"), 405)):
        assert reply.status_code == status
        error_of(reply)
    assert "/v1/critique" in http.get("/openapi.json").json()["paths"]


def test_what_the_policy_refuses_is_a_422_with_its_words(http: httpx.Client) -> None:
    reply = http.post("/v1/critique", json=body("please refuse"))
    assert reply.status_code == 422
    assert error_of(reply)["message"] == "too long: the model reads at most 7 tokens"


def test_a_long_answer_arrives(http: httpx.Client) -> None:
    """Longer than the 4 MiB that Ray lets one message between its processes have."""
    batch = {"cases": [body("please go on"), body("please go on"), body()]}
    reply = http.post("/v1/critique/batch", json=batch)
    assert reply.status_code == 200 and len(reply.content) > 4 * 2**20
    assert len(reply.json()["results"]) == 3


def test_a_policy_that_fails_is_a_503_without_its_words(http: httpx.Client) -> None:
    reply = http.post("/v1/critique", json=body("please fail"))
    assert (reply.status_code, error_of(reply)["code"]) == (503, "unavailable")
    assert "retry-after" in reply.headers and "secret" not in reply.text


def test_a_second_critic_under_a_prefix(url: str) -> None:
    from sima_ray.runtime.critic_token import token_hash
    from sima_ray.runtime.serving import deploy_critic, remove

    other = deploy_critic(
        CriticConfig(),
        SERVICE,
        token_hashes=[token_hash(TOKEN)],
        name="critic-b",
        route_prefix="/critic-b",
    )
    assert other == f"{url}/critic-b"
    for probe in ("/healthz", "/readyz"):
        assert httpx.get(f"{other}{probe}").status_code == 200
    form = {"question": "What?", "responses": ["score=1", "score=3"]}
    headers = {"Authorization": f"Bearer {TOKEN}"}
    sent: dict[str, Any] = {"data": form, "files": {"image": png()}}
    assert httpx.post(f"{other}/v1/critique", **sent).status_code == 401
    judged = httpx.post(f"{other}/v1/critique", headers=headers, timeout=120, **sent).json()
    assert judged["winner"] == 2
    remove("critic-b")
    assert httpx.get(f"{url}/healthz").status_code == 200


def test_a_second_serve_address_is_refused(url: str) -> None:
    from sima_ray.runtime.serving import start_serve

    port = int(url.rsplit(":", 1)[1])
    assert start_serve(port=port) == port
    with pytest.raises(ServiceError, match="already listens"):
        start_serve(port=port + 1)

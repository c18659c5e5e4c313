"""The critic's client and `sima critique` against the real app on real Serve, with a fake policy behind it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_critic_app import SERVICE, TOKEN, png
from test_critic_app import url as url  # the fixture

from sima_ray.client import (
    AsyncCriticClient,
    Case,
    CaseRefused,
    CriticClient,
    CriticUnavailable,
    CritiqueResult,
    Retry,
    TokenRefused,
)

SIMA = Path(sys.executable).parent / "sima"
PAIR = ["score=1", "score=2"]


async def test_the_client_and_the_command_ask_the_real_app(url: str, tmp_path: Path) -> None:
    (tmp_path / "cup.png").write_bytes(png())
    with CriticClient(url, TOKEN, retry=Retry(attempts=2, first_wait_s=0.1)) as critic:
        assert critic.ready() is True
        result = critic.critique(tmp_path / "cup.png", "What is it?", PAIR, "A cup.")
        assert (result.winner, result.consistent, result.outcome) == (2, True, "preferred_second")
        assert [(o.order, o.choice, o.winner) for o in result.orders] == [
            ("12", 2, 2),
            ("21", 1, 2),
        ]
        assert result.orders[0].reason == "Reason with 1 images."
        assert result.request_id and len(result.prompt_version) == 12
        assert result.probability == pytest.approx(0.09, abs=0.01)
        ranked = critic.critique(None, "?", [*PAIR, "score=0"])
        assert (ranked.ranking, ranked.winner, len(ranked.comparisons)) == ((2, 1, 3), 2, 3)
        with pytest.raises(CaseRefused, match="at most 7 tokens"):
            critic.critique(None, "please refuse", PAIR)
        with pytest.raises(CaseRefused, match="over the 200,000 bytes") as refused:
            critic.critique(None, "?", ["x" * SERVICE.max_body_bytes, ""])
        assert (refused.value.status, refused.value.code) == (413, "too_large")
        with pytest.raises(CriticUnavailable, match="2 tries in") as busy:
            critic.critique(None, "please fail", PAIR)
        assert (busy.value.status, busy.value.code) == (503, "unavailable")
        assert busy.value.request_id
    with CriticClient(url, "wrong") as stranger, pytest.raises(TokenRefused):
        stranger.critique(None, "?", PAIR)

    async with AsyncCriticClient(url, TOKEN) as critic:
        cases = [
            Case("please refuse" if n % 5 == 0 else "?", [f"score={2 - n % 2 * 2}", "score=1"])
            for n in range(40)
        ]
        results = await critic.critique_many(cases, concurrency=10)
    for n, result in enumerate(results):
        if n % 5 == 0:
            assert isinstance(result, CaseRefused)
        else:
            assert isinstance(result, CritiqueResult)
            assert result.winner == 1 + n % 2

    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "cases.jsonl").write_text(
        "".join(
            json.dumps({"id": name, "image": name, "question": "?", "responses": PAIR}) + "\n"
            for name in ("cup.png", "lost.png")
        )
    )

    def sima(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [str(SIMA), "critique", "--url", url, "--token-file", "token", *arguments],
            cwd=tmp_path,
            env=os.environ | {"NO_COLOR": "1"},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    done = sima(
        *("--image", "cup.png", "--question", "What is it?"),
        *("--response", PAIR[0], "--response", PAIR[1]),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("winner       response 2, in both orders\n")
    done = sima("--file", "cases.jsonl")
    good, bad = (json.loads(line) for line in done.stdout.splitlines())
    assert (good["id"], good["winner"], good["outcome"]) == ("cup.png", 2, "preferred_second")
    assert (bad["id"], bad["error"]["code"]) == ("lost.png", "invalid_image")
    assert done.returncode == 1 and "1 of 2 cases have no verdict" in done.stderr

"""Where the critic's client finds its critic, and with which token."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fake_critic import TOKEN, says

from sima_ray.client import CriticClient, CriticUnavailable, TokenRefused
from sima_ray.client.settings import find_endpoint, find_in_cluster
from sima_ray.errors import ConfigError

pytestmark = pytest.mark.usefixtures("home")


def test_the_url_and_the_token_come_from_the_nearest_place(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(**given: Any) -> tuple[str, str | None]:
        endpoint = find_endpoint(**given)
        return endpoint.url, endpoint.token

    here = "http://127.0.0.1:8000"
    assert found() == (here, None)
    assert not (home / "critic-token").exists()  # asking makes none
    (home / "critic-token").write_text("left-by-serve\n")
    assert found() == (here, "left-by-serve")
    monkeypatch.setenv("SIMA_CRITIC_TOKEN", "of-the-environment")
    monkeypatch.setenv("SIMA_CRITIC_URL", "https://critic.example/base/")
    assert found() == ("https://critic.example/base", "of-the-environment")
    file = home / "tokens"
    file.write_text("# ours\n\nof-the-file\nanother\n")
    assert found(token_file=file)[1] == "of-the-file"
    assert found(url="http://h:1/v1/critique", token=" given ") == ("http://h:1", "given")


def test_the_token_is_never_shown() -> None:
    endpoint = find_endpoint(token=TOKEN)
    client = CriticClient(token=TOKEN)
    assert TOKEN not in f"{endpoint!r} {client!r} {client}"


@pytest.mark.parametrize(
    "url", ["head:8000", "127.0.0.1:8000", "ftp://h", "http://", "http://h:99999", "http://h/?a=1"]
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match="not a critic's URL"):
        CriticClient(url)


def test_a_password_in_the_url_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        CriticClient("http://me:secret@h:1")
    assert "secret" not in str(caught.value)


def test_tokens_that_are_none(home: Path) -> None:
    for text in ("", "# nothing\n", "two words", "naïve"):
        (home / "critic-token").write_text(text)
        with pytest.raises(TokenRefused, match=r"critic-token: .*token") as caught:
            CriticClient()
        assert "two words" not in str(caught.value)
    with pytest.raises(TokenRefused, match="cannot be read: No such file"):
        CriticClient(token_file=home / "none")
    with pytest.raises(TokenRefused, match="the token given: not a token"):
        CriticClient(token="a\r\nb")


def test_the_cluster_knows_the_url(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/api/serve/applications/"
            known = self.headers.get("Authorization") == "Bearer of-the-cluster"
            says(200 if known else 401, found)(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    found: dict[str, Any] = {"applications": {}, "http_options": None}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "auth-token"))
        with pytest.raises(TokenRefused, match=r"give its token in \$RAY_AUTH_TOKEN"):
            find_in_cluster(address)
        (home / "auth-token").write_text("of-the-cluster\n")
        with pytest.raises(CriticUnavailable, match="no critic is served there: sima serve"):
            find_in_cluster(address)
        found["http_options"] = {"host": "0.0.0.0", "port": 8123}
        found["applications"] = {"critic": {"route_prefix": "/"}}
        assert CriticClient.from_cluster(address).url == "http://127.0.0.1:8123"
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(CriticUnavailable, match="does not say what it serves"):
        find_in_cluster(address)

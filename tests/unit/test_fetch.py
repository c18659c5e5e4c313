"""Images from a server on this machine: resumed, mended, tried again, never counted when they are not whole."""

import io
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from sima_ray.cli import app
from sima_ray.data import fetch
from sima_ray.data.fetch import fetch_images
from sima_ray.data.locations import load_image
from sima_ray.data.names import bare_name
from sima_ray.errors import ConfigError, DataError


def jpeg(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (colour, 0, 0)).save(file, "JPEG")
    return file.getvalue()


class Server(ThreadingHTTPServer):
    """Answers by what is planned for a name: a status, a body, or one of these.

    "cut": a body that ends before its length; "packed": said to be compressed, and it is not; "http:…": elsewhere.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan: dict[str, list[Any]] = {}
        self.asked: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self.server_port}/train2017/"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        name = self.path.removeprefix("/train2017/")
        plan = server.plan.get(name, [404])
        step = plan[min(server.asked[name], len(plan) - 1)]
        server.asked[name] += 1
        if isinstance(step, int):
            self.send_error(step)
            return
        body = jpeg(9) if isinstance(step, str) else step
        elsewhere = isinstance(step, str) and step.startswith("http")
        self.send_response(302 if elsewhere else 200)
        if elsewhere:
            self.send_header("Location", step)
        if step == "packed":
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if step == "cut" else body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetch, "FIRST_WAIT_S", 0.001)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def write(folder: Path, *names: Any) -> str:
    file = folder / "prompts.jsonl"
    lines = [{"image": name, "text": "What?", "ground_truth": "A cat."} for name in names]
    file.write_text("\n".join(map(json.dumps, lines)))
    return str(file)


def test_every_layout_is_one_file_and_a_second_time_nothing_is_asked(
    tmp_path: Path, server: Server
) -> None:
    server.plan = {"1.jpg": [jpeg(1)], "2.jpg": [jpeg(2)]}
    prompts = write(tmp_path, "1.jpg", "coco/train2017/2.jpg", "COCO_train2014_1.jpg", "2.jpg")
    seen: list[int] = []
    found = fetch_images(
        prompts, tmp_path / "images", server.url, on_progress=lambda at: seen.append(at.done)
    )
    assert (found.wanted, found.there, found.fetched, found.failed) == (2, 0, 2, {})
    assert found.size == len(jpeg(1)) + len(jpeg(2))
    assert sorted(seen) == [1, 2]
    assert load_image(str(tmp_path / "images"), "train2017/1.jpg", 10**6) == jpeg(1)
    again = fetch_images(prompts, tmp_path / "images", server.url)
    assert (again.there, again.fetched, server.asked.total()) == (2, 0, 2)


def test_what_was_cut_off_is_fetched_anew(tmp_path: Path, server: Server) -> None:
    server.plan = {"1.jpg": [jpeg(1)]}
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "1.jpg").write_bytes(jpeg(1)[:100])
    (folder / "1.jpg.partial").write_bytes(b"cut")
    found = fetch_images(write(tmp_path, "1.jpg"), folder, server.url)
    assert found.fetched == 1
    assert [file.name for file in folder.iterdir()] == ["1.jpg"]
    assert (folder / "1.jpg").read_bytes() == jpeg(1)


def test_failures_that_may_pass_are_tried_again_others_are_told(
    tmp_path: Path, server: Server
) -> None:
    server.plan = {
        "busy.jpg": [503, 429, jpeg(1)],
        "cut.jpg": ["cut", jpeg(2)],
        "always_cut.jpg": ["cut"],
        "page.jpg": [b"<html>not an image</html>"],
        "good.jpg": [jpeg(3)],
    }
    prompts = write(tmp_path, *server.plan, "gone.jpg")
    found = fetch_images(prompts, tmp_path / "images", server.url, connections=2)
    assert (found.wanted, found.fetched) == (6, 3)
    assert found.wanted == found.done
    assert found.failed.keys() == {"always_cut.jpg", "page.jpg", "gone.jpg"}
    assert found.failed["gone.jpg"].startswith("HTTP 404")
    assert (server.asked["gone.jpg"], server.asked["page.jpg"]) == (1, 1)
    assert server.asked["always_cut.jpg"] == fetch.ATTEMPTS
    kept = {file.name for file in (tmp_path / "images").iterdir()}
    assert kept == {"busy.jpg", "cut.jpg", "good.jpg"}


def test_an_image_over_the_limit_is_not_kept(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "MAX_IMAGE_BYTES", 100)
    server.plan = {"1.jpg": [jpeg(1)]}
    found = fetch_images(write(tmp_path, "1.jpg"), tmp_path / "images", server.url)
    assert found.failed == {"1.jpg": "over 100 bytes"}


def test_a_wrong_address_ends_it_early(tmp_path: Path, server: Server) -> None:
    prompts = write(tmp_path, *(f"{number}.jpg" for number in range(500)))
    with pytest.raises(DataError, match=r"none of 20 images .* HTTP 404"):
        fetch_images(prompts, tmp_path / "images", server.url + "elsewhere/", connections=4)
    assert server.asked.total() < 50


def test_the_few_that_the_server_lacks_do_not_end_it_when_the_others_are_there(
    tmp_path: Path, server: Server
) -> None:
    (tmp_path / "images").mkdir()
    for number in range(5):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(jpeg(1))
    prompts = write(tmp_path, *(f"{number}.jpg" for number in range(40)))
    found = fetch_images(prompts, tmp_path / "images", server.url, connections=4)
    assert (found.wanted, found.there, len(found.failed)) == (40, 5, 35)


@pytest.mark.parametrize(
    "name", ["../1.jpg", "/etc/1.jpg", "s3://bucket/1.jpg", "a/../../1.jpg", "."]
)
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    assert bare_name(name) is None
    with pytest.raises(DataError, match="names no image"):
        fetch_images(write(tmp_path, name, 7, None), tmp_path / "images", "http://127.0.0.1:9/")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:///etc/", "http or https"),
        ("http:///train2017/", "http or https"),
        ("http://host:port/", r"no address \(Invalid port: 'port'\): give one as in http://images"),
        ("http://xn--/", r"no address \(Malformed A-label"),
    ],
)
def test_what_is_no_address(tmp_path: Path, url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fetch_images(write(tmp_path, "1.jpg"), tmp_path, url)


def test_answers_and_names_that_httpx_itself_cannot_take_are_that_images(
    tmp_path: Path, server: Server
) -> None:
    server.plan = {
        "packed.jpg": ["packed"],
        "once.jpg": ["packed", jpeg(1)],
        "led.jpg": ["http://xn--/1.jpg"],
    }
    long = "a" * 70_000
    prompts = write(tmp_path, *server.plan, f"{long}.jpg")
    found = fetch_images(prompts, tmp_path / "images", server.url)
    assert (found.wanted, found.fetched, found.done) == (4, 1, 4)
    assert "Error -3 while decompressing" in found.failed["packed.jpg"]
    assert server.asked["packed.jpg"] == fetch.ATTEMPTS
    assert "URL too long" in found.failed[f"{long}.jpg"]
    assert found.failed["led.jpg"]


def test_the_command_says_what_it_did(tmp_path: Path, server: Server) -> None:
    server.plan = {"1.jpg": [jpeg(1)]}
    arguments = ["data", "images", write(tmp_path, "1.jpg", "2.jpg"), "--url", server.url]
    done = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "images")])
    assert done.exit_code == 1
    assert "2 images: 0 were there, 1 fetched (0.0 MB), 1 failed" in done.output
    assert "2.jpg: HTTP 404" in done.output

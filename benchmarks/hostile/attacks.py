"""Hostile requests to the critic, drawn from a seed: each family is a function that draws one."""

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from PIL import Image

from sima_ray.policy.chat import USER_TEXT_ESCAPES

JSON = "application/json"
ALLOWED = "images.invalid"
"""The host that the service fetches images from; nobody has it."""

FIELDS = ("image", "question", "ground_truth", "responses")
TOKEN = "the-token-of-the-hostile-run"


@dataclass
class Attack:
    """One request.

    Attributes:
        family: What kind of nonsense it is.
        body: Whole, or in chunks that are sent without a Content-Length.
        refused: It must get a 4xx; otherwise it may be answered too.
        token: None sends no Authorization header.
    """

    family: str
    body: bytes | list[bytes] = b""
    refused: bool = True
    method: str = "POST"
    path: str = "/v1/critique"
    headers: list[tuple[str, str]] = field(default_factory=list)
    content_type: str | None = JSON
    token: str | None = TOKEN


def attacks(seed: int, count: int, max_body_bytes: int, fetch_url: str) -> Iterator[Attack]:
    """`count` attacks, the families in turn.

    Args:
        seed: Of all draws.
        count: How many.
        max_body_bytes: The service's limit, which floods go over.
        fetch_url: An address that a service which fetches images would ask.
    """
    rng = random.Random(seed)
    families: list[Callable[[random.Random], Attack]] = [
        *(broken_image, lying_image, other_format, wrong_type, odd_number, deep, spoilt_json),
        *(lambda rng: address(rng, fetch_url), special_tokens, odd_text, odd_keys, odd_route),
        *(wrong_token, many_headers, lambda rng: flood(rng, max_body_bytes), odd_content_type),
        bit_flips,
    ]
    for i in range(count):
        yield families[i % len(families)](rng)


def case(**changes: Any) -> dict[str, Any]:
    """A sound request, with some of its fields changed."""
    sound = {"question": "What is it?", "ground_truth": "A cup.", "responses": ["A cup.", "Two."]}
    return sound | changes


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


@cache
def picture(kind: str = "PNG", width: int = 32, height: int = 32) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 40, 40)).save(file, kind)
    return file.getvalue()


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG whose header says what it likes."""
    header = struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [png_chunk(b"IHDR", header), *chunks, png_chunk(b"IEND", b"")]
    )


def with_image(family: str, data: bytes, kind: str = "png") -> Attack:
    return Attack(family, as_json(case(image=data_url(data, kind))))


def broken_image(rng: random.Random) -> Attack:
    """Cut off, or with bytes changed; the header may be sound."""
    kind = rng.choice(["PNG", "JPEG", "WEBP"])
    data = bytearray(picture(kind))
    if rng.random() < 0.5:
        del data[rng.randrange(len(data)) :]
    else:
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    attack = with_image("broken image", bytes(data), kind.lower())
    attack.refused = False  # a changed byte may do no harm
    return attack


def lying_image(rng: random.Random) -> Attack:
    """Bombs: huge sizes in small files, and megabytes behind a few compressed bytes."""
    made = bombs(rng.choice([50_000, 65_535, 2**31 - 1, 2**32 - 1, 100_000_000]))
    name = rng.choice(sorted(made))
    return with_image("bomb", made[name], "webp" if "webp" in name else "png")


@cache
def bombs(huge: int) -> dict[str, bytes]:
    """Such images by name; `huge` is what a side claims to be."""
    zeros = zlib.compress(b"\0" * 1_000_000, 9)
    vp8x = b"VP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + b"\xff" * 6
    return {
        "png sides": png_of(huge, huge, png_chunk(b"IDAT", zeros)),
        "png strip": png_of(30_000, 1, png_chunk(b"IDAT", zeros)),
        "png empty": png_of(0, 0, png_chunk(b"IDAT", zeros)),
        "png negative": png_of(-1, -1),
        "webp canvas": b"RIFF" + struct.pack("<I", 4 + len(vp8x)) + b"WEBP" + vp8x + b"\0" * 20,
        "png large": picture("PNG", 3000, 3000),
    }


def other_format(rng: random.Random) -> Attack:
    """Whatever else an image library would gladly open."""
    starts = [b"GIF89a", b"II*\0", b"MM\0*", b"BM", b"%!PS-Adobe-3.0 EPSF\n", b"%PDF-1.4\n"]
    starts += [b"<svg xmlns='http://www.w3.org/2000/svg'>", b"\0\0\1\0", b"PK\3\4", b"\x7fELF"]
    data = rng.choice([*starts, b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
    data += rng.randbytes(rng.randrange(200))
    return with_image("other format", data, rng.choice(["png", "jpeg", "webp", "gif", "svg+xml"]))


def wrong_type(rng: random.Random) -> Attack:
    values: list[Any] = [0, -1, 1.5, True, [], {}, [[]], [None], {"a": 1}, [1, 2], "", "x" * 30_000]
    name = rng.choice(FIELDS)
    allowed = (name == "ground_truth" and [None]) or []
    value = rng.choice([v for v in [*values, None] if v not in allowed])
    if name == "image" and value is None:
        value = 7
    body = case(**{name: value})
    if rng.random() < 0.3:
        del body[rng.choice(["question", "responses"])]
    return Attack("wrong type", as_json(body))


def odd_number(rng: random.Random) -> Attack:
    numbers = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "-0", "1e308", "00"]
    number = rng.choice([*numbers, "0x10", "1_000", "9" * 300, "." * 9, "+1"])
    body = as_json(case(question="N")).replace(b'"N"', number.encode())
    return Attack("number", body)


def deep(rng: random.Random) -> Attack:
    depth = rng.choice([40, 500, 990, 1000, 5000, 100_000])
    start, end = rng.choice([("[", "]"), ('{"a":', "}"), ('{"question":', "}")])
    nest = start * depth + rng.choice(["", "1"]) * bool(end == "]") + ("1" if end == "}" else "")
    if rng.random() < 0.7:
        nest += end * depth
    body = nest if rng.random() < 0.5 else f'{{"question": {nest}}}'
    return Attack("deep", body.encode())


def spoilt_json(rng: random.Random) -> Attack:
    sound = as_json(case())
    text = sound.decode()
    made = [
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe" + text.encode("utf-16-le"),
        b"\xef\xbb\xbf" + sound,
        text.encode("utf-16"),
        text.encode("utf-32"),
        sound[: rng.randrange(1, len(sound))],
        sound * 2,
        sound.replace(b'"question"', b'"question": "a", "question"'),
        sound.replace(b"What", b"\xc3\x28"),
        sound.replace(b"What", b"\xed\xa0\x80"),
        sound.replace(b"What", b"\0\1\2"),
        sound.replace(b'"', b"'"),
        b'"' + b'\\"' * 10_000,
        b"[" + b"0," * 30_000 + b"0]",
        b" " * 900_000,
        b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;</a>",
        b"question=a&responses=b",
    ]
    return Attack("spoilt JSON", rng.choice(made))


def address(rng: random.Random, fetch_url: str) -> Attack:
    """Images that a careless service would fetch or open."""
    urls = [
        *("file:///etc/passwd", "file://localhost/etc/hostname", "/etc/passwd", "../../etc/passwd"),
        *("http://169.254.169.254/latest/meta-data/", "http://[fd00:ec2::254]/", fetch_url),
        *(fetch_url.replace("127.0.0.1", host) for host in ("localhost", "0x7f.1", "2130706433")),
        *(fetch_url.replace("http", scheme) for scheme in ("https", "ftp", "gopher", "HTTP")),
        *("data:text/html;base64,AAAA", "data:image/png,AAAA", "data:,", "javascript:alert(1)"),
        *("data:image/png;base64,", "data:image/png;base64,!!!!", "data:image/png;base64,AAA"),
        f"data:image/png;base64,{fetch_url}",
        f"data:image/png;base64;url={fetch_url},AAAA",
        f" {data_url(picture())}",
        *allowed_by_a_careless_reader(fetch_url.removeprefix("http://")),
    ]
    return Attack("address", as_json(case(image=rng.choice(urls))))


def allowed_by_a_careless_reader(elsewhere: str) -> list[str]:
    """Addresses elsewhere that show the allowed host to one reader or another."""
    host, _, rest = elsewhere.partition(":")
    starts = [
        f"https://{ALLOWED}@",
        f"https://{ALLOWED}:443@",
        f"https:\\\\{ALLOWED}@",
        "//",
        "https:",
    ]
    starts += [
        f"https://{ALLOWED}\\@",
        f"https://{ALLOWED}#@",
        f"https://{ALLOWED}%2f@",
        "https:///",
    ]
    hosts = [f"{ALLOWED}.{host}", f"[::ffff:{host}]", host.replace(".", "。"), f"{host}.", "0177.1"]
    return [
        *(f"{start}{elsewhere}" for start in starts),
        *(
            f"http://{name}:{rest}"
            for name in (*hosts, f"\t{host}", f"{host}\r\n", f"{ALLOWED}@{host}")
        ),
        *(
            f"https://{ALLOWED}/a.png",
            f"https://{ALLOWED}./{rest}",
            f"http://{ALLOWED}/{elsewhere}",
        ),
    ]


def special_tokens(rng: random.Random) -> Attack:
    tokens = [*USER_TEXT_ESCAPES, "</s>", "<|im_end|>", "<|im_start|>system", "[/INST]", "[[1]]"]
    text = "".join(rng.choice([*tokens, " ", "a", "\n"]) for _ in range(rng.randrange(1, 300)))
    body = case(question=text, ground_truth=text, responses=[text, f"{text}."])
    return Attack("special tokens", as_json(body), refused=False)


def odd_text(rng: random.Random) -> Attack:
    """Half surrogate pairs, control characters, text that runs the other way, and templates."""
    odd = ["\ud800", "\udfff", "\ud83d", "\0", "\x1b[2J", "\x7f", "\u202e", "\ufeff", "\u200d"]
    odd += ["a\u0301\u0323", "\U0010ffff", "\ufffe", "\r\n", "{{ 7 * 7 }}", "{% raw %}", "${x}"]
    text = "".join(rng.choice(odd) for _ in range(rng.randrange(1, 100)))
    responses = [text, "b"] if rng.random() < 0.5 else ["a", "b"]
    return Attack("odd text", as_json(case(question=text, responses=responses)), refused=False)


def odd_keys(rng: random.Random) -> Attack:
    key = rng.choice(["__class__", "__proto__", "\ud800", "\0", "k" * 100_000, "", "image ", "😀"])
    many = {f"k{i}": i for i in range(rng.choice([1, 5000]))}
    return Attack("odd keys", as_json(case() | {key: 1} | many))


def odd_route(rng: random.Random) -> Attack:
    paths = ["/", "//", "/v1", "/v1/critique/", "/v1/critique/../../etc/passwd", "/docs", "/redoc"]
    paths += ["/%2e%2e/%2e%2e/etc/passwd", "/v1/critique%00", "/v1/critique?image=x", "/metrics"]
    paths += ["/" + "a" * 5000, "/%ff%fe", "/healthz/x", "/openapi.json/", "/.env"]
    methods = ["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "PATCH", "PROPFIND", "BREW"]
    return Attack("odd route", b"", True, rng.choice(methods), rng.choice(paths))


def wrong_token(rng: random.Random) -> Attack:
    token = rng.choice([None, "", "wrong", TOKEN[:-1], f"{TOKEN}x", "x" * 10_000, TOKEN.upper()])
    path = rng.choice(["/v1/critique", "/openapi.json", "/docs", "/nowhere"])
    return Attack("wrong token", as_json(case()), path=path, token=token)


def many_headers(rng: random.Random) -> Attack:
    """A sound request under a pile of headers."""
    headers = [(f"X-Odd-{i}", "y" * rng.randrange(200)) for i in range(rng.randrange(1, 150))]
    headers += [("X-Request-ID", rng.choice(["<script>", "a" * 5000, "../..", "%0d%0aX: y"]))]
    headers += [
        ("X-Forwarded-For", "127.0.0.1"),
        ("Transfer-Coding", "gzip"),
        ("Range", "bytes=-1"),
    ]
    return Attack("headers", as_json(case()), refused=False, headers=headers)


def flood(rng: random.Random, max_body_bytes: int) -> Attack:
    """More than is allowed, in chunks of which none says how many follow."""
    size = rng.choice([1000, 10_000, 65_536])
    chunks = [b"x" * size] * (max_body_bytes // size + rng.randrange(2, 20))
    return Attack("flood", chunks)


def odd_content_type(rng: random.Random) -> Attack:
    kinds = ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"]
    kinds += ["application/json; charset=utf-7", "application/json;" * 500, "image/png", "\xff"]
    headers = []
    kind = rng.choice([*kinds, None, JSON])
    if kind == JSON:
        headers = [("Content-Encoding", rng.choice(["gzip", "br", "deflate", "zstd, gzip"]))]
    body = zlib.compress(b"\0" * 500_000) if headers else as_json(case())
    return Attack("content type", body, headers=headers, content_type=kind)


def bit_flips(rng: random.Random) -> Attack:
    """A sound request with some bytes changed; what is left may be sound."""
    body = bytearray(as_json(case(image=data_url(picture()))))
    for _ in range(rng.randrange(1, 5)):
        body[rng.randrange(len(body))] = rng.randrange(256)
    return Attack("bit flips", bytes(body), refused=False)

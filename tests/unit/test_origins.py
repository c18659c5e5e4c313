"""Web addresses: what is read, what is not, and the origins in a config."""

from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sima_ray.config import ServiceConfig
from sima_ray.config.origins import read_url


@pytest.mark.parametrize(
    ("text", "origin", "target"),
    [
        ("https://images.example.org", "https://images.example.org", "/"),
        ("HTTPS://Images.Example.ORG/A.png", "https://images.example.org", "/A.png"),
        ("https://a:443/b?c=d&e=%20#f", "https://a", "/b?c=d&e=%20"),
        ("http://a:443/", "http://a:443", "/"),
        ("http://a:80/", "http://a", "/"),
        ("https://xn--bcher-kva.example:8443/", "https://xn--bcher-kva.example:8443", "/"),
        ("http://10.0.0.1:8080/a", "http://10.0.0.1:8080", "/a"),
        ("http://[0:0::1]:8080/a", "http://[::1]:8080", "/a"),
        ("https://a/@evil.org/../b;c:d", "https://a", "/@evil.org/../b;c:d"),
    ],
)
def test_what_is_read(text: str, origin: str, target: str) -> None:
    found = read_url(text)
    assert (found.origin, found.target) == (origin, target)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "a",
            "//a/",
            "https:/a",
            "https:a",
            "https:///a",
            "ftp://a/",
            "file:///a",
            "https://",
        ),
        *("https://u@a/", "https://u:p@a/", "https://a@b/", "https://@a/", "https://a\\@b/"),
        *(
            "https://a\\b",
            "https:\\\\a",
            "https://a./",
            "https://.a/",
            "https://a..b/",
            "https://-a/",
        ),
        *("https://a:/", "https://a:0/", "https://a:080/", "https://a:65536/", "https://a:-1/"),
        *("https://a:٨٠/", "https://a:80:80/", "https://a_b/", "https://a%2eb/", "https://a,b/"),
        *("http://127.1/", "http://2130706433/", "http://0x7f000001/", "http://0x7f.0.0.1/"),
        *("http://0177.0.0.1/", "http://1.2.3.256/", "http://1.2.3.4.5/", "http://a.0x1/"),
        *(
            "http://[::1/",
            "http://::1/",
            "http://[fe80::1%25eth0]/",
            "http://[v1.a]/",
            "http://[]/",
        ),
        *(
            "https://ａ.b/",
            "https://a。b/",
            "https://\u212aa/",
            "https://b\u00fccher/",
            "http\u017f://a/",
        ),
        *(
            " https://a/",
            "https://a/ ",
            "https://a/\n",
            "https://a\t/",
            "ht\ntps://a/",
            "https://a/ä",
        ),
        *(
            "https://a?b",
            "https://a#@b/",
            "https://a#",
            "https://a/\0",
            f"https://{'a' * 64}/",
            "https://a/" * 900,
        ),
    ],
)
def test_what_is_not_read(text: str) -> None:
    with pytest.raises(ValueError):
        read_url(text)


@given(
    st.one_of(
        st.text(),
        st.text(alphabet="htps:/\\@#?%.[]a0x1-\t\n。", max_size=40).map("https://".__add__),
        st.from_regex(r"https?://[\w.@:%\[\]\\-]{1,30}/?[ -~]{0,10}", fullmatch=True),
    )
)
def test_other_readers_read_the_same(text: str) -> None:
    try:
        found = read_url(text)
    except ValueError:
        return
    others = [urlsplit(text), httpx.URL(text)]
    for other in others:
        port: Any = other.port or {"http": 80, "https": 443}[found.scheme]
        assert (other.scheme, port) == (found.scheme, found.port)
        assert read_url(f"http://{_bracketed(other)}").host == found.host
    again = read_url(found.origin + found.target)
    assert again == found and read_url(found.origin).origin == found.origin


def _bracketed(url: Any) -> str:
    name = url.hostname if hasattr(url, "hostname") else url.host
    return f"[{name}]" if ":" in name else name


def test_origins_in_a_config() -> None:
    given = ["https://Images.Example.org:443", "http://127.0.0.1:9000"]
    config = ServiceConfig.model_validate({"image_origins": given})
    assert config.image_origins == ["https://images.example.org", "http://127.0.0.1:9000"]
    assert ServiceConfig.model_validate(config.model_dump(mode="json")) == config
    assert ServiceConfig().image_origins == []


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ("images.example.org", "is no origin"),
        ("https://*.example.org", "is no origin"),
        ("https://bücher.example", "in its xn-- form"),
        ("https://images.example.org/cats", "write https://images.example.org, without a path"),
        ("https://images.example.org/", "without a path"),
        ("https://images.example.org#a", "is no origin"),
        ("https://me@images.example.org", "is no origin"),
        ("*", "is no origin"),
        (7, "valid string"),
    ],
)
def test_an_origin_that_is_none(origin: Any, words: str) -> None:
    with pytest.raises(ValidationError, match="image_origins") as refused:
        ServiceConfig.model_validate({"image_origins": [origin]})
    assert words in str(refused.value)

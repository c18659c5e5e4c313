"""JSON bodies: what passes is what Python's parser reads too, and what is refused is told in our words."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_apps.strict_json import MAX_DEPTH, MAX_VALUES, NotJson, check_json

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
TEXT = st.text(st.characters(codec="utf-8")) | st.sampled_from(
    ['"', "\\", '\\"', "\\\\", "\\u0022", "[", "]{"]
)
VALUES = st.recursive(
    SCALARS | TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=20
)


@given(VALUES, st.booleans())
def test_what_python_writes_passes(value: object, ascii_only: bool) -> None:
    check_json(json.dumps(value, ensure_ascii=ascii_only).encode())


@given(st.binary() | st.text('[]{}",:\\0 1eE-.tru', max_size=20).map(str.encode))
def test_what_passes_is_what_python_reads(body: bytes) -> None:
    try:
        check_json(body)
    except NotJson:
        return
    json.loads(body)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),  # half a surrogate pair, spelt out
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "not JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "not JSON"),
        (b'"no end', "no end"),
        (b'"no end\\"', "no end"),
        (b"[" * 50_000, "more than 20,000 values"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "levels deep"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "levels deep"),
        (b"[" + b"0," * MAX_VALUES + b"0]", "more than 20,000 values"),
        (b"[" + b'"",' * MAX_VALUES + b'""]', "more than 20,000 values"),
        (b" " * 3_000_000 + b"1", "white space"),
        (b"NaN", "NaN"),
        (b"[-Infinity]", "-Infinity"),
        (b"1e999", "too large"),
        (b"-1e999", "too large"),
        (b"9" * 5000, "too large"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": 1, "\\u0061": 2}', "twice"),
        (b'{"a\\"": 1, "a\\u0022": 2}', "twice"),
        (b"{'a': 1}", "not JSON"),
        (b"[1] [2]", "not JSON"),
    ],
)
def test_what_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(NotJson, match=words):
        check_json(body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": "[[[[{{{{", "b": "\\\\", "c": "\\\\\\"]"}',
        b'{"a\\"": 1, "a": 2}',
        b"[" * MAX_DEPTH + b"]" * MAX_DEPTH,
        json.dumps("x" * 5000 + '"[' * 40_000).encode(),
        b"1.5e300",
    ],
)
def test_what_passes(body: bytes) -> None:
    check_json(body)
    json.loads(body)


def test_a_body_that_is_one_image_is_checked_faster_than_it_is_parsed() -> None:
    body = b'{"image": "data:image/png;base64,' + b"A" * 20_000_000 + b'"}'

    def fastest(call: object) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            call(body)  # type: ignore[operator]
            times.append(time.perf_counter() - start)
        return min(times)

    assert fastest(check_json) < fastest(json.loads)

"""What a JSON body may be, checked before any parser builds it: depth, number of values, one meaning only.

The strings, of which one is an image of many megabytes, are cut out first, so the check costs a few passes over
the bytes, a fraction of the parser's own time. What is wrong inside a long string is left for the application's
parser to find.
"""

import json
import math
import re
from itertools import accumulate
from typing import Any

MAX_DEPTH = 32
"""Of nested lists and objects. Python's own parser gives up only where its stack ends."""

MAX_VALUES = 20_000
"""Strings and separators: a list of a million zeros is a hundred times larger as objects than as bytes."""

_LONG = 1000  # bytes from which a string is cut out
_BRACKETS = re.compile(rb"[\[\]{}]")
_STEP = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}


class NotJson(ValueError):
    """Bytes that are not JSON, or JSON that can be read in two ways; the message is for the caller."""


def check_json(body: bytes) -> None:
    """Check a whole body.

    Raises:
        NotJson: Not UTF-8 or not JSON; too deep; too many values; NaN or an infinity, a number too large to hold;
            the same key twice in one object.
    """
    if not body.isascii():
        try:
            body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise NotJson("the body is not UTF-8") from error
    if b"\\" in body:  # spelt so that every quote that is left is the border of a string
        body = body.replace(b"\\\\", b"\\u005c").replace(b'\\"', b"\\u0022")
    pieces = body.split(b'"', 2 * MAX_VALUES + 1)  # structure, string, structure, …
    if len(pieces) > 2 * MAX_VALUES + 1:
        raise _too_many()
    if len(pieces) % 2 == 0:
        raise NotJson("the body is not JSON: a string has no end")
    _check_structure(b'"'.join(pieces[::2]))
    for i in range(1, len(pieces), 2):
        if len(pieces[i]) > _LONG:
            pieces[i] = b"long string %d" % i
    try:
        json.loads(
            b'"'.join(pieces).decode(),  # as bytes, it would be tried as UTF-16 too
            object_pairs_hook=_once,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except NotJson:
        raise
    except json.JSONDecodeError as error:
        # Not where: the place is another one than in the body as it was sent.
        raise NotJson(f"the body is not JSON: {error.msg}") from error
    except ValueError as error:  # a whole number of thousands of digits
        raise NotJson("the body holds a number that is too large") from error


def _check_structure(structure: bytes) -> None:
    if sum(structure.count(mark) for mark in b",[{") > MAX_VALUES:
        raise _too_many()
    if len(structure) > 100 * MAX_VALUES:
        raise NotJson("the body is mostly white space, or holds a number that is too large")
    if max(accumulate(map(_STEP.__getitem__, _BRACKETS.findall(structure))), default=0) > MAX_DEPTH:
        raise NotJson(f"the body is nested more than {MAX_DEPTH} levels deep")


def _too_many() -> NotJson:
    return NotJson(f"the body holds more than {MAX_VALUES:,} values")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise NotJson("the body has a key twice in one object")
    return found


def _refuse_constant(name: str) -> None:
    raise NotJson(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise NotJson("the body holds a number that is too large")
    return number

"""Prompts out of instruction data: LLaVA-Instruct's conversations, or prompts files, sampled by a seed.

LLaVA-Instruct-150K is a JSON array of {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, …]}.
The same as JSON lines is read too, and so are prompts as `sima_ray.data.prompts` reads them.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import pyarrow as pa

from sima_ray.data.locations import open_location
from sima_ray.data.prompts import FIELDS, PLACEHOLDER
from sima_ray.data.record_files import json_records, named
from sima_ray.errors import DataError, one_line, why
from sima_ray.ports import JsonDict


class SetAside(StrEnum):
    """Why a record became no prompt."""

    MALFORMED = "malformed"  # not a JSON object, or a field of a wrong type
    NO_IMAGE = "no_image"  # a conversation without an image, as in LLaVA's larger mixes
    NO_QUESTION = "no_question"
    NO_ANSWER = "no_answer"
    DUPLICATE = "duplicate"  # image, question and answer are those of an earlier record


@dataclass(slots=True)
class Source:
    """What a file held: `records` = `prompts` + the sum of `set_aside`."""

    location: str
    records: int = 0
    prompts: int = 0
    set_aside: Counter[SetAside] = field(default_factory=Counter[SetAside])


@dataclass(frozen=True, slots=True)
class Drawn:
    """What was written: `written` of the `prompts` of all sources."""

    sources: list[Source]
    prompts: int
    written: int
    problems: list[str]
    """A line for each record that was set aside, duplicates left out."""


class _NoPrompt(Exception):
    def __init__(self, reason: SetAside, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def draw_prompts(locations: Iterable[str], output: str, *, count: int | None, seed: int) -> Drawn:
    """Write a prompts file of `count` prompts drawn from files, in a random order; all of them with None.

    A prompt's place in the order is a hash of its words and the seed. So a smaller count is the beginning of a
    larger one, and neither the order of the files nor that of their records matters.

    Args:
        locations: Paths or URIs of JSON arrays or JSON lines, compressed if their names say so.
        output: The JSON lines to write; the file appears when it is whole.
        count: At most so many.
        seed: Of the order.

    Raises:
        DataError: A file that cannot be read or is no JSON; no prompt in any of them; one that is the output.
    """
    locations = list(locations)
    for location in locations:
        if Path(location).exists() and Path(location).resolve() == Path(output).resolve():
            raise DataError(
                f"{location}: would be overwritten by its own draw: write to another file"
            )
    sources: list[Source] = []
    problems: list[str] = []
    prompts: dict[bytes, str] = {}
    for location in locations:
        source = Source(location)
        for where, record in json_records(location):
            source.records += 1
            try:
                prompt = to_prompt(record)
                place, line = _place(prompt, seed), json.dumps(prompt, ensure_ascii=False)
                if place in prompts:
                    raise _NoPrompt(SetAside.DUPLICATE, "")
                prompts[place] = line
                source.prompts += 1
            except _NoPrompt as none:
                source.set_aside[none.reason] += 1
                if none.reason is not SetAside.DUPLICATE:
                    where = named(where, record.get("id") if isinstance(record, dict) else None)
                    problems.append(f"{location}: {where}: {none.reason}: {one_line(none)}")
        sources.append(source)
    if not prompts:
        raise DataError("no prompt in " + ", ".join(source.location for source in sources))
    chosen = sorted(prompts)[:count]
    _write(output, (prompts[place] for place in chosen))
    return Drawn(sources, len(prompts), len(chosen), problems)


def to_prompt(record: Any) -> JsonDict:
    """The prompt {"image", "text", "ground_truth"} of a conversation, or of what is one already.

    The question is the first turn of "human" without `<image>`, the ground truth the first of "gpt" after it.

    Raises:
        _NoPrompt: There is none in it.
    """
    if not isinstance(record, dict):
        raise _NoPrompt(SetAside.MALFORMED, "must be a JSON object")
    image = _text(record.get("image"), SetAside.NO_IMAGE, "image")
    question, answer = record.get("text"), record.get("ground_truth")
    if "conversations" in record:
        question, answer = _first_turns(record["conversations"])
    text = PLACEHOLDER.sub(" ", _text(question, SetAside.NO_QUESTION, "question"))
    text = _text(text, SetAside.NO_QUESTION, "question")
    values = (image, text, _text(answer, SetAside.NO_ANSWER, "answer"))
    return dict(zip(FIELDS, values, strict=True))


def _first_turns(turns: Any) -> tuple[Any, Any]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _NoPrompt(SetAside.MALFORMED, "conversations must be a list of turns")
    left = iter(turns)
    question = next((turn.get("value") for turn in left if turn.get("from") == "human"), None)
    answer = next((turn.get("value") for turn in left if turn.get("from") == "gpt"), None)
    return question, answer


def _text(value: Any, reason: SetAside, name: str) -> str:
    if value is None:
        raise _NoPrompt(reason, f"there is no {name}")
    if not isinstance(value, str):
        raise _NoPrompt(SetAside.MALFORMED, f"the {name} must be a string")
    value = value.strip()
    if not value:
        raise _NoPrompt(reason, f"the {name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _NoPrompt(SetAside.MALFORMED, f"the {name} holds half a surrogate pair") from None
    return value


def _place(prompt: JsonDict, seed: int) -> bytes:
    words = json.dumps([seed, *(prompt[name] for name in FIELDS)])
    return hashlib.sha256(words.encode()).digest()


def _write(output: str, lines: Iterable[str]) -> None:
    filesystem, path = open_location(output)
    try:
        filesystem.create_dir(os.path.dirname(path), recursive=True)
        with filesystem.open_output_stream(f"{path}.partial", compression=None) as stream:
            for line in lines:
                stream.write(line.encode() + b"\n")
        filesystem.move(f"{path}.partial", path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{output}: cannot be written: {why(error)}") from error

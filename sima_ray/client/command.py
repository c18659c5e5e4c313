"""What `sima critique` does: one case shown to a person, or a file of them, a JSON line for each."""

import asyncio
import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sima_ray.client import (
    AsyncCriticClient,
    Case,
    CaseRefused,
    ComparisonResult,
    CriticClient,
    CriticError,
    CritiqueResult,
    OrderResult,
    TokenRefused,
)
from sima_ray.client.case import URLS
from sima_ray.errors import DataError

FIELDS = frozenset({"id", "image", "question", "ground_truth", "responses"})

Row = tuple[str, str, str]
"""Label, words, style."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a cases file: the case, or why there is none."""

    number: int
    id: str
    case: Case | CaseRefused


def critique_one(client: CriticClient, case: Case, as_json: bool) -> None:
    """Judge a case and show the verdict.

    Raises:
        CriticError: There is none.
    """
    with client:
        result = client.critique(case.image, case.question, case.responses, case.ground_truth)
    if as_json:
        print(json.dumps(result.report, ensure_ascii=False, indent=2))
    else:
        show(result, Console(highlight=False))


def critique_file(client: AsyncCriticClient, file: str, concurrency: int, out: IO[str]) -> None:
    """Judge a file's cases, and write a JSON line for each, in the file's order.

    Args:
        client: The critic.
        file: JSON lines of image, question, ground_truth, responses, id; `-` is standard input.
        concurrency: Cases at once.
        out: Where the results go: the report, or `{"error": …}`, with the line's id and number.

    Raises:
        DataError: The file cannot be read, or some of its cases have no verdict.
        CriticError: No critic, or a token that it refuses.
    """
    asyncio.run(_critique_file(client, file, concurrency, out))


async def _critique_file(
    client: AsyncCriticClient, file: str, concurrency: int, out: IO[str]
) -> None:
    start, done, failed = time.perf_counter(), 0, list[tuple[Line, CriticError]]()

    def write(line: Line, result: CritiqueResult | CriticError) -> None:
        nonlocal done
        done += 1
        if isinstance(result, CriticError):
            failed.append((line, result))
        out.write(json.dumps(_as_line(line, result), ensure_ascii=False) + "\n")
        out.flush()

    with _opened(file) as source:
        folder = Path() if file == "-" else Path(file).parent
        read: deque[Line] = deque()

        def good() -> Iterator[Case]:
            for line in read_cases(source, folder):
                read.append(line)
                if isinstance(line.case, Case):
                    yield line.case

        def write_bad() -> None:
            """Bad lines, up to the next one that waits for its verdict."""
            while read and isinstance(read[0].case, CaseRefused):
                line = read.popleft()
                assert isinstance(line.case, CaseRefused)
                write(line, line.case)

        async with client:
            await client.ready()  # nobody there: said once, not for each line
            async for result in client.critique_stream(good(), concurrency):
                if isinstance(result, TokenRefused):
                    raise result
                write_bad()
                write(read.popleft(), result)
            write_bad()
    if not done:
        raise DataError(f"{file}: holds no cases: give one JSON object a line")
    seconds = time.perf_counter() - start
    print(
        f"critic       {seconds:.1f} s · {done - len(failed):,} of {done:,} judged", file=sys.stderr
    )
    if failed:
        line, error = failed[0]
        raise DataError(
            f"{file}: {len(failed):,} of {done:,} cases have no verdict; the first is line {line.number}: {error}"
        )


def read_cases(source: Iterable[bytes], folder: Path) -> Iterator[Line]:
    """The lines of a cases file but for blank ones; a bad line has its reason, and the others go on.

    Args:
        source: The lines.
        folder: What image names are relative to.
    """
    for number, data in enumerate(source, 1):
        if not data.strip():
            continue
        own_id = str(number)
        try:
            values = _parsed(data)
            if values.get("id") is not None:
                own_id = str(values["id"])
            yield Line(number, own_id, _case(values, folder))
        except CaseRefused as error:
            yield Line(number, own_id, error)


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _bad_line(f"not JSON: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise _bad_line("not a JSON object")
    return values


def _case(values: dict[str, Any], folder: Path) -> Case:
    if unknown := sorted(values.keys() - FIELDS):
        raise _bad_line(f"unknown field {unknown[0]!r}: there are {', '.join(sorted(FIELDS))}")
    image, question = values.get("image"), values.get("question")
    truth, responses = values.get("ground_truth"), values.get("responses")
    if not isinstance(question, str):
        raise _bad_line("question: a text is needed")
    if not isinstance(responses, list):
        raise _bad_line("responses: a list of texts is needed")
    if not isinstance(image, str | None) or not isinstance(truth, str | None):
        raise _bad_line("image and ground_truth: texts, or left out")
    if image is not None and not image.startswith(URLS):
        image = folder / image
    return Case(question, responses, image, truth)


def _bad_line(message: str) -> CaseRefused:
    return CaseRefused(message, code="invalid_case")


def _opened(file: str) -> Any:
    if file == "-":
        return nullcontext(sys.stdin.buffer)
    try:
        return open(file, "rb")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error


def _as_line(line: Line, result: CritiqueResult | CriticError) -> dict[str, Any]:
    named = {"id": line.id, "line": line.number}
    if isinstance(result, CritiqueResult):
        return {**result.report, **named}
    told = ("status", "code", "message", "request_id")
    return {**named, "error": {name: getattr(result, name) for name in told}}


def show(result: CritiqueResult, console: Console) -> None:
    """Print a verdict: in columns on a terminal, as plain lines elsewhere."""
    rows = [*_verdict(result), *_details(result)]
    if not console.is_terminal:
        for label, words, _ in rows:
            console.print(Text(f"{label:<13}{words}"), soft_wrap=True)
        return
    table = Table.grid(padding=(0, 1))
    table.add_column(min_width=12, no_wrap=True)
    table.add_column(overflow="fold")
    for label, words, style in rows:
        table.add_row(Text(label), Text(words, style))
    console.print(table)


def _verdict(result: CritiqueResult) -> Iterator[Row]:
    yield "winner", _winner(result), "bold green" if result.winner else "bold yellow"
    if result.comparisons and result.ranking:  # of two, the winner says it all
        yield "ranking", " > ".join(str(number) for number in result.ranking) + " (best first)", ""
    if result.comparisons and result.agreement is not None:
        yield (
            "agreement",
            f"{result.agreement:.0%} of the pairs have one verdict in both orders",
            "",
        )
    if result.probability is not None:
        yield "probability", f"{result.probability:.2f} that response 1 is better than 2", ""


def _winner(result: CritiqueResult) -> str:
    if result.winner is not None:
        sure = ", in both orders" if len(result.orders) > 1 and result.consistent else ""
        return f"response {result.winner}{sure}"
    return {
        "identical": "none: the responses are the same",
        "inconsistent": "none: the two orders do not agree",
        "unparseable": "none: the critic's words hold no verdict",
    }.get(result.outcome, f"none: {_plain(result.outcome)}")


def _details(result: CritiqueResult) -> Iterator[Row]:
    yield from _orders(result.orders, (1, 2))
    for comparison in result.comparisons:
        yield _comparison(comparison)
        yield from _orders(comparison.orders, comparison.responses)
    parts = [result.model_version, f"prompt {result.prompt_version}", f"{result.tokens:,} tokens"]
    yield "model", _plain(" · ".join([*parts, f"{result.seconds:.2f} s"])), "dim"


def _comparison(comparison: ComparisonResult) -> Row:
    first, second = comparison.responses
    winner = "a tie" if comparison.winner is None else f"response {comparison.winner}"
    words = [winner, _plain(comparison.outcome).replace("_", " ")]
    if comparison.probability is not None:
        words.append(f"{comparison.probability:.2f} that {first} is better")
    return f"{first} against {second}", " · ".join(words), "bold"


def _orders(orders: Sequence[OrderResult], numbers: tuple[int, int]) -> Iterator[Row]:
    """A line an order; the responses by their own numbers, wherever they were shown."""
    for order in orders:
        shown = [numbers[int(place) - 1] for place in order.order if place in "12"]
        chosen = "no verdict" if order.winner is None else f"response {numbers[order.winner - 1]}"
        words = f"{chosen}: {_plain(order.reason)}" if order.reason else chosen
        yield f"shown {', '.join(map(str, shown))}", words, ""


def _plain(text: str) -> str:
    """A model's words on one line, without what a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())

"""A run's summary on a terminal."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sima_ray.config.evaluation import SuiteName
from sima_ray.errors import DataError, why
from sima_ray.ledger import Ledger
from sima_ray.ports import JsonDict
from sima_ray.runtime.runs import given_words
from sima_ray.runtime.suites import TITLES
from sima_ray.runtime.summary import FIGURES, judge_words


def show_summary(folder: Path) -> None:
    """Print the tables of a finished run.

    Raises:
        DataError: The folder has no summary.
    """
    try:
        result = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder / 'summary.json'}: no finished run there ({why(error)})"
        ) from error
    console = Console(highlight=False, soft_wrap=True)
    if result.get("before"):
        console.print(figures_table(result))
    for name, suite in result.get("suites", {}).items():
        console.print(suite_table(name, suite, result["confidence"]))
        if suite["after"] and suite["after"].get("judge"):
            console.print(judge_line(suite["after"]["judge"]))
    console.print(
        given_line(result["given"]) if "given" in result else critic_line(result["critic"])
    )
    console.print(ledger_line(result["ledger"]))


def figures_table(result: JsonDict) -> Table:
    """Before and after, and the paired change with its interval; fits 80 columns."""
    table = Table(title=f"{result['before']['captions']} held-out images", title_justify="left")
    table.add_column("")
    for name in ("before", "after", "change", f"{100 * result['confidence']:.0f} % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, (label, _) in FIGURES.items():
        if name in result["before"]:
            before, after, change = (result[key][name] for key in ("before", "after", "difference"))
            table.add_row(
                label,
                f"{before['value']:.3f}",
                f"{after['value']:.3f}",
                f"{change['value']:+.3f}",
                f"{change['low']:+.3f} … {change['high']:+.3f}",
            )
    return table


def suite_table(name: SuiteName, suite: JsonDict, confidence: float) -> Table:
    """A suite before and after, and the paired change with its interval; a side that did not run is a dash."""
    before, after = suite["before"], suite["after"]
    rows = " → ".join(f"{side['rows']:,}" if side else "–" for side in (before, after))
    failed = sum(sum(side["failed"].values()) for side in (before, after) if side)
    title = f"{TITLES[name]} · {rows} questions scored" + (f", {failed} failed" if failed else "")
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("before", "after", "change", f"{100 * confidence:.0f} % interval"):
        table.add_column(column, justify="right", no_wrap=True)
    for figure, label in suite["labels"].items():
        values = [
            f"{side['figures'][figure]['value']:.3f}" if side and figure in side["figures"] else "–"
            for side in (before, after)
        ]
        change = suite["difference"].get(figure)
        paired = (
            (f"{change['value']:+.3f}", f"{change['low']:+.3f} … {change['high']:+.3f}")
            if change
            else ("–", "–")
        )
        table.add_row(label, *values, *paired)
    return table


def judge_line(judge: JsonDict) -> str:
    """What a judge was asked and took, on one line."""
    return f"judge    {judge_words(judge)}"


def critic_line(critic: JsonDict) -> str:
    """What the critic did, on one line."""
    line = (
        f"critic   {critic['judged']:,} cases judged in both orders: "
        f"{critic['consistent']:.1%} consistent, {critic['unparseable']:.1%} unparseable"
    )
    if critic["agreement_with_oracle"] is not None:
        line += f", {critic['agreement_with_oracle']:.1%} agree with the count of errors where it decides"
    return line


def given_line(given: JsonDict) -> str:
    """What a run that had no critic began with, on one line."""
    return f"given    {given_words(given)}"


def ledger_line(ledger: JsonDict) -> str:
    """Rows in and where each ended, on one line."""
    return f"ledger   {Ledger.from_json(ledger).equation()}"

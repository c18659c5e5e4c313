"""The account of a run, `sima runs show`: every row, token, second and replica-hour, and whether it adds up."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sima_ray.config import RunConfig
from sima_ray.errors import LedgerError, SimaError
from sima_ray.ledger import Ledger
from sima_ray.ports import JsonDict
from sima_ray.runtime.columns import columns
from sima_ray.runtime.progress import duration
from sima_ray.runtime.runs import MAKE_PAIRS, FinishedStage, RunView, given_words, view

_USAGE = ("requests", "prompt_tokens", "cached_tokens", "tokens")


@dataclass(frozen=True, slots=True)
class Account:
    """What a run did and took.

    Attributes:
        run: The run.
        ledgers: Of each round that has preferences.
        problems: Totals that do not add up, each in words; none in a sound run.
        costs: Of each stage, the least and the most; empty without a price.
        provenance: Revision, versions, seed.
    """

    run: RunView
    ledgers: dict[int, Ledger]
    problems: list[str]
    costs: dict[str, tuple[float, float]]
    provenance: JsonDict

    @property
    def total(self) -> Ledger:
        """The sum over the rounds."""
        return sum(self.ledgers.values(), start=Ledger(0))

    @property
    def cost(self) -> tuple[float, float] | None:
        """Of all stages, the least and the most; None without a price."""
        if not self.costs:
            return None
        low, high = zip(*self.costs.values(), strict=True)
        return sum(low), sum(high)

    @property
    def judge_cost(self) -> float | None:
        """What the judges' answers cost, by the prices of their configs; None without one."""
        costs = [judge["cost"] for _, judge in self.judged if judge["cost"] is not None]
        return sum(costs) if costs else None

    @property
    def judged(self) -> list[tuple[FinishedStage, JsonDict]]:
        """The suites that a judge was asked for, with what it was asked and took."""
        return [(stage, judge) for stage in self.run.done if (judge := stage.result.get("judge"))]

    def usage(self) -> dict[str, int]:
        """Requests and tokens of all stages that count them."""
        parts = [usage_of(stage) for stage in self.run.done]
        return {name: sum(part.get(name, 0) for part in parts) for name in _USAGE}

    def to_json(self) -> JsonDict:
        """The account as plain values."""
        return {
            **self.run.to_json(),
            "problems": self.problems,
            "ledger": self.total.to_json(),
            "ledgers": {str(number): ledger.to_json() for number, ledger in self.ledgers.items()},
            "stages": [
                {
                    "stage": stage.key,
                    "seconds": stage.seconds,
                    "at": stage.at,
                    **usage_of(stage),
                    "cost": self.costs.get(stage.key),
                    "judge": stage.result.get("judge"),
                }
                for stage in self.run.done
            ],
            "seconds": sum(stage.seconds for stage in self.run.done),
            **self.usage(),
            "cost": self.cost,
            "judge_cost": self.judge_cost,
            "provenance": self.provenance,
        }


def account(folder: Path, price: float | None = None) -> Account:
    """Draw up the account of a run.

    Args:
        folder: The run's.
        price: Of an hour of one policy replica, or of one training worker.

    Raises:
        SimaError: No run there, or a file that cannot be read.
    """
    run = view(folder)
    ledgers: dict[int, Ledger] = {}
    problems: list[str] = []
    for stage in run.done:
        if stage.stage not in MAKE_PAIRS or stage.round is None:
            continue
        where = f"round {stage.round}"
        try:
            ledgers[stage.round] = Ledger.from_json(stage.result["ledger"])
        except (KeyError, LedgerError) as error:
            problems.append(f"{where}: {error}")
            continue
        problems += [f"{where}: {text}" for text in _round_problems(folder, stage)]
    total = sum(ledgers.values(), start=Ledger(0))
    if (folder / "ledger.json").exists():
        text = _difference("ledger.json", json.loads((folder / "ledger.json").read_text()), total)
        problems += [f"the run: {text}"] if text else []
    provenance = folder / "provenance.json"
    return Account(
        run=run,
        ledgers=ledgers,
        problems=problems,
        costs=_costs(run, RunConfig.load(folder / "run.yaml"), price) if price else {},
        provenance=json.loads(provenance.read_text()) if provenance.exists() else {},
    )


def show(shown: Account, price: float | None = None) -> str:
    """The account for people; fits 100 columns."""
    run = shown.run
    lines = [("run", f"{run.name} · {run.folder}"), ("state", _state_line(run))]
    if given := shown.provenance.get("given"):
        lines.append(("began with", f"given pairs: {given_words(given)}"))
    lines += [(f"round {n}", ledger.equation()) for n, ledger in sorted(shown.ledgers.items())]
    if len(shown.ledgers) > 1:
        lines.append(("total", shown.total.equation()))
    text = [f"{name:<12} {value}" for name, value in lines]
    if run.done:
        text += ["", _stage_table(shown), ""]
    if shown.judged:
        text += [_judge_table(shown), ""]
    if price:
        text.append(
            f"{'cost':<12} at {price:g} an hour of a policy replica or a training worker; "
            "their start-up and idling are not in it"
        )
    if provenance := shown.provenance:
        made = {"python": provenance.get("python"), **provenance.get("versions", {})}
        text += [
            f"{'revision':<12} {provenance.get('revision')} · seed {provenance.get('seed')} · "
            f"begun {provenance.get('started')}",
            f"{'versions':<12} {', '.join(f'{name} {version}' for name, version in made.items())}",
        ]
    return "\n".join(text)


def usage_of(stage: FinishedStage) -> dict[str, int]:
    """What a stage asked of the policy; empty for one that does not count it."""
    usage = stage.result.get("usage") or {}
    return {name: usage[name] for name in _USAGE if name in usage}


def _state_line(run: RunView) -> str:
    state = f"{run.state()} · {run.rounds_done} of {run.rounds} rounds"
    if run.attempt and run.attempt.error:
        state += f"\n{'error':<12} {run.attempt.error}"
    return state


def _stage_table(shown: Account) -> str:
    header = ["STAGE", "TOOK", "REQUESTS", "PROMPT-TOKENS", "CACHED", "TOKENS"]
    rows = [
        [stage.title, duration(stage.seconds), *_cells(usage_of(stage))] for stage in shown.run.done
    ]
    seconds = sum(stage.seconds for stage in shown.run.done)
    rows.append(["total", duration(seconds), *_cells(shown.usage())])
    if shown.cost is not None:
        header.append("COST")
        costs = [shown.costs.get(stage.key) for stage in shown.run.done]
        for row, cost in zip(rows, [*costs, shown.cost], strict=True):
            row.append(_cost_cell(cost))
    return columns(header, rows, right=" ".join(header[1:]))


def _judge_table(shown: Account) -> str:
    """What each suite's judge was asked; what a suite that failed had paid for is in KEPT-COST of the next try."""
    rows = [
        [
            stage.title,
            judge["model"],
            *(f"{judge[name]:,}" for name in ("asked", "cached")),
            f"{sum(judge['failures'].values()):,}",
            f"{judge['prompt_tokens'] + judge['answer_tokens']:,}",
            *(
                "-" if judge[name] is None else f"{judge[name]:.2f}"
                for name in ("cost", "cost_before")
            ),
        ]
        for stage, judge in shown.judged
    ]
    if shown.judge_cost is not None:
        rows.append(["total", *["-"] * 5, f"{shown.judge_cost:.2f}", "-"])
    numbers = ("ASKED", "KEPT", "FAILED", "TOKENS", "COST", "KEPT-COST")
    return columns(("JUDGED", "MODEL", *numbers), rows, right=" ".join(numbers))


def _cells(usage: dict[str, int]) -> list[str]:
    return [f"{usage[name]:,}" if name in usage else "-" for name in _USAGE]


def _cost_cell(cost: tuple[float, float] | None) -> str:
    if cost is None:
        return "-"
    low, high = (f"{value:.2f}" for value in cost)
    return low if low == high else f"{low} … {high}"


def _costs(run: RunView, config: RunConfig, price: float) -> dict[str, tuple[float, float]]:
    """Each stage's seconds times the replicas that it held; a range where those follow the load."""
    service = config.policy.service
    policy = (max(1, service.min_replicas), service.max_replicas)
    beside = (0, 0) if service.release_for_training else policy
    workers = config.training.workers
    held = {
        "candidates": policy,
        "preferences": policy,
        "evaluate": policy,
        "train": (workers + beside[0], workers + beside[1]),
        "merge": (1 + beside[0], 1 + beside[1]),
    }
    # A suite holds what the evaluation holds whose name its own begins with, "evaluate-amber".
    return {
        stage.key: (hours * held[kind][0] * price, hours * held[kind][1] * price)
        for stage in run.done
        if (kind := stage.stage.partition("-")[0]) in held
        and (hours := stage.seconds / 3600) is not None
    }


def _round_problems(folder: Path, stage: FinishedStage) -> Iterator[str]:
    """Where a round's ledger does not add up, or its files do not hold what the ledger says."""
    kept = stage.result["ledger"]
    ledger = Ledger.from_json(kept)
    try:
        ledger.check()
    except SimaError as error:
        yield str(error)
    if text := _difference("its ledger", kept, ledger):
        yield text
    home = folder / f"round-{stage.round}"
    if (home / "ledger.json").exists():
        written = json.loads((home / "ledger.json").read_text())
        if text := _difference("ledger.json", written, ledger):
            yield text
    held = {"pairs.parquet": ledger.pairs, "quarantine.jsonl": sum(ledger.quarantined.values())}
    for name, expected in held.items():
        found = _rows(home / name)
        if found is not None and found != expected:
            yield f"{name} holds {found:,} rows, the ledger {expected:,}"


def _difference(name: str, written: Any, ledger: Ledger) -> str | None:
    """What a written ledger says otherwise than its own outcomes or the markers; None where nothing."""
    counted = _flat(ledger.to_json())
    wrong = [
        f"{key} is {value} and must be {counted.get(key)}"
        for key, value in _flat(written).items()
        if value != counted.get(key)
    ]
    return f"{name} does not add up: {', '.join(wrong)}" if wrong else None


def _flat(ledger: JsonDict) -> JsonDict:
    """Every count by its name; outcomes and reasons have names of their own."""
    inner = [value for value in ledger.values() if isinstance(value, dict)]
    flat = {key: value for key, value in ledger.items() if not isinstance(value, dict)}
    return {key: value for part in inner for key, value in part.items()} | flat


def _rows(file: Path) -> int | None:
    """Rows of a file of the run, counted in the file itself; None where it is not there (any more)."""
    if not file.exists():
        return None
    if file.suffix == ".jsonl":
        with file.open("rb") as lines:
            return sum(1 for _ in lines)
    import pyarrow.parquet as pq  # only here: listing runs must not wait for it

    return pq.read_metadata(file).num_rows

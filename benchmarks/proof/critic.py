"""The critic against a judge that cannot err, on the policy's own candidates, each order by itself."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.proof.intervals import wilson
from benchmarks.proof.preferences import Count, Row, judged_rows
from benchmarks.proof.runs import Task, Workers, make_world, marker
from benchmarks.proof.settings import HELD_OUT_SEED, LAYOUTS, Sizes, changed
from sima_ray.config import RunConfig
from sima_ray.critic.vote import preferred_candidate
from sima_ray.demo.language import parse_caption
from sima_ray.ports import JsonDict
from sima_ray.records import ORDERS, Critique
from sima_ray.runtime.evaluation import error_counter


@dataclass(frozen=True, slots=True)
class Judged:
    """A pair that the critic judged.

    Attributes:
        errors, objects: Of both candidates.
        chosen: The number of the candidate that each order chose, 0 or 1; None where unparseable.
    """

    errors: tuple[int, int]
    objects: tuple[int, int]
    chosen: tuple[int | None, int | None]

    @property
    def better(self) -> int | None:
        """The candidate with fewer errors; None for a tie."""
        first, second = self.errors
        return None if first == second else int(second < first)

    @property
    def kind(self) -> str:
        """How many objects the better candidate names, beside the other; "tie" where neither is better."""
        if self.better is None:
            return "tie"
        more = self.objects[self.better] - self.objects[1 - self.better]
        return "equal_length" if more == 0 else "longer_better" if more > 0 else "shorter_better"

    @property
    def consistent(self) -> bool:
        """Whether both orders chose the same candidate."""
        return self.chosen[0] is not None and self.chosen[0] == self.chosen[1]


def run_critic(work: Path, config: RunConfig, sizes: Sizes, workers: Workers) -> JsonDict:
    """Ask for preferences on prompts of test scenes in both layouts; the critic's figures of each."""
    world = make_world(work, "test", sizes.critic_scenes, HELD_OUT_SEED)
    data = {"prompts": str(world.prompts), "images": str(world.images), "limit": None}
    tasks = {
        layout: Task(
            changed(config, name=f"critic-{layout}", data=data, critic={"layout": layout}),
            ("preferences",),
        )
        for layout in LAYOUTS
    }
    workers.run(list(tasks.values()))
    assert config.evaluation is not None
    count = error_counter(config.evaluation.error_counter)
    assert count is not None, "the config names an error counter"
    found: JsonDict = {}
    for layout, task in tasks.items():
        pairs = [
            judged(row, count, count_objects)
            for row in judged_rows(task.folder / "round-1" / "preferences")
        ]
        figured = figures(pairs, config.evaluation.confidence)
        ledger = marker(task.folder, "round-1-preferences")["ledger"]
        found[layout] = {"layout": layout, **figured, "ledger": ledger["outcomes"]}
    return found


def count_objects(text: str) -> int:
    """Objects that a caption of the demo's world names."""
    return len(parse_caption(text).entries)


def judged(row: Row, count: Count, objects: Callable[[str], int]) -> Judged:
    """What the figures need of a row of the preferences."""
    texts = [candidate["text"] for candidate in row["candidates"]]
    critiques = {critique["order"]: Critique(**critique) for critique in row["critiques"]}
    first, second = (preferred_candidate(critiques[order]) for order in ORDERS)
    return Judged(
        errors=(count(texts[0], row["ground_truth"]), count(texts[1], row["ground_truth"])),
        objects=(objects(texts[0]), objects(texts[1])),
        chosen=(first, second),
    )


def figures(pairs: Sequence[Judged], confidence: float) -> JsonDict:
    """Accuracy of single critiques in each order, by kind of pair; agreement of the orders; unparseable ones.

    Ties of the judge are left out of the accuracies, and counted. An unparseable critique is a wrong one.
    `intervals` holds the same figures with Wilson's intervals and counts.
    """

    def share(hits: Iterable[bool]) -> JsonDict:
        found = list(hits)
        return wilson(sum(found), len(found), confidence)

    decided = [pair for pair in pairs if pair.better is not None]
    kinds = {
        "accuracy": decided,
        **{
            kind: [pair for pair in decided if pair.kind == kind]
            for kind in ("equal_length", "longer_better", "shorter_better")
        },
    }
    intervals: JsonDict = {
        kind: [share(pair.chosen[at] == pair.better for pair in some) for at in range(len(ORDERS))]
        for kind, some in kinds.items()
    }
    intervals["consistent"] = share(pair.consistent for pair in pairs)
    intervals["consistent_without_ties"] = share(pair.consistent for pair in decided)
    intervals["unparseable"] = share(choice is None for pair in pairs for choice in pair.chosen)
    return {
        **{
            key: [part["value"] for part in found] if isinstance(found, list) else found["value"]
            for key, found in intervals.items()
        },
        "intervals": intervals,
        "counts": {
            "judged": len(pairs),
            "ties": len(pairs) - len(decided),
            **{kind: len(some) for kind, some in kinds.items() if kind != "accuracy"},
        },
    }

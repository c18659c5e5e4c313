"""A plan's hours: what is in flight, what an evaluation asks, and the table that the results show."""

from pathlib import Path
from typing import Any

import pytest
from benchmark_folder import build

from sima_ray.config import RunConfig
from sima_ray.data.work import REQUESTS
from sima_ray.errors import DataError
from sima_ray.plan.architecture import find_architecture
from sima_ray.plan.asked import Asked, asked
from sima_ray.plan.plan import make_plan
from sima_ray.plan.workload import Assumptions
from sima_ray.plan.worksheet import Section
from sima_ray.runtime.suites import open_suite

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


def hours(name: str, *settings: str, **assumed: Any) -> Section:
    config = RunConfig.load(ROOT / "configs" / f"{name}.yaml", settings)
    found = find_architecture(config.policy.model)
    return make_plan(config, *found, Assumptions(**assumed)).section("hours")


def flight(*settings: str) -> tuple[float, str]:
    """Requests at once where a replica's KV cache holds 217; answers of one length, so both stages are full."""
    few = ["policy.service.max_replicas=2", "generation.workers=2", "generation.concurrency=16"]
    found = hours("qwen3-vl-8b", *few, *settings, response_tokens=200, reason_tokens=200)
    figure = next(figure for figure in found.figures if figure.label == "requests at once")
    return figure.value, figure.how


def test_a_call_brings_two_requests_to_the_engine() -> None:
    """2 workers × 16 rows, of candidates and as many of critiques: 64 calls, which one replica's target takes."""
    assert flight()[0] == 2 * 64
    # As many in all, on two replicas; a replica's own share where its limit of calls is below it.
    assert flight("policy.service.target_ongoing_requests=32")[0] == 2 * 32 * 2
    limit = ["policy.service.target_ongoing_requests=8", "policy.service.max_ongoing_requests=10"]
    assert flight(*limit)[0] == 2 * 10 * 2
    # No more than the engine takes at once, nor than its cache holds.
    found, why = flight("policy.engine.max_num_seqs=100")
    assert found == 100 and "64 calls × 2, max_num_seqs 100, and" in why
    found, why = flight("generation.concurrency=64", "policy.service.max_replicas=1")
    assert found == 217 and "256 calls × 2, max_num_seqs 256, and 217 that" in why
    # Small batches are no limit: as many are open as hold the rows.
    assert flight("generation.batch_size=4") == flight()


def test_critiques_in_flight_are_as_many_as_their_time_allows() -> None:
    one = ["policy.service.max_replicas=1", "generation.workers=1", "generation.concurrency=20"]
    assert hours("qwen3-vl-8b", *one).value("requests at once") == 2 * (20 + 20 * 120 // 150)
    longer = hours("qwen3-vl-8b", *one, reason_tokens=400)
    assert longer.value("requests at once") == 2 * (20 + 20)


def test_replicas_that_stay_are_counted() -> None:
    def told(*settings: str) -> str:
        return how(hours("llava-1.5-7b", *settings), "evaluate")

    one = "generation.workers=1"
    assert (
        "; 8 replicas; 2 times" in told()
    )  # questions of 8 × 64, which all replicas' targets take
    assert "; 1 replica; 2 times" in told(one)
    assert "; 2 replicas; 2 times" in told(one, "policy.service.target_ongoing_requests=32")
    assert "; 3 replicas; 2 times" in told(one, "policy.service.min_replicas=3")


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_limits_fit_the_calls_in_flight(file: Path) -> None:
    """Of the two stages at once, Serve lets all calls in; of one, the engine takes all requests at once."""
    config = RunConfig.load(file)
    service, generation = config.policy.service, config.generation
    share = generation.in_flight / service.max_replicas
    assert 2 * share <= service.max_ongoing_requests
    if (
        file.stem == "demo"
    ):  # its engine is to have a queue: nothing else comes between steps on a CPU
        return
    assert REQUESTS * share <= config.policy.engine.max_num_seqs
    assert REQUESTS * service.target_ongoing_requests <= config.policy.engine.max_num_seqs
    called_for = service.target_ongoing_requests * service.max_replicas
    assert generation.in_flight >= called_for


SUITES: dict[str, Any] = {
    "amber": {"data": "/nowhere/AMBER/data", "images": "/nowhere/AMBER/image"},
    "halbench": {"questions": "/nowhere/obj_halbench_300_with_image.jsonl"},
    "mmhal": {"questions": "/nowhere/response_template.json", "images": "/nowhere/images"},
    "mementos": {
        "descriptions": ["/nowhere/dl_description.csv", "/nowhere/cmc_description.csv"],
        "images": "/nowhere/images",
    },
    "judge": {"base_url": "https://api.example.org/v1", "model": "judge"},
}
"""Of files that are on no machine."""


def evaluated(**sections: Any) -> Section:
    """The hours of a run of llava-1.5-7b with further sections of its evaluation."""
    values = RunConfig.load(ROOT / "configs" / "llava-1.5-7b.yaml").model_dump(mode="json")
    values["evaluation"] |= sections
    config = RunConfig.parse(values)
    return make_plan(config, *find_architecture(config.policy.model)).section("hours")


def how(section: Section, label: str) -> str:
    return next(figure.how for figure in section.figures if figure.label == label)


def test_every_suite_is_timed_by_what_is_published() -> None:
    found = evaluated(**SUITES)
    assert {f.label: f.value for f in found.figures if f.label.startswith(("asked", "judge"))} == {
        "asked by chair": 500,
        "asked by pope": 9000,
        "asked by amber": 1004 + 14_216,
        "asked by halbench": 300,
        "asked by mmhal": 96,
        "asked by mementos": 450 + 50,
        "judge's calls": 96 + 500,
    }
    assert how(found, "asked by amber").startswith(
        "1,004 answers of 150 tokens (published) + 14,216 answers of 5 tokens (published); "
    )
    assert "not timed" in how(found, "judge's calls")
    # AMBER asks 15,220 where CHAIR and POPE ask 9,500.
    bare = evaluated().value("evaluate")
    assert 2 * bare < found.value("evaluate") < 4 * bare
    assert found.value("whole run") - evaluated().value("whole run") == pytest.approx(
        2 * (found.value("evaluate") - bare)
    )


def test_suites_of_no_round_are_timed_apart() -> None:
    every, some = evaluated(**SUITES), evaluated(**SUITES, every_round=["chair", "mmhal"])
    parts = some.value("evaluate") + some.value("evaluate the others")
    assert parts == pytest.approx(every.value("evaluate"))
    assert how(some, "evaluate the others").startswith("pope, amber, halbench, mementos: ")
    assert some.value("whole run") < every.value("whole run")
    assert "evaluate the others" not in [figure.label for figure in every.figures]
    none = evaluated(every_round=[])
    assert none.value("evaluate") == 0 and none.value("evaluate the others") > 0


def test_limits_and_answers_are_as_configured() -> None:
    amber = SUITES["amber"] | {"limit": 1000, "max_tokens": 90, "parts": ["generative", "relation"]}
    mementos = SUITES["mementos"] | {"limit": 100, "max_tokens": 512}
    found = evaluated(**SUITES | {"amber": amber, "mementos": mementos})
    assert how(found, "asked by amber").startswith(
        "1,000 answers of 90 tokens (published) + 1,000 answers of 5 tokens (published); "
    )
    assert found.value("asked by mementos") == 100 + 50
    assert "150 answers of 150 tokens (published)" in how(found, "asked by mementos")


def test_files_that_are_there_are_counted_as_they_are_read(tmp_path: Path) -> None:
    """What a plan counts is what the suites ask."""
    config = build(tmp_path, "https://api.example.org/v1")
    settings = config.evaluation
    assert settings is not None
    suites = {name: len(open_suite(name, settings, config).questions) for name in settings.suites}
    assert len(suites) == 5 and counts(asked(settings, 150)) == suites
    assert all(one.source.startswith("in ") for one in asked(settings, 150))
    first = settings.model_dump(mode="json")
    for name in ("amber", "halbench", "mmhal", "mementos"):
        first[name]["limit"] = 1
    limited = type(settings).model_validate(first)
    found = counts(asked(limited, 150))
    for name in settings.suites:
        assert found[name] == len(open_suite(name, limited, config).questions) <= suites[name]
    assert (found["mmhal"], suites["mmhal"]) == (1, 4)
    (tmp_path / "mmhal" / "response_template.json").write_text("[{}]")
    with pytest.raises(DataError, match=r"response_template\.json:1: not a question"):
        asked(settings, 150)


def test_chairs_prompts_are_counted(tmp_path: Path) -> None:
    line = '{"image": "a.jpg", "text": "Describe it.", "ground_truth": "A dog."}\n'
    (tmp_path / "chair.jsonl").write_text(line * 7)
    found = evaluated(prompts=str(tmp_path / "chair.jsonl"), limit=5)
    assert found.value("asked by chair") == 5
    assert "5 answers of 150 tokens (in chair.jsonl)" in how(found, "asked by chair")
    assert "500 answers of 150 tokens (assumed)" in how(evaluated(), "asked by chair")


def counts(found: tuple[Asked, ...]) -> dict[str, int]:
    suites = dict.fromkeys(one.suite for one in found)
    return {suite: sum(one.count for one in found if one.suite == suite) for suite in suites}


IN_THE_RESULTS = (
    *("llava-1.5-7b", "llava-1.5-7b-4x24gb", "llava-1.5-7b-1x80gb"),
    *("llava-1.5-13b", "llava-1.5-13b-1x80gb", "llava-1.5-13b-4x24gb"),
)


def test_the_results_show_the_plans_hours() -> None:
    """As `sima plan` prints them."""
    text = (ROOT / "docs" / "results.md").read_text()
    table = text.partition("<!-- sima plan: begin -->")[2].partition("<!-- sima plan: end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")]
    found = {row[0].partition(" (")[0]: row[1:] for row in rows[3:-1]}
    plans = [hours(name, prompts=17_000) for name in IN_THE_RESULTS]
    assert found == {
        label: [f"{plan.value(label):,.2f}" for plan in plans]
        for label in ("preferences", "train", "evaluate", "whole run", "GPU hours")
    }

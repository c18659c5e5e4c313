"""Every suite through a policy and a judge: rows kept, figures by hand, pairs compared, nothing done twice."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmark_folder import AMBER_QUESTIONS, DAILY, KINDS, TableService, build
from fake_critic import drips, says
from fake_judge import KEY, FakeJudge

from sima_ray.config import RunConfig
from sima_ray.errors import ConfigError, DataError, ServiceError
from sima_ray.runtime import summary, tables
from sima_ray.runtime.evaluating import compared, evaluate, first_left
from sima_ray.runtime.progress import Progress
from sima_ray.runtime.run import Run

ANSWERS: list[dict[str, str]] = [
    {  # before
        "Is there a dog?": "Yes.",
        "Is there a cat?": "Yes, there is.",
        "Describe this image.": "A man under clouds.",
        "Is the sky sunny?": "Yes",
        "Is there a cloud in this image?": "Yes",
        "Is there direct contact?": "No",
        "Tell all of 9.": "A dog and a cat.",
        "Tell all of 25.": "A man with a dog.",
        "These images": "A dog plays.",
        "What about": "A tree and a car.",
    },
    {  # after
        "Is there a cat?": "No.",
        "Describe this image.": "People under the sky.",
        "Is there a cloud in this image?": "No",
        "Tell all of 9.": "A dog.",
        "What about": "A tree.",
    },
]


def answer(number: int, text: str) -> str:
    """The longest start that fits; what the tuned policy has no answer of its own to, it keeps."""
    table = ANSWERS[0] | (ANSWERS[1] if number else {})
    return next(said for asked, said in table.items() if text.startswith(asked))


def verdict(prompt: str) -> str:
    """Rates "a car" as made up, and lists words that are the same for every description."""
    if "JSON" not in prompt:
        return "Seen.\nRating: " + ("1" if "and a car" in prompt.split("Now the case")[1] else "5")
    words: dict[str, Any] = {"reference_objects": ["dog", "toy"], "response_objects": ["dog"]}
    return json.dumps(
        words | {"reference_behaviours": ["bark"], "response_behaviours": ["bark", "play"]}
    )


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJudge]:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with FakeJudge(verdict) as server:
        yield server


@pytest.fixture
def config(tmp_path: Path, judge: FakeJudge) -> RunConfig:
    return build(tmp_path, judge.url)


def open_run(config: RunConfig, **changes: Any) -> Run:
    values = config.model_dump(mode="json")
    values["evaluation"] |= changes
    return Run.open(RunConfig.parse(values), Progress(io.StringIO()))


def rows_of(run: Run, number: int, name: str) -> list[dict[str, Any]]:
    text = run.folder.read_text(f"round-{number}", "evaluation", f"{name}.jsonl")
    return [json.loads(line) for line in text.splitlines()]


def values(result: dict[str, Any]) -> dict[str, float]:
    return {name: figure["value"] for name, figure in result["figures"].items()}


def test_every_suite_by_hand(config: RunConfig) -> None:
    run, service = open_run(config), TableService(answer)
    found = evaluate(run, 0, service)
    assert list(found) == ["pope", "amber", "halbench", "mmhal", "mementos"]
    pope = values(found["pope"])
    assert (pope["coco_pope_random.accuracy"], pope["coco_pope_random.yes_share"]) == (0.5, 1)
    amber = values(found["amber"])
    assert [amber[k] for k in ("chair", "cover", "hal", "cog")] == [0.5, 0.5, 1, 1]
    assert (amber["all.accuracy"], amber["existence.recall"], amber["all.precision"]) == (
        pytest.approx(1 / 3),
        0,
        0,
    )
    halbench = values(found["halbench"])
    assert (halbench["response"], halbench["mention"]) == (1, 2 / 4)
    mmhal = values(found["mmhal"])
    assert (mmhal["score"], mmhal["hallucination"], mmhal["score.counting"]) == (1, 1, 1)
    mementos = values(found["mementos"])
    assert (mementos["object.recall"], mementos["behaviour.precision"]) == (0.5, 0.5)
    assert found["mmhal"]["judge"] | {"cost": 0} == {
        "model": "judge-1",
        "asked": 4,
        "cached": 0,
        "tries": 4,
        "prompt_tokens": 400,
        "answer_tokens": 40,
        "cost": 0,
        "cost_before": 0,
        "failures": {},
    }
    assert found["mmhal"]["judge"]["cost"] == pytest.approx(480 / 1e6)
    assert [result["rows"] for result in found.values()] == [2, 4, 2, 4, 2]
    assert found["mmhal"]["counts"] == {f"score.{kind}": 1 for kind in KINDS}
    row = rows_of(run, 0, "mmhal")[1]
    assert row["row_id"] == "2-id1" and row["kind"] == "counting" and row["rating"] == 1
    assert row["response"] == "A tree and a car." and row["judge"].startswith("Seen.")
    assert rows_of(run, 0, "amber")[0]["hallucinated"] == ["cloud"]


def test_what_is_done_is_not_done_again(config: RunConfig, judge: FakeJudge) -> None:
    run, service = open_run(config), TableService(answer)
    evaluate(run, 0, service)
    count, asked = len(service.asked), len(judge.prompts)
    evaluate(run, 0, service)
    assert (len(service.asked), len(judge.prompts)) == (count, asked)
    # A suite with other settings is run again, and no other; what the judge said is kept.
    few = config.model_dump(mode="json")["evaluation"]["mmhal"] | {"limit": 2}
    again = open_run(config, mmhal=few)
    service.asked.clear()
    result = evaluate(again, 0, service)["mmhal"]
    asked_again = sorted(text for _, text in service.asked)
    assert asked_again == ["What about case 0?", "What about case 1?"]
    assert (result["rows"], result["judge"]["cached"]) == (2, 2)
    assert len(judge.prompts) == asked


def test_suites_are_chosen(config: RunConfig) -> None:
    run, service = open_run(config), TableService(answer)
    assert list(evaluate(run, 0, service, ["mmhal", "pope"])) == ["pope", "mmhal"]
    with pytest.raises(ConfigError, match="no files for the suite chair; it has pope, amber"):
        evaluate(run, 0, service, ["chair"])
    assert (first_left(run, ["pope"]), first_left(run)) == (0, 0)
    run.once("round-1-merge", "merge", lambda stage: ({}, ""))
    assert (first_left(run, ["pope"]), first_left(run)) == (1, 0)


def test_before_and_after_are_paired(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run, service = open_run(config), TableService(answer)
    evaluate(run, 0, service)
    evaluate(run, 1, service, ["pope", "amber", "mmhal"])
    found = compared(run, 0, 1)
    change = {name: figure["value"] for name, figure in found["mmhal"]["difference"].items()}
    assert (change["score"], change["hallucination"], found["mmhal"]["pairs"]) == (4, -1, 4)
    assert found["pope"]["difference"]["coco_pope_random.accuracy"]["value"] == 0.5
    assert found["amber"]["difference"]["existence.f1"]["value"] == 1
    assert found["mementos"]["after"] is None and found["mementos"]["difference"] == {}
    page = summary.html(
        {
            **{"run": "r", "folder": "f", "suites": found, "confidence": 0.95, "seconds": {}},
            "provenance": {"versions": {}, "revision": "x", "seed": 0},
            "critic": {
                "judged": 0,
                "consistent": 0,
                "unparseable": 0,
                "agreement_with_oracle": None,
            },
            "ledger": {"rows": 0, "outcomes": {}, "quarantine_reasons": {}},
        }
    )
    assert "MMHal-Bench" in page and "+4.000" in page and "counting ↑ (n = 1)" in page
    assert "judge judge-1: 4 asked, 0 kept from before, 0 failed, 440 tokens, cost 0.00<" in page
    console = tables.Console(width=100)
    console.print(tables.suite_table("mmhal", found["mmhal"], 0.95))
    console.print(tables.suite_table("mementos", found["mementos"], 0.95))
    out = capsys.readouterr().out
    assert "4 → 4 questions scored" in out and "+4.000" in out and "counting ↑ (n = 1)" in out
    assert "2 → – questions scored" in out


def test_what_other_settings_scored_is_no_side_of_a_comparison(config: RunConfig) -> None:
    run, service = open_run(config), TableService(answer)
    evaluate(run, 0, service, ["mmhal"])
    values = config.model_dump(mode="json")["evaluation"]
    other = open_run(config, judge=values["judge"] | {"model": "judge-2"})
    assert first_left(other, ["mmhal"]) == 0
    evaluate(other, 1, service, ["mmhal"])
    found = compared(other, 0, 1)["mmhal"]
    assert found["before"] is None and found["after"] and found["difference"] == {}


def test_a_judge_that_fails_leaves_rows_out(config: RunConfig, judge: FakeJudge) -> None:
    """Must never be a score: one question times out, one gets nonsense, the others are judged."""

    def moody(prompt: str) -> Any:
        if "case 0" in prompt:
            return says(429, {}, Retry_After="0")
        return "no idea" if "case 1" in prompt else verdict(prompt)

    judge.answer = moody
    changes: dict[str, Any] = config.model_dump(mode="json")["evaluation"]["judge"]
    run, service = open_run(config, judge=changes | {"max_failed_share": 0.5}), TableService(answer)
    result = evaluate(run, 0, service, ["mmhal"])["mmhal"]
    assert result["failed"] == {"rate_limit": 1, "unparseable": 1} and result["rows"] == 2
    assert values(result)["score"] == 1  # the mean of the two that were judged
    assert "score.attribute" not in values(result)
    rows = rows_of(run, 0, "mmhal")
    assert [row["failure"] for row in rows] == ["rate_limit", "unparseable", None, None]
    assert all("rating" not in row for row in rows[:2])
    judge.answer = verdict
    evaluate(run, 1, service, ["mmhal"])
    found = compared(run, 0, 1)["mmhal"]
    assert found["pairs"] == 2
    shown = [found["labels"][f"score.{kind}"] for kind in ("attribute", "holistic")]
    assert shown == ["attribute ↑ (n = 0 → 1)", "holistic ↑ (n = 1)"]


def test_too_many_failures_fail_the_suite_and_cost_nothing_twice(
    config: RunConfig, judge: FakeJudge
) -> None:
    judge.answer = lambda prompt: drips if "case 3" in prompt else verdict(prompt)
    changes: dict[str, Any] = config.model_dump(mode="json")["evaluation"]["judge"]
    run = open_run(config, judge=changes | {"timeout_s": 2.0})
    service = TableService(answer)
    with pytest.raises(ServiceError, match=r"1 of 4 questions \(1 timeout\), over the 2\.0%"):
        evaluate(run, 0, service, ["mmhal"])
    assert run.done("round-0-evaluate-mmhal") is None
    assert [row["failure"] for row in rows_of(run, 0, "mmhal")] == [None] * 3 + ["timeout"]
    count = len(judge.prompts)
    judge.answer, service.round = verdict, None
    result = evaluate(run, 0, service, ["mmhal"])["mmhal"]
    assert service.round is None  # not even deployed
    assert (result["rows"], result["judge"]["cached"]) == (4, 3)
    assert len(judge.prompts) == count + 1  # the one that failed
    words = "4 asked, 3 kept from before, 0 failed, 110 tokens, cost 0.00, those kept 0.00"
    assert words in tables.judge_line(result["judge"])
    assert len(service.asked) == len(KINDS)  # the policy's answers were kept


def test_a_policy_that_fails_often_fails_the_suite(config: RunConfig) -> None:
    silent = TableService(lambda number, text: None if "dog" in text else "Yes")
    with pytest.raises(ServiceError, match="1 of 2 evaluation requests failed, coco_pope_random/1"):
        evaluate(open_run(config), 0, silent, ["pope"])


def test_a_missing_image_is_named_before_it_is_scored(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "mmhal" / "images" / "2_o.png").unlink()
    with pytest.raises(DataError, match=r"3-id2: image '2_o\.png' is not in"):
        evaluate(open_run(config), 0, TableService(answer), ["mmhal"])
    (tmp_path / "mmhal" / "images" / "0_o.png").rename(tmp_path / "mmhal" / "images" / "id2.jpg")
    with pytest.raises(DataError, match=r"1-id0: image '0_o\.png'"):  # found by its id
        evaluate(open_run(config), 0, TableService(answer), ["mmhal"])


def test_a_question_that_is_there_twice_is_named(config: RunConfig, tmp_path: Path) -> None:
    file = tmp_path / "coco" / "halbench.jsonl"
    file.write_text(file.read_text() * 2)
    with pytest.raises(DataError, match=r"evaluation\.halbench: has 9 twice \(2 such\)"):
        evaluate(open_run(config), 0, TableService(answer), ["halbench"])


def test_no_question_of_amber_takes_the_place_of_another(config: RunConfig, tmp_path: Path) -> None:
    section = config.model_dump(mode="json")["evaluation"]["amber"]
    twice = open_run(config, amber=section | {"parts": ["existence", "existence"]})
    with pytest.raises(DataError, match=r"evaluation\.amber: has 8633 twice \(1 such\)"):
        evaluate(twice, 0, TableService(answer), ["amber"])
    file = tmp_path / "amber" / "query" / "query_discriminative-relation.json"
    [row] = json.loads(file.read_text())
    file.write_text(json.dumps([row | {"id": 8633}]))  # one of another part's
    with pytest.raises(DataError, match=r"evaluation\.amber: has 8633 twice"):
        evaluate(open_run(config), 0, TableService(answer), ["amber"])


def test_halbench_takes_the_captions_of_the_whole_section(
    config: RunConfig, tmp_path: Path
) -> None:
    """Of the image 25, which has a person, people also told a dog."""
    folder = tmp_path / "coco"
    images = [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg"} for n in (9, 25, 36)]
    told = {"images": images, "annotations": [{"image_id": 25, "caption": "A man and a dog."}]}
    (folder / "captions.json").write_text(json.dumps(told))
    service = TableService(answer)
    run = open_run(config, captions=str(folder / "captions.json"))
    assert values(evaluate(run, 0, service, ["halbench"])["halbench"])["mention"] == 1 / 4
    section = config.model_dump(mode="json")["evaluation"]["halbench"]
    (folder / "none.json").write_text(json.dumps(told | {"annotations": []}))
    own = section | {"captions": str(folder / "none.json")}
    run = open_run(config, captions=str(folder / "captions.json"), halbench=own)
    assert values(evaluate(run, 0, service, ["halbench"])["halbench"])["mention"] == 2 / 4
    # An image that the captions alone have is not annotated.
    (folder / "halbench.jsonl").write_text('{"image_id": 36, "question": "Tell all of 9."}\n')
    with pytest.raises(DataError, match=r"instances\.json: has no image 000000000036\.jpg"):
        evaluate(run, 1, service, ["halbench"])


def test_other_suites_make_no_other_run(config: RunConfig) -> None:
    open_run(config)
    open_run(config, mmhal=None, mementos=None, judge=None)
    bare = config.model_dump(mode="json") | {"evaluation": None, "name": "bare"}
    Run.open(RunConfig.parse(bare), Progress(io.StringIO()))
    added = bare | {"evaluation": config.model_dump(mode="json")["evaluation"]}
    Run.open(RunConfig.parse(added), Progress(io.StringIO()))
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        Run.open(RunConfig.parse(added | {"seed": 5}), Progress(io.StringIO()))


def test_yes_no_questions_get_their_suffix(config: RunConfig) -> None:
    section = config.model_dump(mode="json")["evaluation"]["amber"]
    run = open_run(config, amber=section | {"suffix": " Answer yes or no.", "limit": 1})
    service = TableService(answer)
    evaluate(run, 0, service, ["amber"])
    texts = [text for _, text in service.asked]
    questions = [f"{text} Answer yes or no." for *_, text in AMBER_QUESTIONS]
    assert sorted(texts) == sorted(["Describe this image.", *questions])


def test_a_file_that_cannot_be_used_costs_no_answers(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = TableService(answer)
    (tmp_path / "mementos" / "dl_description.csv").write_text("image_name\nrw_1.png\n")
    with pytest.raises(DataError, match=r"dl_description\.csv:2: not a question"):
        evaluate(open_run(config), 0, service)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match=r"key_env: \$JUDGE_KEY holds no key here"):
        evaluate(open_run(config), 0, service, ["pope", "mmhal"])
    assert not service.asked
    evaluate(open_run(config), 0, service, ["pope"])


def test_the_judge_reads_both_descriptions(config: RunConfig, judge: FakeJudge) -> None:
    evaluate(open_run(config), 0, TableService(answer), ["mementos"])
    told = sorted(prompt.partition("The texts:")[2].split("\n")[2] for prompt in judge.prompts)
    assert told == [f"1. {text}" for _, text in DAILY]
    assert all("2. A dog plays." in prompt for prompt in judge.prompts)

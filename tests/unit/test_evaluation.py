"""Evaluation: what is asked, how answers are scored, and what a failed answer costs."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sima_ray.config import EvaluationConfig, RunConfig
from sima_ray.data.benchmarks import image_key, read_questions
from sima_ray.demo.world import World, build_world
from sima_ray.errors import ConfigError, DataError, ServiceError
from sima_ray.metrics.chair import default_vocabulary
from sima_ray.ports import Completion, CompletionRequest, Policy
from sima_ray.runtime.evaluation import captions_from_jsonl, error_counter, evaluate, read_truth
from sima_ray.runtime.progress import Stage

SCENES = 12


class FakePolicy(Policy):
    """Answers from a table of questions' images; no model."""

    def __init__(self, answer: Callable[[CompletionRequest], Completion]) -> None:
        self.answer = answer
        self.requests: list[CompletionRequest] = []

    async def complete(self, request: CompletionRequest) -> Completion:
        self.requests.append(request)
        return self.answer(request)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"), "test", SCENES)


def settings(world: World, **changes: object) -> EvaluationConfig:
    values = {
        "prompts": str(world.prompts),
        "images": str(world.images),
        "instances": str(world.instances),
        "captions": str(world.captions),
        "error_counter": "sima_ray.demo.oracle:count_errors",
    }
    return EvaluationConfig.model_validate(values | changes)


def run_config(world: World) -> RunConfig:
    return RunConfig.parse(
        {
            "name": "r",
            "data": {"prompts": str(world.prompts), "images": str(world.images)},
            "policy": {"model": "model"},
        }
    )


def run(world: World, policy: Policy, **changes: object):
    config = run_config(world)
    stage = Stage("evaluate", io.StringIO())
    return evaluate(settings(world, **changes), config, lambda: policy, stage)


def knowing(world: World) -> FakePolicy:
    """A policy that gives every image its ground truth, and yes to every other question."""
    truth = {
        (world.images / q.image).read_bytes(): q.expected
        for q in read_questions(str(world.prompts), "ground_truth")
    }

    def answer(request: CompletionRequest) -> Completion:
        image = next(part["image"] for part in request["content"] if "image" in part)
        question = next(part["text"] for part in request["content"] if "text" in part)
        return {"text": "Yes." if question.startswith("Is there") else truth[image]}

    return FakePolicy(answer)


def test_the_ground_truth_scores_without_an_error(world: World) -> None:
    policy = knowing(world)
    figures = run(world, policy).figures()
    assert figures["captions"] == SCENES == len(policy.requests)
    assert figures["chair_s"]["value"] == figures["chair_i"]["value"] == 0
    assert figures["recall"]["value"] == 1
    assert figures["errors"] == {"value": 0, "low": 0, "high": 0}
    assert all(request["temperature"] == 0 for request in policy.requests)


def test_the_ground_truth_is_never_shown_to_the_policy(world: World) -> None:
    policy = knowing(world)
    run(world, policy)
    truths = {q.expected for q in read_questions(str(world.prompts), "ground_truth")}
    shown = [part["text"] for r in policy.requests for part in r["content"] if "text" in part]
    assert not any(truth in text for truth in truths for text in shown)


def test_captions_survive_the_round_trip(world: World) -> None:
    result = run(world, knowing(world))
    again = captions_from_jsonl(result.captions_jsonl())
    assert [(c.row_id, c.response, c.errors) for c in again] == [
        (c.row_id, c.response, c.errors) for c in result.captions
    ]


def test_many_failed_answers_stop_the_evaluation(world: World) -> None:
    with pytest.raises(ServiceError, match=f"{SCENES} of {SCENES} evaluation requests failed"):
        run(world, FakePolicy(lambda request: {"error": "too long"}))


def test_a_service_that_gives_up_on_one_answer_costs_that_one(world: World) -> None:
    policy = knowing(world)

    class Flaky(FakePolicy):
        async def complete(self, request: CompletionRequest) -> Completion:
            raise ServiceError("no answer in time")

    with pytest.raises(ServiceError, match="evaluation requests failed"):
        run(world, Flaky(policy.answer))


def test_an_image_without_annotations_is_named(world: World, tmp_path: Path) -> None:
    lines = world.prompts.read_text() + json.dumps(
        {"id": "x", "image": "stranger.png", "text": "?", "ground_truth": "a"}
    )
    (tmp_path / "prompts.jsonl").write_text(lines)
    with pytest.raises(DataError, match=r"has no image stranger\.png"):
        run(world, knowing(world), prompts=str(tmp_path / "prompts.jsonl"))


def test_a_bad_question_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"image": "a.png", "text": "?", "label": "yes"}\n\n{"image": "a.png"}\n')
    with pytest.raises(DataError, match=r"q\.jsonl:3: not a question"):
        read_questions(str(file), "label")


def test_an_unknown_error_counter_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="nowhere:nothing"):
        error_counter("nowhere:nothing")


@pytest.mark.parametrize(
    "name",
    ["000000000009.jpg", "train2017/000000000009.jpg", "val2014/COCO_val2014_000000000009.jpg"],
)
def test_all_names_of_an_image_have_one_key(name: str) -> None:
    assert image_key(name) == "000000000009.jpg"


def test_instances_and_captions_of_two_releases_of_coco(tmp_path: Path) -> None:
    """They call the same image by different names; one that the captions alone have is left out."""
    instances, captions = tmp_path / "instances.json", tmp_path / "captions.json"
    seen = {"images": [{"id": 42, "file_name": "COCO_val2014_000000000042.jpg"}]}
    boxes = {"annotations": [{"image_id": 42, "category_id": 18}]}
    instances.write_text(json.dumps(seen | boxes | {"categories": [{"id": 18, "name": "dog"}]}))
    more = [{"id": 42, "file_name": "000000000042.jpg"}, {"id": 7, "file_name": "000000000007.jpg"}]
    said = [{"image_id": 42, "caption": "A cat."}, {"image_id": 7, "caption": "A bus."}]
    captions.write_text(json.dumps({"images": more, "annotations": said}))
    truth = read_truth(str(instances), str(captions), default_vocabulary())
    assert truth == {"000000000042.jpg": {"dog", "cat"}}

"""The whole loop, small: real Ray, Serve, vLLM, Data, Train and DeepSpeed on the demo's policy and world.

The prompts come out of a file like LLaVA-Instruct's, and their images stay in a zip. Bad rows are among them: each
must get its line, its reason and its place in the ledger, and the others must finish.
"""

import io
import json
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from lmms_task import PYTHON, needs_lmms_eval, write_task
from PIL import Image

from sima_ray.config import RunConfig
from sima_ray.config.lmms import LmmsEval
from sima_ray.data.instruct import draw_prompts
from sima_ray.demo.world import World, build_world
from sima_ray.errors import JobFailed
from sima_ray.runtime import cluster, submission
from sima_ray.runtime.lmms_eval import run_lmms_eval
from sima_ray.runtime.progress import Progress
from sima_ray.runtime.run import Run

SCENES, HELD_OUT, ROUNDS = 60, 24, 1


@dataclass
class Finished:
    """A run that went through the pipeline, and what the job printed."""

    config: RunConfig
    folder: Path
    lines: list[str]
    target: submission.Target

    def text(self) -> str:
        return "\n".join(line for line in self.lines if line.startswith("[sima] "))


def as_instruct(world: World, file: Path) -> str:
    """A world's prompts in the format of LLaVA-Instruct-150K."""
    prompts = [json.loads(line) for line in world.prompts.read_text().splitlines()]
    records = [
        {
            "id": prompt["id"],
            "image": prompt["image"],
            "conversations": [
                {"from": "human", "value": f"<image>\n{prompt['text']}"},
                {"from": "gpt", "value": prompt["ground_truth"]},
            ],
        }
        for prompt in prompts
    ]
    file.write_text(json.dumps(records))
    return str(file)


def zipped(images: Path, file: Path) -> str:
    """The images as COCO publishes them: in a zip, below train2017/."""
    with zipfile.ZipFile(file, "w") as archive:
        for image in sorted(images.iterdir()):
            archive.write(image, f"train2017/{image.name}")
    return str(file)


def bad_lines(images: Path, first: str) -> list[str]:
    """Prompts that cannot be used, each in its own way, one of them because it repeats the first."""
    good = {"image": "000000000001.png", "text": "Describe the image.", "ground_truth": "A dog."}
    encoded = io.BytesIO()
    Image.new("RGB", (96, 96), "red").save(encoded, "JPEG")
    (images / "truncated.jpg").write_bytes(encoded.getvalue()[:-200])
    Image.new("1", (10_000, 10_000)).save(images / "huge.png")
    return [
        json.dumps(good)[:40],
        json.dumps({"id": "no-truth", "image": good["image"], "text": good["text"]}),
        json.dumps(good | {"id": "no-image", "image": "nowhere.png"}),
        json.dumps(good | {"id": "truncated", "image": "truncated.jpg"}),
        json.dumps(good | {"id": "huge", "image": "huge.png"}),
        first,
        json.dumps(good | {"id": "empty", "ground_truth": " "}),
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    root = tmp_path_factory.mktemp("loop")
    world = build_world(root / "train", "train", SCENES)
    test = build_world(root / "test", "test", HELD_OUT)
    source = as_instruct(world, root / "complex_reasoning_77k.json")
    draw_prompts([source], str(world.prompts), count=None, seed=0)
    with open(world.prompts, "r+", encoding="utf-8") as prompts:
        first = prompts.read().partition("\n")[0]
        prompts.write("\n".join(bad_lines(world.images, first)) + "\n")
    values = yaml.safe_load(
        Path("configs/demo.yaml").read_text().replace("runs/demo-world", str(root))
    )
    values |= {"name": "loop", "runs": str(root / "runs"), "rounds": ROUNDS}
    images = zipped(world.images, root / "train2017.zip")
    values["data"] |= {"images": images, "max_image_pixels": 50_000_000}
    values["evaluation"]["pope"] = [str(test.pope["random"])]
    shutil.rmtree(world.images)
    values["policy"]["engine"]["dtype"] = "float32"  # so that two engines can be compared exactly
    values["policy"]["service"] |= {"port": cluster.free_port()}
    values["training"] |= {"epochs": 1, "batch_size": 8, "micro_batch_size": 8}
    values["training"] |= {"dtype": "float32", "reference": "generated"}
    config = RunConfig.parse(values)
    running = cluster.start(cpus=4, gpus=0)
    try:
        done = Finished(config, Path(config.runs) / "loop", [], submission.Target.of(running))
        run_pipeline(done)
        yield done
    finally:
        cluster.stop(running)


def run_pipeline(run: Finished) -> None:
    job = submission.submit("pipeline", run.config, run.target)
    try:
        submission.follow(job, run.target, run.lines.append)
    except Exception:
        print("\n".join(run.lines[-60:]))
        raise


def test_the_summary_has_figures_and_a_ledger_that_adds_up(finished: Finished) -> None:
    summary = json.loads((finished.folder / "summary.json").read_text())
    for side in ("before", "after"):
        assert summary[side]["captions"] == HELD_OUT
        for name in ("chair_s", "chair_i", "recall", "objects", "length", "errors"):
            figure = summary[side][name]
            assert figure["low"] <= figure["value"] <= figure["high"]
    ledger = summary["ledger"]
    assert ledger["rows"] == SCENES + 7 == sum(ledger["outcomes"].values())
    assert ledger["quarantined"] == 7 == sum(ledger["quarantine_reasons"].values())
    assert ledger["pairs"] > 0
    assert set(summary["critic"]) >= {"consistent", "unparseable", "agreement_with_oracle"}
    assert (finished.folder / "report.html").read_text().startswith("<!doctype html>")


def test_a_suite_runs_on_every_policy_and_is_paired(finished: Finished) -> None:
    suite = json.loads((finished.folder / "summary.json").read_text())["suites"]["pope"]
    assert suite["pairs"] == suite["before"]["rows"] == suite["after"]["rows"] > HELD_OUT
    for side, number in (("before", 0), ("after", 1)):
        assert suite[side]["failed"] == {}
        file = finished.folder / f"round-{number}" / "evaluation" / "pope.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        accuracy = sum(row["said"] == row["label"] for row in rows) / len(rows)
        figure = suite[side]["figures"]["pope_random.accuracy"]
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert figure["value"] == pytest.approx(accuracy) and accuracy > 0.6
    change = suite["difference"]["pope_random.accuracy"]
    assert change["low"] <= change["value"] <= change["high"]
    assert "pope random accuracy" in (finished.folder / "report.html").read_text()


def test_each_bad_row_has_its_line_and_reason(finished: Finished) -> None:
    file = finished.folder / "round-1" / "quarantine.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["source"].rpartition(":")[2], row["reason"]) for row in rows] == [
        (str(SCENES + 1), "malformed_line"),
        (str(SCENES + 2), "missing_field"),
        (str(SCENES + 3), "missing_image"),
        (str(SCENES + 4), "broken_image"),
        (str(SCENES + 5), "image_too_large"),
        (str(SCENES + 6), "duplicate_id"),
        (str(SCENES + 7), "empty_field"),
    ]
    for row in rows:
        assert row["error"] and "\n" not in row["error"]
    shown = finished.text()
    for number in (1, 2, 6, 7):  # found before any image is read, so said at once
        assert f"prompts.jsonl:{SCENES + number}: " in shown


def test_the_preferences_load_everywhere(finished: Finished) -> None:
    from datasets import load_dataset

    folder = finished.folder / "round-1"
    ledger = json.loads((folder / "ledger.json").read_text())
    rows = pq.read_table(folder / "preferences")
    assert rows.num_rows == ledger["rows"] == len(set(rows["row_id"].to_pylist()))
    critiques = [c for found in rows["critiques"].to_pylist() for c in found or ()]
    assert critiques and all(
        c["choice"] is None
        or (c["probability"] >= 0.5) == ((c["choice"] == 1) == (c["order"] == "12"))
        for c in critiques
    )
    pairs = pq.read_table(folder / "pairs.parquet").to_pylist()
    llava = json.loads((folder / "pairs.llava.json").read_text())
    trl: Any = load_dataset(
        "parquet",
        data_files=str(folder / "pairs.trl.parquet"),
        split="train",
        cache_dir=str(finished.folder / "cache"),
    )
    assert len(pairs) == len(llava) == len(trl) == ledger["pairs"]
    for pair, as_llava, as_trl in zip(pairs, llava, trl, strict=True):
        assert as_llava["conversations"][1]["value"] == pair["chosen"] != pair["rejected"]
        assert as_llava["rejected_conversations"][1]["value"] == pair["rejected"]
        assert as_trl["chosen"][0]["content"][0]["text"] == pair["chosen"]
        assert as_trl["images"][0].size == (96, 96)


def test_the_engines_log_probabilities_are_those_that_tuning_computes(finished: Finished) -> None:
    import torch

    from sima_ray.policy.checkpoint import load_policy
    from sima_ray.tuning.dataset import PairEncoder, read_pairs
    from sima_ray.tuning.forward import concatenated
    from sima_ray.tuning.generated import came_with

    model, processor = load_policy(finished.config.policy.model, dtype="float32")
    encoder = PairEncoder(processor, finished.config.data.images, 512)
    pairs = read_pairs(str(finished.folder / "round-1" / "pairs.parquet"))
    apart: dict[str, list[float]] = {"greedy": [], "sampled": []}
    for pair in map(encoder.encode, pairs):
        given = came_with(pair)
        assert given is not None, pair.pair.row_id  # as many tokens, the end among them
        with torch.no_grad():
            logps = concatenated(model, [pair])
        far = abs(given[0] - logps.chosen_B.item()) / len(pair.chosen_C)
        apart[pair.pair.chosen_from].append(far)
        far = abs(given[1] - logps.rejected_B.item()) / len(pair.rejected_R)
        apart[pair.pair.rejected_from].append(far)
    for kind, distances in apart.items():
        print(f"{kind}: {len(distances)} responses, {max(distances):.1e} nats a token at most")
        assert distances and max(distances) < 1e-3
    generation = finished.config.generation
    assert (generation.temperature, generation.top_p) == (0.8, 0.9)  # of the sampled ones

    state = json.loads((finished.folder / "round-1" / "train" / "train.json").read_text())
    assert state["references"] == {"computed": 0, "generated": len(pairs)}
    assert state["reference_note"] is None and state["warnings"] == []


def test_the_adapter_loads_and_only_touches_the_language_model(finished: Finished) -> None:
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    base = LlavaForConditionalGeneration.from_pretrained(finished.config.policy.model)
    model = PeftModel.from_pretrained(base, finished.folder / "round-1" / "train" / "adapter")
    lora = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    assert lora and all("language_model" in name for name in lora)
    assert any(weight.abs().sum() > 0 for name, weight in lora.items() if "lora_B" in name)


def test_the_merged_model_says_the_same_in_transformers_and_vllm(finished: Finished) -> None:
    captions = [
        json.loads(line)
        for line in (finished.folder / "round-1" / "captions.jsonl").read_text().splitlines()
    ][:20]
    assert len(captions) == 20
    for caption in captions:  # these came from vLLM, through the service
        assert greedy_in_transformers(finished, caption) == caption["response"], caption["row_id"]


def greedy_in_transformers(run: Finished, caption: dict[str, str]) -> str:
    import torch

    from sima_ray.policy.chat import render_prompt
    from sima_ray.policy.checkpoint import load_policy
    from sima_ray.ports import image_part, text_part

    loaded: Any = load_policy(run.folder / "round-1" / "policy", dtype="float32")
    model, processor = loaded
    evaluation = run.config.evaluation
    assert evaluation is not None and evaluation.images is not None
    file = Path(evaluation.images) / caption["image"]
    text = render_prompt(processor, [image_part(file.read_bytes()), text_part(caption["text"])])
    inputs = processor(images=Image.open(file).convert("RGB"), text=text, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=evaluation.max_tokens)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


@needs_lmms_eval
def test_lmms_eval_compares_base_and_tuned(finished: Finished, tmp_path: Path) -> None:
    evaluation = finished.config.evaluation
    assert evaluation is not None
    assert evaluation.images is not None and evaluation.prompts is not None
    rows = [
        {
            "picture": str(Path(evaluation.images) / prompt["image"]),
            "question": prompt["text"],
            "answer": prompt["ground_truth"],
        }
        for prompt in map(json.loads, Path(evaluation.prompts).read_text().splitlines())
    ]
    write_task(tmp_path / "tasks", "scenes", rows)
    write_task(tmp_path / "tasks", "lengthy", [*rows[:2], rows[2] | {"question": "?" * 30_000}])
    settings = LmmsEval(
        tasks=["scenes", "lengthy"],
        include_path=str(tmp_path / "tasks"),
        python=str(PYTHON),
        variables=["HF_HUB_OFFLINE=1", f"HF_HOME={tmp_path}"],
    )
    retries = {"retries": 0}
    config = finished.config.model_copy(
        update={"generation": finished.config.generation.model_copy(update=retries)}
    )
    lines: list[str] = []
    files = {"lmms-eval.json": settings.model_dump_json()}
    job = submission.submit("lmms_eval", config, finished.target, files=files)
    with pytest.raises(JobFailed):  # for one of the tasks has no figures
        submission.follow(job, finished.target, lines.append)
    print("\n".join(line for line in lines if line.startswith("[sima] ")))
    found = json.loads((finished.folder / "lmms-eval.json").read_text())
    assert found["problems"] == [
        {"task": "lengthy", "round": number, "reason": "1 of 3 requests failed"}
        for number in (0, 1)
    ]

    # The figures are those of the captions that our own evaluation had, from the same policies.
    rows_of = {row["metric"]: row for row in found["rounds"]["1"]}
    assert {row["task"] for row in found["rounds"]["1"]} == {"scenes"}
    for number, side in ((0, "before"), (1, "after")):
        captions = [
            json.loads(line)["response"]
            for line in (finished.folder / f"round-{number}" / "captions.jsonl")
            .read_text()
            .splitlines()
        ]
        kept = finished.folder / f"round-{number}" / "lmms-eval" / "scenes"
        samples = (kept / "samples_scenes.jsonl").read_text().splitlines()
        assert [json.loads(sample)["filtered_resps"] for sample in samples] == captions
        pairs = [
            [set(text.lower().strip(".").split()) for text in (caption, row["answer"])]
            for caption, row in zip(captions, rows, strict=True)
        ]
        named = sum(len(said & true) / len(true) for said, true in pairs) / len(pairs)
        assert rows_of["named"][side] == pytest.approx(named)
    for row in rows_of.values():
        assert row["n"] == HELD_OUT
        change = row["change"]
        assert change["value"] == pytest.approx(row["after"] - row["before"])
        assert change["low"] <= change["value"] <= change["high"]
    assert "| scenes | named ↑ | 24 |" in (finished.folder / "lmms-eval.md").read_text()

    # What is there is not asked again: this needs no cluster.
    said = io.StringIO()
    again = run_lmms_eval(
        Run.open(config, Progress(said)), settings.model_copy(update={"tasks": ["scenes"]})
    )
    assert said.getvalue().count("scenes       done before") == 2
    assert [row.to_json() for row in again.rows[1]] == found["rounds"]["1"]


def test_running_it_again_does_nothing_twice(finished: Finished) -> None:
    before = (finished.folder / "summary.json").read_text()
    stamps = {p: p.stat().st_mtime_ns for p in (finished.folder / "round-1").rglob("*.safetensors")}
    finished.lines.clear()
    run_pipeline(finished)
    assert finished.text().count("done before") == 8
    assert "deployed" not in finished.text()
    assert json.loads((finished.folder / "summary.json").read_text()) == json.loads(before)
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}


def test_a_stage_whose_result_was_removed_runs_again(finished: Finished) -> None:
    (finished.folder / "stages" / "round-1-merge.json").unlink()
    shutil.rmtree(finished.folder / "round-1" / "policy")
    finished.lines.clear()
    run_pipeline(finished)
    assert "parity" in finished.text()
    assert (finished.folder / "round-1" / "policy" / "model.safetensors").exists()
    assert finished.text().count("done before") == 7


def test_an_adapter_is_promoted_as_the_policy_that_it_makes(finished: Finished) -> None:
    (finished.folder / "stages" / "round-1-merge.json").unlink()
    shutil.rmtree(finished.folder / "round-1" / "policy")
    adapter = str(finished.folder / "round-1" / "train" / "adapter")
    job = submission.submit_command("promote", finished.target, (adapter, "--version=tuned"))
    lines: list[str] = []
    with pytest.raises(JobFailed):  # the run has taken its service down
        submission.follow(job, finished.target, lines.append)
    assert "parity" in "".join(lines) and "no application 'policy'" in "".join(lines)
    assert (finished.folder / "round-1" / "policy" / "model.safetensors").exists()

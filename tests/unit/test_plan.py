"""Plans: what every shipped run config needs on the GPUs that it names, by arithmetic checked by hand."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sima_ray.config import RunConfig
from sima_ray.errors import DataError, ModelError
from sima_ray.plan import workload
from sima_ray.plan.architecture import find_architecture, read_architecture
from sima_ray.plan.plan import Plan, make_plan, settings_on_gpus
from sima_ray.plan.workload import Assumptions

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(
    file for file in (ROOT / "configs").glob("*.yaml") if file.name not in ("demo.yaml",)
)


def planned(name: str, *settings: str, **assumed: Any) -> Plan:
    config = RunConfig.load(ROOT / "configs" / f"{name}.yaml", settings)
    return make_plan(config, *find_architecture(config.policy.model), Assumptions(**assumed))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_config_fits_the_gpus_that_it_names(file: Path) -> None:
    plan = planned(file.stem)
    assert plan.problems == [] and plan.change is None
    assert plan.config.name == file.stem
    assert plan.lines()[-1] == "fits"
    assert plan.section("hours").value("whole run") < 24


def test_llava_7b_by_hand() -> None:
    plan = planned("llava-1.5-7b")
    serve, train = plan.section("serve"), plan.section("train")
    assert serve.value("weights") == pytest.approx(7_063_427_072 * 2 / 1e9)
    assert serve.value("KV cache of a token") == pytest.approx(2 * 32 * 32 * 128 * 2 / 1e6)
    adapter = 128 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert train.value("adapters") == pytest.approx(adapter * 2 / 1e9)
    # Float32 weights, two moments, and sums of gradients: 16 bytes, over 8 workers in ZeRO-2.
    assert train.value("optimizer, float32") == pytest.approx(adapter * 16 / 8 / 1e9)
    # The longest row: 576 + 60 tokens, and two responses of 1,024.
    assert "2,684 tokens (636 + 2 × 1,024)" in "\n".join(train.lines())
    figures = [f.value for f in train.figures if f.label not in NOT_OF_THE_SUM and f.unit == "GB"]
    assert train.value("peak of a step") == pytest.approx(sum(figures))


NOT_OF_THE_SUM = (
    "peak of a step",
    *("CPU memory while loading", "CPU memory kept"),
)


def test_the_optimizer_by_stage_and_offload() -> None:
    def held(*settings: str) -> float:
        return planned("llava-1.5-7b", *settings).section("train").value("optimizer, float32")

    whole = held("training.zero_stage=0")
    assert held("training.zero_stage=1") == pytest.approx(whole * (4 + 12 / 8) / 16)
    assert held("training.zero_stage=2") == pytest.approx(whole / 8)
    assert held("training.zero_stage=3") == pytest.approx(whole / 8)
    assert held("training.offload=optimizer") == 0
    kept = planned("llava-1.5-7b", "training.offload=optimizer").section("train")
    assert kept.value("CPU memory kept") == pytest.approx(whole)


def test_llava_13b_on_24_gb_by_hand() -> None:
    """A worker holds a fourth of the weights, and the billion that DeepSpeed gathers at a time."""
    train = planned("llava-1.5-13b-4x24gb").section("train")
    assert train.value("weights") == pytest.approx(13_351_494_656 * 2 / 4 / 1e9)
    assert train.value("gathered weights") == 2.0
    adapter = 128 * 40 * (4 * (5120 + 5120) + 3 * (5120 + 13824))
    assert train.value("optimizer, float32") == pytest.approx(adapter * 16 / 4 / 1e9)
    assert train.value("peak of a step") < 17
    assert train.value("CPU memory while loading") == pytest.approx(32064 * 5120 * 2 / 1e9)
    whole = planned("llava-1.5-13b-4x24gb", "training.zero_stage=2").section("train")
    assert whole.value("CPU memory while loading") == pytest.approx(4 * 13_351_494_656 * 2 / 1e9)


def test_gathering_weights_takes_its_time() -> None:
    def hours(*settings: str) -> float:
        return planned("llava-1.5-13b-4x24gb", *settings).section("hours").value("train")

    whole = hours("training.zero_stage=2")
    # Two pairs a pass: 10,200 ÷ 8 forward and backward passes and as many of the reference, of three fourths each.
    gathered = 10_200 / 8 * 3 * 13_351_494_656 * 2 * 0.75 / 10e9 / 3600
    assert hours() == pytest.approx(whole + gathered)
    assert hours("training.tokens_per_micro_batch=null") == pytest.approx(whole + 2 * gathered)
    assert hours("training.workers=1") == pytest.approx(
        hours("training.workers=1", "training.zero_stage=2")
    )


def test_checkpointing_and_tensor_parallelism_take_less() -> None:
    without = planned("llava-1.5-7b", "training.gradient_checkpointing=false").section("train")
    assert without.value("activations") > 8 * planned("llava-1.5-7b").section("train").value(
        "activations"
    )
    two = planned("llava-1.5-7b", "policy.engine.tensor_parallel_size=2").section("serve")
    one = planned("llava-1.5-7b").section("serve")
    assert two.value("weights") == pytest.approx(one.value("weights") / 2)
    assert two.value("KV cache of a token") == pytest.approx(one.value("KV cache of a token") / 2)


@pytest.mark.parametrize(
    ("name", "settings", "words", "change"),
    [
        (
            "llava-1.5-7b-4x24gb",
            ["training.gradient_checkpointing=false"],
            "GB on a GPU of 24 GB",
            ["training.gradient_checkpointing=true"],
        ),
        (
            "llava-1.5-13b-4x24gb",
            ["training.zero_stage=2"],
            "GB on a GPU of 24 GB",
            ["training.zero_stage=3"],
        ),
        (
            "llava-1.5-7b",
            ["policy.service.release_for_training=false"],
            "8 training workers beside 1 of the policy that stay are more than 8 GPUs",
            ["policy.service.release_for_training=true"],
        ),
        (
            "llava-next-7b",
            ["training.max_tokens=2048"],
            "most pairs would be set aside",
            ["training.max_tokens=4096"],
        ),
        (
            "llava-1.5-7b",
            ["policy.engine.max_model_len=8192"],
            "max_model_len 8,192 is above the model's own 4,096 tokens",
            ["policy.engine.max_model_len=3072"],
        ),
        (
            "llava-1.5-7b",
            ["policy.engine.tensor_parallel_size=3"],
            "32 attention heads cannot be shared by 3 GPUs",
            ["policy.engine.tensor_parallel_size=4", "policy.service.max_replicas=2"],
        ),
        (
            "llava-1.5-7b-1x80gb",
            ["training.workers=2"],
            "2 training workers are more than 1 GPUs",
            ["training.workers=1"],
        ),
    ],
)
def test_what_does_not_fit_and_what_makes_it_fit(
    name: str, settings: list[str], words: str, change: list[str]
) -> None:
    plan = planned(name, *settings)
    assert any(words in problem for problem in plan.problems), plan.problems
    assert plan.change == change
    assert planned(name, *settings, *change).problems == []
    assert f"DOES NOT FIT: {plan.problems[0]}" in "\n".join(plan.lines())


def test_two_changes_where_one_does_not_help_and_none_where_nothing_does() -> None:
    small = planned("llava-1.5-7b", "hardware.gpus=1", "hardware.gpu_memory_gb=24")
    assert small.change == ["training.workers=1", "training.offload=optimizer"]
    hopeless = planned("llava-1.5-13b", "training.lora.targets=[]", "training.max_tokens=32")
    assert hopeless.problems  # an image alone has 576 tokens
    tiny = planned("llava-1.5-7b", "policy.engine.max_model_len=200000")
    assert tiny.change is not None


SMALLER = [
    ["hardware.gpus=1", "hardware.gpu_memory_gb=24", "training.workers=1"],
    ["training.gradient_checkpointing=false", "hardware.gpu_memory_gb=20"],
    ["policy.engine.max_model_len=1024"],
    ["training.max_tokens=640", "policy.service.release_for_training=false"],
]


@pytest.mark.parametrize("file", (ROOT / "configs").glob("*.yaml"), ids=lambda file: file.stem)
def test_what_a_plan_advises_passes_the_plan(file: Path) -> None:
    for settings in SMALLER:
        config = RunConfig.load(file, settings)
        model = find_architecture(config.policy.model)
        change = make_plan(config, *model).change
        if "cpu" in (config.policy.engine.accelerator, config.training.accelerator):
            change = settings_on_gpus(config, *model)
        if change is not None:
            changed = make_plan(RunConfig.load(file, [*settings, *change]), *model)
            assert changed.problems == [] and changed.change is None, (settings, change)


def test_a_run_of_cpus_that_would_not_fit_gpus_is_advised_what_fits_or_nothing() -> None:
    file = ROOT / "configs" / "demo.yaml"
    accelerators = ["policy.engine.accelerator=gpu", "training.accelerator=gpu"]
    plain = RunConfig.load(file)
    model = find_architecture(plain.policy.model)
    assert settings_on_gpus(plain, *model) == accelerators
    alone = RunConfig.load(file, ["hardware.gpus=1"])
    released = "policy.service.release_for_training=true"
    assert settings_on_gpus(alone, *model) == [*accelerators, released]
    talkative = Assumptions(reason_tokens=160, question_tokens=160)  # in a model of 1,024 tokens
    assert settings_on_gpus(plain, *model, talkative) is None


def test_the_papers_hours_are_of_this_size() -> None:
    """15 A100-hours for LLaVA-1.5-7B on 17,000 pairs, with two rows a pair and the reference in every step.

    Such a step is four forward passes' worth of two rows where ours is three of one: the plan's hours, scaled so,
    must come out within a factor of two.
    """
    plan = planned("llava-1.5-7b-1x80gb", pairs=1.0, response_tokens=150)
    ours = plan.section("hours").value("train")
    row, two_rows = 636 + 2 * 150, 2 * (636 + 150)
    assert 0.5 < ours * (two_rows / row) * (4 / 3) / 15 < 2


def test_the_number_of_prompts(tmp_path: Path) -> None:
    assert planned("llava-1.5-7b").section("hours").value("prompts") == 17_000
    assert planned("llava-1.5-7b", prompts=5).section("hours").value("prompts") == 5
    (tmp_path / "prompts.jsonl").write_text("{}\n{}\n\n{}\n")
    counted = planned("llava-1.5-7b", f"data.prompts={tmp_path / 'prompts.jsonl'}")
    assert counted.section("hours").value("prompts") == 3


@pytest.mark.parametrize(
    ("end", "pack"),
    [("", bytes), (".gz", gzip.compress), (".zst", lambda data: pa.compress(data, "zstd"))],
    ids=["plain", "gzip", "zstd"],
)
def test_prompts_are_counted_as_they_are_read(tmp_path: Path, end: str, pack: Any) -> None:
    """Lines of what a compressed file holds, not of its bytes; a blank one is none; the limit counts."""
    file = tmp_path / f"prompts.jsonl{end}"
    file.write_bytes(pack(b'{"image": "a.jpg"}\n' * 300 + b"\n  \n" + b'{"image": "the last"}'))
    assert planned("llava-1.5-7b", f"data.prompts={file}").section("hours").value("prompts") == 301
    few = planned("llava-1.5-7b", f"data.prompts={file}", "data.limit=40").section("hours")
    assert few.value("prompts") == 40
    assert f"lines of {file.name}" in str(few.figures[0])


def test_the_files_are_read_once_however_many_settings_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            read.append(function.__name__)
            return function(*arguments)

        return call

    for function in ("read_lines", "load_examples"):
        monkeypatch.setattr(workload, function, counted(getattr(workload, function)))
    (tmp_path / "prompts.jsonl").write_text("{}\n" * 3)
    small = ["hardware.gpus=1", "hardware.gpu_memory_gb=24"]
    plan = planned("llava-1.5-7b", *small, f"data.prompts={tmp_path / 'prompts.jsonl'}")
    assert plan.change is not None and len(plan.change) == 2
    assert sorted(read) == ["load_examples", "read_lines"]


def test_a_prompts_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 9000)[:40])
    with pytest.raises(DataError, match=r"prompts\.jsonl\.gz: cannot be read"):
        planned("llava-1.5-7b", f"data.prompts={tmp_path / 'prompts.jsonl.gz'}")


def test_a_model_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not on this machine.*llava-1\.5-7b-hf.*--model"):
        find_architecture(tmp_path / "unheard-of")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="no models of type bert"):
        find_architecture(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava", "vision_config": {}}')
    with pytest.raises(ModelError, match="is missing"):
        find_architecture(tmp_path)


def test_a_folder_on_this_machine_counts_by_its_own_config() -> None:
    folder = ROOT / "sima_ray" / "demo" / "assets" / "policy"
    model, source = find_architecture(folder)
    assert source == str(folder / "config.json")
    assert model.parameters == sum(
        weight
        for weight in _counts(folder)  # from the headers of its weights
    )


def _counts(folder: Path) -> list[int]:
    from math import prod

    counts: list[int] = []
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        counts += [prod(v["shape"]) for k, v in header.items() if k != "__metadata__"]
    return counts


def sima(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from sima_ray.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command(tmp_path: Path) -> None:
    done = sima("plan", "configs/llava-1.5-7b.yaml", "--json", "--gpus", "4")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["hardware"]["gpus"] == 4 and not found["fits"]
    assert found["change"] == ["training.workers=4"]
    done = sima("plan", "configs/llava-1.5-7b.yaml", "--image-size", "9")
    assert done.returncode == 2 and "--image-size 9: give WIDTHxHEIGHT" in done.stderr
    done = sima("plan", "configs/demo.yaml")
    assert done.returncode == 2 and "--set training.accelerator=gpu" in done.stderr
    advised = done.stderr.partition("for the same on GPUs add ")[2].split()
    done = sima("plan", "configs/demo.yaml", *advised)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "fits")


def test_a_plan_loads_no_engines() -> None:
    program = (
        "import sys, sima_ray.plan.plan, sima_ray.plan.architecture; "
        "print({'torch', 'ray', 'vllm', 'transformers', 'deepspeed'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_the_memory_of_a_step_against_a_measured_one() -> None:
    """docs/tuning.json: a LLaVA of 4 layers in float32 on a CPU, what a step needs beyond what is loaded.

    What is measured is the process's resident memory: it has all that a layer keeps, and what the allocator does
    not give back. Beyond a factor of three a plan would be of another model.
    """
    measured = json.loads((ROOT / "docs" / "tuning.json").read_text())
    sizes, settings = measured["settings"]["sizes"], measured["settings"]["training"]
    text = {
        "model_type": "llama",
        "hidden_size": sizes["text_width"],
        "intermediate_size": sizes["text_inner"],
        "num_hidden_layers": sizes["text_layers"],
        "num_attention_heads": sizes["text_heads"],
        "vocab_size": sizes["vocabulary"],
    }
    vision = {
        "hidden_size": sizes["vision_width"],
        "intermediate_size": 4 * sizes["vision_width"],
        "num_hidden_layers": sizes["vision_layers"],
        "image_size": sizes["image_side"],
        "patch_size": sizes["patch"],
    }
    model = read_architecture({"model_type": "llava", "text_config": text, "vision_config": vision})
    values = RunConfig.load(ROOT / "configs" / "llava-1.5-7b-1x80gb.yaml").model_dump()
    longest = sizes["response_tokens"][1]
    config = RunConfig.parse(
        values | {"training": settings} | {"generation": {"max_tokens": longest}}
    )
    train = make_plan(config, model, "", Assumptions(question_tokens=40)).section("train")
    step = sum(train.value(f) for f in ("activations", "logits of responses", "vision tower"))
    working = measured["trainers"]["ours"]["working_bytes"]["median"] / 1e9
    assert working / 3 < step < working

"""The policy through Serve on real vLLM on the CPU: what it says, how it refuses, and new weights in place."""

import asyncio
import io
import json
import math
import shutil
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sima_ray.config import EngineConfig, PolicyConfig, ServiceConfig
from sima_ray.errors import ClusterError, ModelError, ServiceError
from sima_ray.images import decode_image
from sima_ray.policy.chat import render_prompt
from sima_ray.policy.checkpoint import fingerprint
from sima_ray.policy.sample import VERSION_FILE, sample_of
from sima_ray.ports import Part, Policy, image_part, text_part

MAX_MODEL_LEN = 512
PIXELS = 1_000_000


@pytest.fixture(scope="module")
def converted(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaVA into LLaVA's own layout and back: what the engine starts from must compute the same."""
    from sima_ray.policy.convert import convert
    from sima_ray.policy.convert_config import Layout

    folder = tmp_path_factory.mktemp("converted")
    convert(tiny_llava, folder / "original", to=Layout.ORIGINAL)
    convert(folder / "original", folder / "hf")
    return folder / "hf"


@pytest.fixture(scope="module")
def config(converted: Path) -> PolicyConfig:
    """The model in fp32, so that its numbers can be compared with transformers'."""
    engine = EngineConfig(
        accelerator="cpu",
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=32,
        block_size=32,
    )
    service = ServiceConfig(
        max_ongoing_requests=64, target_ongoing_requests=32, max_image_pixels=PIXELS
    )
    return PolicyConfig(model=str(converted), engine=engine, service=service)


@pytest.fixture(scope="module")
def policy(ray_cluster: None, config: PolicyConfig) -> Iterator[Policy]:
    """The deployed policy, one for all tests here."""
    from ray import serve

    from sima_ray.runtime.client import connect_policy
    from sima_ray.runtime.serving import deploy_policy, start_serve

    start_serve(port=0)
    start = time.monotonic()
    deploy_policy(config)
    print(f"deployed in {time.monotonic() - start:.1f} s")
    yield connect_policy(retries=1, timeout_s=60)()
    serve.shutdown()


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sima_ray.policy.tiny import make_tiny_llava

    return make_tiny_llava(tmp_path_factory.mktemp("other"), seed=1)


def png(seed: int = 0, side: int = 48) -> bytes:
    noise = torch.randint(0, 255, (side, side, 3), generator=torch.manual_seed(seed))
    file = io.BytesIO()
    Image.fromarray(noise.to(torch.uint8).numpy()).save(file, "PNG")
    return file.getvalue()


PROMPTS: list[list[Part]] = [
    [text_part("What is it?")],
    [image_part(png(0)), text_part("What is it?")],
    [text_part("Criteria first."), image_part(png(1, side=80)), text_part("Then the question.")],
    [image_part(png(2)), text_part("A literal <image> is only text.")],
]


def readable(text: str) -> str:
    """Without stray bytes: an untrained model writes them, and decoders differ in where they put the �s."""
    return text.replace("\ufffd", "")


def ask(policy: Policy, content: list[Part], **changes: Any) -> Any:
    request: Any = {"content": content, "max_tokens": 12, "temperature": 0.0, "logprob": True}
    request |= changes
    return asyncio.run(_awaited(policy.complete(request)))


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


class Reference:
    """transformers' own answers, from the same folder."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.processor = AutoProcessor.from_pretrained(folder)
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model.eval()

    def inputs(self, content: list[Part]) -> Any:
        images = [decode_image(part["image"], PIXELS) for part in content if "image" in part]
        return self.processor(
            text=render_prompt(self.processor, content),
            images=images or None,
            return_tensors="pt",
        )

    def greedy(self, content: list[Part], tokens: int) -> tuple[str, int, int, float]:
        """Text, generated tokens, prompt tokens, and the sum of the tokens' log-probabilities."""
        prompt = self.inputs(content)["input_ids"].shape[1]
        answer, logprobs_TV = self.steps(content, tokens)
        text = self.processor.decode(answer, skip_special_tokens=True)
        logprob = logprobs_TV[range(len(answer)), answer].sum().item()
        return text.strip(), len(answer), prompt, logprob

    @torch.no_grad()
    def steps(self, content: list[Part], tokens: int) -> tuple[list[int], torch.Tensor]:
        """The greedy tokens, and the log-probabilities of all tokens at each of their places."""
        inputs = self.inputs(content)
        prompt = inputs["input_ids"].shape[1]
        made = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        inputs["input_ids"], inputs["attention_mask"] = made, torch.ones_like(made)
        logprobs_TV = self.model(**inputs).logits[0, prompt - 1 : -1].log_softmax(-1)
        return made[0, prompt:].tolist(), logprobs_TV


@pytest.fixture(scope="module")
def reference(tiny_llava: Path) -> Reference:
    return Reference(tiny_llava)


@pytest.mark.parametrize("content", PROMPTS, ids=["text", "image", "between", "placeholder"])
def test_greedy_answers_are_transformers_own(
    policy: Policy, reference: Reference, content: list[Part]
) -> None:
    answer = ask(policy, content)
    text, tokens, prompt_tokens, logprob = reference.greedy(content, 12)
    assert (readable(answer["text"]), answer["tokens"]) == (readable(text), tokens)
    assert answer["prompt_tokens"] == prompt_tokens
    assert answer["logprob"] == pytest.approx(logprob, abs=1e-2)
    assert answer["finish_reason"] in ("stop", "length")
    assert answer["model_version"] == "base"
    silent = ask(policy, content, logprob=False)
    assert (silent["text"], silent["logprob"]) == (answer["text"], None)


def test_the_first_sampled_answer_is_fast(policy: Policy) -> None:
    """Warmed up before it was ready: no compilation, no lazy import is left for a caller."""
    start = time.monotonic()
    ask(policy, PROMPTS[1], temperature=0.8, top_p=0.9, seed=11)
    assert time.monotonic() - start < 12  # 0.1 s on a quiet machine; a compilation takes 15 s


def test_seeds_repeat_and_differ(policy: Policy) -> None:
    def draw(seed: int) -> tuple[str, float]:
        answer = ask(policy, PROMPTS[1], temperature=1.0, top_p=0.95, seed=seed)
        return answer["text"], round(answer["logprob"], 2)

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(5)}) > 1


def test_the_likelier_alternative_is_the_one_that_was_written(
    policy: Policy, reference: Reference
) -> None:
    """In batches with requests that ask for other log-probabilities, or for none."""
    content, tokens = PROMPTS[3], 32
    plain = ask(policy, content, max_tokens=tokens)
    assert "alternatives" not in plain
    tokenizer = reference.processor.tokenizer
    ids, logprobs_TV = reference.steps(content, tokens)
    written = next(c for c in reversed(plain["text"]) if c.isascii() and c.isalnum())
    missing = next(c for c in "0123456789" if c not in plain["text"])
    first, second = tokenizer.encode(written + missing, add_special_tokens=False)
    place = max(n for n, token in enumerate(ids) if token == first)
    expected = [logprobs_TV[place, first].item(), logprobs_TV[place, second].item()]

    base = {"content": content, "max_tokens": tokens, "temperature": 0.0}
    asked = {"alternatives": [f"x{written}", f"x{missing}"]}
    swapped = {"alternatives": [f"x{missing}", f"x{written}"], "logprob": True}
    neither = {"alternatives": [f"x{missing}", f"xx{written}"]}  # two tokens apart
    kinds: list[Any] = [{}, {"logprob": True}, asked, swapped, neither]

    async def together() -> list[Any]:
        requests: list[Any] = [base | kind for kind in kinds * 3]
        return await asyncio.gather(*(policy.complete(request) for request in requests))

    for n, answer in enumerate(asyncio.run(together())):
        kind = kinds[n % len(kinds)]
        assert answer["text"] == plain["text"]
        wanted = pytest.approx(plain["logprob"], abs=1e-2) if "logprob" in kind else None
        assert answer["logprob"] == wanted
        if kind not in (asked, swapped):
            assert "alternatives" not in answer
            continue
        likelier, other = answer["alternatives"][:: 1 if kind is asked else -1]
        assert [likelier, other] == pytest.approx(expected, abs=1e-2)
        assert likelier >= other and math.exp(likelier) + math.exp(other) <= 1
    refused = ask(policy, content, alternatives=["only one"])
    assert refused == {"error": "alternatives must be two texts"}


def test_requests_of_one_call_share_what_they_begin_with(policy: Policy) -> None:
    """Asked together, and still computed once; each is answered as if alone, and fails alone."""
    image, text = image_part(png(11)), "A question of some length. " * 4
    contents = [[image, text_part(text + end)] for end in ("one?", "two?")]
    requests: list[Any] = [
        {"content": content, "max_tokens": 8, "temperature": 0.0}
        for content in (*contents, [text_part("x")])
    ]
    requests[2]["seed"] = -1
    first, second, refused = asyncio.run(_awaited(policy.complete_all(requests)))
    assert first["cached_tokens"] == 0
    assert second["prompt_tokens"] > second["cached_tokens"] >= 32
    assert "seed" in refused["error"]
    alone = [ask(policy, content, max_tokens=8)["text"] for content in contents]
    assert [first["text"], second["text"]] == alone


def test_seeded_prompts_that_no_step_holds_together(policy: Policy) -> None:
    """vLLM dies on the CPU where a step cuts the prompt of a seeded request."""
    texts = [f"{number}: " + "many words of a long question " * 10 for number in range(24)]
    requests: list[Any] = [
        {"content": [text_part(text)], "max_tokens": 4, "temperature": 1.0, "seed": 1}
        for text in texts
    ]

    async def together() -> list[Any]:
        return await asyncio.gather(*(policy.complete(request) for request in requests))

    answers = asyncio.run(together())
    assert sum(answer["prompt_tokens"] for answer in answers) > 4096
    alone = ask(policy, requests[0]["content"], max_tokens=4, temperature=1.0, seed=1)
    assert answers[0]["text"] == alone["text"]


def test_a_repeated_prompt_is_read_from_the_cache(policy: Policy) -> None:
    content = [image_part(png(9)), text_part("A question of some length. " * 4)]
    assert ask(policy, content)["cached_tokens"] == 0
    again = ask(policy, content)
    assert again["prompt_tokens"] > again["cached_tokens"] >= 32


@pytest.mark.parametrize(
    ("content", "changes", "words"),
    [
        ([image_part(b"not an image"), text_part("?")], {}, "not a readable"),
        ([image_part(png()[:-200]), text_part("?")], {}, "truncated"),
        ([image_part(png(side=1001)), text_part("?")], {}, "1001 × 1001"),
        ([text_part("too many words " * 200)], {}, "at most 512 tokens"),
        ([text_part("x" * 1_000_000)], {}, "at most 512 tokens"),
        ([image_part(png()), image_part(png()), text_part("?")], {}, "more images"),
        ([], {}, "content"),
        (["text"], {}, "mapping"),
        ([{"type": "text"}], {}, "text part"),
        ([text_part("\ud800")], {}, "valid text"),
        ([text_part("?")], {"max_tokens": 0}, "out of range"),
        ([text_part("?")], {"temperature": -1.0}, "out of range"),
        ([text_part("?")], {"top_p": 2.0}, "out of range"),
        ([text_part("?")], {"seed": "one"}, "seed"),
    ],
)
def test_what_can_never_succeed_is_an_error_in_words(
    policy: Policy, content: Any, changes: dict[str, Any], words: str
) -> None:
    answer = ask(policy, content, **changes)
    assert set(answer) == {"error"} and words in answer["error"]
    assert "/" not in answer["error"] and "vllm" not in answer["error"].lower()


def test_many_requests_in_flight_and_a_swap_between_them(
    policy: Policy, tiny_llava: Path, other_weights: Path, reference: Reference
) -> None:
    """Every answer is one version's own greedy text; none fails; the replica stays the same process."""
    from sima_ray.runtime.serving import replica_states, swap_policy

    content = PROMPTS[1]
    logprobs = {
        "base": reference.greedy(content, 12)[3],
        "other": Reference(other_weights).greedy(content, 12)[3],
    }
    assert abs(logprobs["base"] - logprobs["other"]) > 0.1
    (before,) = replica_states()

    async def load() -> list[Any]:
        request: Any = {
            "content": content,
            "max_tokens": 12,
            "temperature": 0.0,
            "logprob": True,
        }
        swap = asyncio.create_task(asyncio.to_thread(swap_policy, str(other_weights), "other"))
        answers: list[Any] = []
        while not swap.done():
            answers += await asyncio.gather(*(policy.complete(request) for _ in range(24)))
        await swap
        return [*answers, *await asyncio.gather(*(policy.complete(request) for _ in range(48)))]

    answers = asyncio.run(load())
    assert {answer["model_version"] for answer in answers} == {"base", "other"}
    assert all(
        answer["logprob"] == pytest.approx(logprobs[answer["model_version"]], abs=1e-2)
        for answer in answers
    )
    assert all(answer["model_version"] == "other" for answer in answers[-48:])
    (after,) = replica_states()
    assert (after["pid"], after["replica"]) == (before["pid"], before["replica"])

    start = time.monotonic()
    swap_policy(str(tiny_llava), "base")
    print(f"swapped in {time.monotonic() - start:.2f} s")
    assert ask(policy, content)["logprob"] == pytest.approx(logprobs["base"], abs=1e-2)


def test_weights_that_do_not_load_leave_the_former_ones(
    policy: Policy, tiny_llava: Path, tmp_path: Path
) -> None:
    from sima_ray.runtime.serving import replica_states, swap_policy

    expected = ask(policy, PROMPTS[1])
    broken = Path(shutil.copytree(tiny_llava, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ServiceError, match="'broken' could not be loaded"):
        swap_policy(str(broken), "broken")
    with pytest.raises(ModelError, match="no such model folder"):
        swap_policy(str(tmp_path / "missing"), "missing")
    answer = ask(policy, PROMPTS[1])
    assert (answer["text"], answer["model_version"]) == (expected["text"], "base")
    assert [state["version"] for state in replica_states()] == ["base"]


def test_weights_are_checked_before_they_answer(
    policy: Policy, tiny_llava: Path, other_weights: Path, tmp_path: Path
) -> None:
    """A replica computes what transformers computes from the folder; damaged weights answer nobody."""
    from safetensors.torch import load_file, save_file

    from sima_ray.runtime.promotion import promote
    from sima_ray.runtime.serving import replica_states, swap_policy

    good = promote(str(other_weights), "other")
    assert (good.before, good.replicas, good.written) == ("base", 1, False)
    assert 0 < good.difference < 0.02
    print(f"promoted in {good.seconds:.2f} s, {good.difference:.1e} a token from transformers")

    damaged = Path(shutil.copytree(tiny_llava, tmp_path / "damaged"))
    sample = sample_of(str(damaged))
    weights = load_file(damaged / "model.safetensors")
    (name,) = [key for key in weights if key.endswith("layers.0.mlp.down_proj.weight")]
    weights[name] = weights[name] * 1e3
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    (damaged / VERSION_FILE).write_text(json.dumps({"version": "of others", "sample": sample}))
    with pytest.raises(ModelError, match="not those that were merged"):
        promote(str(damaged), "damaged")
    written = {"version": fingerprint(damaged), "sample": sample}
    (damaged / VERSION_FILE).write_text(json.dumps(written))
    with pytest.raises(ServiceError, match=r"compute something else .* 'other' answers again"):
        promote(str(damaged), "damaged")
    (state,) = replica_states()
    assert (state["version"], state["difference"]) == ("other", good.difference)
    start = time.monotonic()
    swap_policy(str(tiny_llava), "base")
    print(f"swapped in {time.monotonic() - start:.2f} s")
    assert ask(policy, PROMPTS[1])["model_version"] == "base"


def test_what_can_never_start_is_said_at_once(policy: Policy, config: PolicyConfig) -> None:
    from sima_ray.runtime.serving import deploy_policy, remove

    with pytest.raises(ModelError, match="no such model folder"):
        deploy_policy(config, model="/no/such/folder", name="second")
    engine = config.engine.model_copy(update={"cpus": 1000.0})
    huge = config.model_copy(update={"engine": engine})
    with pytest.raises(ClusterError, match="1000 CPU on one node"):
        deploy_policy(huge, name="second")
    remove("second")
    assert ask(policy, PROMPTS[0])["model_version"] == "base"  # the first one never noticed

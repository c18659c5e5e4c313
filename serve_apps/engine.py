"""One replica's engine: Ray Serve LLM's server over vLLM, with a unary method of plain dicts.

Importing this takes many seconds (vLLM): only replicas do.
"""

import asyncio
import io
import logging
import math
import os
import re
import uuid
from collections.abc import Sequence
from typing import Any, cast

from PIL import Image
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm.deployment import LLMServer
from transformers import AutoProcessor
from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from serve_apps.weights import Weights
from sima_ray.config import PolicyConfig
from sima_ray.errors import last_line
from sima_ray.images import ImageProblem, decode_image
from sima_ray.policy.alternatives import differing_tokens, last_alternatives
from sima_ray.policy.chat import harmless_messages, render_prompt, special_texts
from sima_ray.policy.sample import compare_sample, sample_cases
from sima_ray.ports import Completion, JsonDict, Part, image_part, text_part
from sima_ray.together import together

logger = logging.getLogger("ray.serve")


Ready = tuple[JsonDict, SamplingParams]
"""The engine's prompt and parameters."""


class BadRequest(ValueError):
    """A request that can never succeed; the message is for the caller."""


class EngineInProcess(VLLMEngine):
    """vLLM with its CPU worker inside the engine's own process: one process and its imports fewer.

    vLLM itself asks for another process, to set OpenMP's variables in it; ours come with the replica.
    """

    def _start_async_llm_engine(
        self, vllm_engine_args: Any, vllm_engine_config: Any, placement_group: Any
    ) -> Any:
        parallel = vllm_engine_config.parallel_config
        if parallel.world_size == 1:
            parallel.distributed_executor_backend = "uni"
        return super()._start_async_llm_engine(
            vllm_engine_args, vllm_engine_config, placement_group
        )


class PolicyServer(LLMServer):
    """The policy: answers `sima_ray.ports.CompletionRequest`s, and takes new weights in place."""

    config: PolicyConfig
    weights: Weights
    _processor: Any

    @classmethod
    async def create(cls, llm_config: Any, config: PolicyConfig) -> "PolicyServer":
        """Start the engine and warm it up: what is returned answers at full speed."""
        engine_cls = EngineInProcess if config.engine.accelerator == "cpu" else VLLMEngine
        server = cls.sync_init(llm_config, engine_cls=engine_cls)
        assert isinstance(server, cls)
        server.config = config
        server.weights = Weights(config.model, server._load, server._check)
        server._processor = await asyncio.to_thread(AutoProcessor.from_pretrained, config.model)
        try:
            await server.start()
        except RuntimeError as error:
            raise RuntimeError(engine_words() or last_line(error)) from error
        await server._warm_up()
        return server

    async def complete_all(self, requests: Sequence[JsonDict]) -> list[Completion]:
        """Answer requests that share a beginning (see `sima_ray.ports.Policy`)."""
        prepared = await asyncio.to_thread(self._prepare_all, requests)
        async with self.weights.answering() as version:
            return await together(  # where one fails, the engine drops the others
                self._answer(ready, request, version)
                for ready, request in zip(prepared, requests, strict=True)
            )

    async def _answer(
        self, ready: Ready | BadRequest, request: JsonDict, version: str
    ) -> Completion:
        try:
            if isinstance(ready, BadRequest):
                raise ready
            prompt, params = ready
            output = await self._generate(prompt, params)
        except BadRequest as problem:
            return {"error": str(problem)}
        answer = output.outputs[0]
        if answer.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"the engine ended the request: {answer.finish_reason}")
        completion: Completion = {
            "text": answer.text.strip(),
            "tokens": len(answer.token_ids),
            "prompt_tokens": len(output.prompt_token_ids or ()),
            "cached_tokens": output.num_cached_tokens or 0,
            "logprob": answer.cumulative_logprob if request.get("logprob") else None,
            "finish_reason": answer.finish_reason,
            "model_version": version,
        }
        if answer.stop_reason is not None:  # not the end of the sequence that tuning knows
            completion["logprob"] = None
        if params.logprob_token_ids and answer.logprobs:
            first, second = params.logprob_token_ids
            found = last_alternatives(answer.token_ids, answer.logprobs, (first, second))
            if found is not None:
                completion["alternatives"] = found
        return completion

    async def chat(self, request: Any, raw_request_info: Any = None) -> Any:
        """For the OpenAI routes: what the engine answers, once no text can pose as an image."""
        specials = special_texts(self._processor)
        request.messages = harmless_messages(request.messages, specials)
        return await super().chat(request, raw_request_info)

    async def check_health(self) -> None:
        """Raises when the engine is dead or its weights are in doubt."""
        self.weights.check_health()
        await super().check_health()

    async def _load(self, model: str) -> None:
        await self.pause(mode="wait", clear_cache=True)
        try:
            await self.collective_rpc("reload_weights", kwargs={"weights_path": model})
        finally:
            await self.resume()

    async def _check(self, sample: JsonDict) -> float:
        """How far these weights are from a sample (see `sima_ray.policy.sample`)."""
        found: list[list[float]] = []
        params = SamplingParams(
            max_tokens=1, prompt_logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY
        )
        for case, wanted in zip(sample_cases(self._processor), sample["logprobs"], strict=True):
            image = decode_image(case.image, self.config.service.max_image_pixels)
            prompt = {"prompt": case.text, "multi_modal_data": {"image": [image]}}
            output = await self._generate(prompt, params)
            tokens, logprobs = output.prompt_token_ids or [], output.prompt_logprobs or []
            last = list(zip(tokens, logprobs, strict=True))[-len(wanted) :]
            found.append([entry[token].logprob if entry else math.nan for token, entry in last])
        return compare_sample(sample, found)

    def _prepare_all(self, requests: Sequence[JsonDict]) -> list[Ready | BadRequest]:
        """Runs in a thread, since it decodes images: each that several requests have, once."""
        decoded: dict[bytes, Image.Image] = {}
        ready: list[Ready | BadRequest] = []
        for request in requests:
            try:
                ready.append(self._prepare(request, decoded))
            except BadRequest as problem:
                ready.append(problem)
        return ready

    def _prepare(self, request: JsonDict, decoded: dict[bytes, Image.Image]) -> Ready:
        content = request.get("content")
        if not isinstance(content, list) or not content:
            raise BadRequest("content must be a list of parts")
        if not all(isinstance(part, dict) for part in content):
            raise BadRequest("a part of the content must be a mapping")
        images = [self._image(part, decoded) for part in content if part.get("type") == "image"]
        prompt: JsonDict = {"prompt": self._render(content)}
        if images:
            prompt["multi_modal_data"] = {"image": images}
        return prompt, sampling(request, self._alternatives(request))

    def _alternatives(self, request: JsonDict) -> tuple[int, int] | None:
        match request.get("alternatives"):
            case None:
                return None
            case [str(first), str(second)]:
                return differing_tokens(self._processor.tokenizer, first, second)
            case _:
                raise BadRequest("alternatives must be two texts")

    def _image(self, part: JsonDict, decoded: dict[bytes, Image.Image]) -> Image.Image:
        try:
            data = part["image"]
            if data not in decoded:
                decoded[data] = decode_image(data, self.config.service.max_image_pixels)
            return decoded[data]
        except (ImageProblem, KeyError, TypeError) as problem:
            words = problem if isinstance(problem, ImageProblem) else "must be bytes"
            raise BadRequest(f"image: {words}") from problem

    def _render(self, content: list[Part]) -> str:
        try:
            prompt = render_prompt(self._processor, content)
            prompt.encode()
        except (KeyError, TypeError, AttributeError, UnicodeEncodeError) as problem:
            raise BadRequest("content: a text part that is not valid text") from problem
        return prompt

    async def _generate(self, prompt: JsonDict, params: SamplingParams) -> RequestOutput:
        assert isinstance(self.engine, VLLMEngine)
        client = self.engine._engine_client
        assert client is not None
        last: RequestOutput | None = None
        try:
            async for output in client.generate(cast(Any, prompt), params, uuid.uuid4().hex):
                last = output
        except VLLMClientError as refusal:
            raise BadRequest(self._in_words(refusal)) from refusal
        assert last is not None, "the engine gave no output"
        return last

    def _in_words(self, refusal: VLLMClientError) -> str:
        logger.info("The engine refused a request: %s", refusal)
        limit = self.config.engine.max_model_len
        too_long = ("input_text", "input_tokens", "max_tokens", "prompt")
        if isinstance(refusal, VLLMValidationError) and refusal.parameter in too_long:
            return f"too long: the model reads at most {limit} tokens, image tokens included"
        return "the engine refused the request: too long, or more images than it takes"

    async def _warm_up(self) -> None:
        """First requests are slow (lazy imports, kernels): make them before anyone waits."""
        image = image_part(_grey_png())
        two = {"alternatives": ["1", "2"]}
        drawn = {"max_tokens": 2, "temperature": 1.0, "top_p": 0.9, "seed": 1, "logprob": True}
        for content, more in (([image, text_part("?")], {}), ([text_part("?")], two)):
            await self.complete_all([{"content": content, **drawn, **more}])
        await self.reset_prefix_cache()


def sampling(request: JsonDict, alternatives: tuple[int, int] | None = None) -> SamplingParams:
    """vLLM's parameters for a request.

    Args:
        request: See `sima_ray.ports`.
        alternatives: Two tokens whose log-probabilities are asked for.

    Raises:
        BadRequest: For values that no engine would take.
    """
    seed = request.get("seed")
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**63):
        raise BadRequest("seed must be a whole number from 0 on")
    try:
        return SamplingParams(
            max_tokens=int(request["max_tokens"]),
            temperature=float(request["temperature"]),
            top_p=float(request.get("top_p", 1.0)),
            seed=seed,
            # 0: only the chosen token's, for the sum. Alternatives bring it too; a 0 would cut them off.
            logprobs=0 if request.get("logprob") and alternatives is None else None,
            logprob_token_ids=None if alternatives is None else list(alternatives),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
    except KeyError as missing:
        raise BadRequest(f"{missing.args[0]} is missing") from missing
    except (TypeError, ValueError, VLLMClientError) as problem:
        raise BadRequest("max_tokens, temperature, top_p or seed is out of range") from problem


def engine_words() -> str:
    """What the engine's process said last of why it died.

    vLLM only tells its parent to look above, which is this process's own log: that is looked at here.
    """
    try:
        with open("/proc/self/fd/1", "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 200_000))
            text = log.read().decode(errors="replace")
    except OSError:  # not a file, or no such thing on this system
        return ""
    found = re.findall(
        r"^\(EngineCore.*ERROR.*\] (\w+(?:Error|Exception): .+)$", text, re.MULTILINE
    )
    return found[-1].strip() if found else ""


def _grey_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(file, "PNG")
    return file.getvalue()

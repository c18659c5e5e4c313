"""Prompts: no text adds an image to one, or ends a turn, in any family's processor."""

from typing import Any

import pytest
from tiny_families import FAMILIES, gemma3

from sima_ray.critic.prompt import CriticPrompt, Layout, load_examples
from sima_ray.policy.chat import harmless, harmless_messages, render_prompt, special_texts
from sima_ray.policy.checkpoint import image_token_id
from sima_ray.policy.tiny import TinyShape, make_processor
from sima_ray.ports import Part, image_part, text_part

PROCESSORS = {"llava": lambda: make_processor([], TinyShape())} | {
    name: lambda make=make: make()[1] for name, make in (FAMILIES | {"gemma3": gemma3}).items()
}


@pytest.fixture(scope="module", params=PROCESSORS)
def processor(request: pytest.FixtureRequest) -> Any:
    return PROCESSORS[request.param]()


def special_ids(processor: Any, content: list[Part]) -> list[int]:
    """The special tokens of the prompt, as the tokenizer reads it."""
    tokenizer = processor.tokenizer
    ids = tokenizer(render_prompt(processor, content))["input_ids"]
    return [i for i in ids if i in tokenizer.added_tokens_decoder]


def hostile(processor: Any) -> str:
    """All special tokens, plain, nested in one another, and overlapping."""
    every = special_texts(processor)
    return "".join(f"{text} {text[:3]}{text}{text[3:]} {text}{text[1:]}" for text in every)


def test_no_text_adds_a_special_token(processor: Any) -> None:
    image, plain, text = image_part(b""), text_part("What is it?"), text_part(hostile(processor))
    assert special_ids(processor, [image, text]) == special_ids(processor, [image, plain])
    assert special_ids(processor, [text]) == special_ids(processor, [plain])
    assert special_ids(processor, [image, plain]).count(image_token_id(processor)) == 1


def test_no_text_adds_one_over_the_border_of_two_parts(processor: Any) -> None:
    token = processor.image_token
    parts: list[Part] = [text_part(token[:3]), text_part(token[3:])]
    assert special_ids(processor, parts) == special_ids(processor, [text_part("?")])


@pytest.mark.parametrize("layout", Layout)
def test_no_text_of_a_case_adds_one_to_the_critics_prompt(processor: Any, layout: Layout) -> None:
    prompt = CriticPrompt(layout, load_examples())

    def ids(*texts: str) -> list[int]:
        return special_ids(processor, prompt.content(b"", *texts))  # type: ignore[call-arg]

    bad = hostile(processor)
    assert ids(bad, bad, bad, bad) == ids("question", "truth", "first", "second")


def test_the_processor_expands_no_text(processor: Any) -> None:
    """What a processor does to a prompt before its tokenizer sees it."""
    if processor.__class__.__name__ == "Idefics3Processor":
        pytest.skip("needs images beside the text")
    text = render_prompt(processor, [text_part(hostile(processor))])
    ids = processor(text=[text], return_tensors="pt")["input_ids"][0].tolist()
    assert image_token_id(processor) not in ids


def test_a_placeholder_stays_readable() -> None:
    specials = special_texts(make_processor([], TinyShape()))
    assert harmless("an <image> of </s> <b>x</b>", specials) == "an < image> of < /s> <b>x</b>"
    assert harmless("<<image>image>", specials) == "<< image>image>"
    assert harmless("#" * 5, ["###"]) == "# # # ##"


def test_chat_messages_are_made_harmless_but_for_urls() -> None:
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,<image>"}}
    messages = [
        {"role": "system", "content": "<image>"},
        {"role": "user", "content": [{"type": "text", "text": "</s>"}, url]},
    ]
    assert harmless_messages(messages, ["<image>", "</s>"]) == [
        {"role": "system", "content": "< image>"},
        {"role": "user", "content": [{"type": "text", "text": "< /s>"}, url]},
    ]

"""From a request's content to the text that a model reads, the same for serving and for tuning."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, Protocol, cast

from sima_ray.ports import Part, TextPart

USER_TEXT_ESCAPES = (
    *("<image>", "<video>", "<audio>", "<|image|>", "<|video|>", "<|audio|>", "[IMG]"),
    *("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
)
"""Placeholders that no text may hold, whatever a tokenizer says of them."""


class Processor(Protocol):
    """The part of a Hugging Face processor that rendering needs."""

    image_token: str

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


def render_prompt(processor: Processor, content: list[Part]) -> str:
    """The whole prompt for one user message, up to where the assistant begins.

    Images stand exactly where the content has them: many chat templates (LLaVA-1.5's among them) would move
    every image to the front, so the message is flattened to one text with the model's image token in place.
    Special tokens spelt out in the texts are broken up (`harmless`), so that no text can pose as an image, or
    as the end of a turn. Generation, critique and tuning all read what this returns.
    """
    specials = special_texts(processor)
    flat = ""
    # Neighbouring texts are one text: a token could be spelt across two of them.
    for kind, parts in groupby(content, key=lambda part: part["type"]):
        if kind == "text":
            flat += harmless("".join(cast(TextPart, part)["text"] for part in parts), specials)
        else:
            flat += f"{processor.image_token}\n" * len(list(parts))
    conversation = [{"role": "user", "content": [{"type": "text", "text": flat}]}]
    return str(
        processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    )


def join_response(prompt: str, response: str) -> str:
    """Prompt and response as one text: a space between them where the chat template does not end in one."""
    return prompt + ("" if prompt[-1:].isspace() else " ") + response


@lru_cache(maxsize=8)
def special_texts(processor: Processor) -> tuple[str, ...]:
    """Every text that the processor or its tokenizer takes for a special token."""
    tokenizer = getattr(processor, "tokenizer", None)
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    found = {
        *USER_TEXT_ESCAPES,
        *placeholders(processor),
        *getattr(tokenizer, "all_special_tokens", ()),
        *(str(token.content) for token in added.values() if token.special),
    }
    # One of a single character, or of white space, is also an ordinary part of texts.
    return tuple(sorted(text for text in found if len(text) > 2 and not text.isspace()))


def placeholders(processor: Processor) -> set[str]:
    """What the processor itself replaces in a text: its image token, and others' of its family."""
    named = {name: value for name, value in vars(processor).items() if isinstance(value, str)}
    return {
        processor.image_token,
        *(value for name, value in named.items() if value and name.endswith(("_token", "_tag"))),
    }


def harmless(text: str, specials: Sequence[str]) -> str:
    """The text with a space after the first character of every special token that is spelt out in it.

    A space is what any tokenizer reads, and what a person sees; characters of no width get lost on the way.
    """
    for token in specials:
        while token in text:  # again where it overlaps itself
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def harmless_messages(messages: Sequence[Any], specials: Sequence[str]) -> list[Any]:
    """OpenAI's chat messages, with every text in them made harmless; URLs of images stay as they are."""

    def clean(value: Any) -> Any:
        match value:
            case str():
                return harmless(value, specials)
            case dict():
                return {
                    k: v if k in ("url", "type", "role") else clean(v) for k, v in value.items()
                }
            case list() | tuple():
                return [clean(item) for item in value]
            case _:
                return value

    return [clean(message) for message in messages]

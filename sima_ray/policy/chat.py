"""From a request's content to the text that a model reads, the same for serving and for tuning."""

from typing import Any, Protocol

from sima_ray.ports import Part

USER_TEXT_ESCAPES = ("<image>", "<video>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")


class Processor(Protocol):
    """The part of a Hugging Face processor that rendering needs."""

    image_token: str

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


def render_prompt(processor: Processor, content: list[Part]) -> str:
    """The whole prompt for one user message, up to where the assistant begins.

    Images stand exactly where the content has them: many chat templates (LLaVA-1.5's among them) would move
    every image to the front, so the message is flattened to one text with the model's image token in place.
    Literal placeholders in the texts are broken up, so that no text can pose as an image.
    """
    flat = "".join(
        harmless(part["text"], processor.image_token)
        if part["type"] == "text"
        else f"{processor.image_token}\n"
        for part in content
    )
    conversation = [{"role": "user", "content": [{"type": "text", "text": flat}]}]
    return str(
        processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    )


def join_response(prompt: str, response: str) -> str:
    """Prompt and response as one text: a space between them where the chat template does not end in one."""
    return prompt + ("" if prompt[-1:].isspace() else " ") + response


def harmless(text: str, image_token: str = "<image>") -> str:
    """The text with a space put into every literal image placeholder."""
    for token in (image_token, *USER_TEXT_ESCAPES):
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text

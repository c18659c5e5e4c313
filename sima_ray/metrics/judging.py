"""What a judge is asked: templates of the prompts, in our own words."""

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

_TEMPLATES = Path(__file__).parent / "templates"


def render(name: str, **values: Any) -> str:
    """A judge's prompt from `templates/NAME.j2`; a value that is missing is an error."""
    return _environment().get_template(f"{name}.j2").render(**values)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # plain text for a model
        keep_trailing_newline=False,
        trim_blocks=True,
    )

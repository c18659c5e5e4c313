"""Settings beside a config file: `--set policy.engine.accelerator=cpu`, and files that extend another one."""

import difflib
import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union, cast, get_args, get_origin

import yaml

from sima_ray.config.base import Section
from sima_ray.errors import ConfigError

EXTENDS = "extends"
"""The key of a config file that names another one, relative to it, whose settings it changes."""


def read_settings(path: Path | str) -> dict[str, Any]:
    """The settings of a YAML file, upon those of the files that it extends.

    Raises:
        ConfigError: A file that cannot be read or is not YAML, or files that extend each other in a circle.
    """
    merged: dict[str, Any] = {}
    seen: list[Path] = []
    file: Path | None = Path(path)
    while file is not None:
        if file.resolve() in seen:
            raise ConfigError(f"{path}: {EXTENDS}: {file} extends itself")
        seen.append(file.resolve())
        values = _read(file)
        base = values.pop(EXTENDS, None)
        if not isinstance(base, str | None):
            raise ConfigError(f"{file}: {EXTENDS}: must name one file")
        merged = merge_settings(values, merged)
        file = None if base is None else file.parent / base
    return merged


def merge_settings(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with changes upon them: mappings are merged, anything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = (
            merge_settings(cast(dict[str, Any], old), cast(dict[str, Any], value))
            if both
            else value
        )
    return merged


def apply_overrides(
    values: dict[str, Any], overrides: Sequence[str], section: type[Section]
) -> dict[str, Any]:
    """Settings with `KEY=VALUE` overrides upon them, the last of a key the one that counts.

    A value is read as YAML, unless its field holds text: `name=7` is the name "7". `null` takes an optional
    setting away.

    Args:
        values: As read from a file.
        overrides: `KEY=VALUE`, the key dotted: `training.lora.r=16`.
        section: Says which keys there are.

    Raises:
        ConfigError: No `=`, or a key that no setting has; names the nearest ones.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override}: give KEY=VALUE, as in training.epochs=1")
        parts = key.split(".")
        change: Any = _value(text, _annotation(section, parts))
        for part in reversed(parts):
            change = {part: change}
        values = merge_settings(values, change)
    return values


def _annotation(section: type[Section], parts: Sequence[str]) -> Any:
    """The type of the field at a dotted path; Any inside a free mapping.

    Raises:
        ConfigError: There is no such field.
    """
    here: Any = section
    for number, part in enumerate(parts):
        fields = here.model_fields
        if part not in fields:
            near = difflib.get_close_matches(part, fields, n=3, cutoff=0.5) or list(fields)
            prefix = ".".join([*parts[:number], ""])
            raise ConfigError(
                f"--set {'.'.join(parts)}: unknown key; there are {', '.join(prefix + n for n in near)}"
            )
        here = fields[part].annotation
        rest = number + 1 < len(parts)
        inner = next((kind for kind in _alternatives(here) if _is_section(kind)), None)
        if rest and inner is None:
            if any(get_origin(kind) is dict for kind in _alternatives(here)):
                return Any
            raise ConfigError(
                f"--set {'.'.join(parts)}: {'.'.join(parts[: number + 1])} has no keys"
            )
        here = inner if rest else here
    return here


def _value(text: str, annotation: Any) -> Any:
    """A value as its field's type asks for it."""
    if str in _alternatives(annotation):
        optional = type(None) in _alternatives(annotation)
        return None if optional and text in ("null", "~") else text
    try:
        return json.loads(text)  # YAML would read 1e-7 as a text
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _alternatives(annotation: Any) -> list[Any]:
    """The types that a field may hold, without what annotates them."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _alternatives(part)]
    return [annotation]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a mapping of settings")
    return cast(dict[str, Any], values)

"""The model that is converted: its config, where each of its weights lies, and whether it is whole."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sima_ray.errors import ModelError
from sima_ray.policy.checkpoint import read_config
from sima_ray.policy.convert_config import (
    Layout,
    layout_of,
    read_hf_config,
    read_original_config,
    tower_config,
    tower_folder,
)
from sima_ray.policy.convert_keys import (
    EMBEDDINGS,
    PROJECTOR,
    TOWER,
    Skipped,
    original_name,
    published_name,
    published_shapes,
    published_tower_name,
    skipped,
)
from sima_ray.policy.convert_lora import Adapter
from sima_ray.policy.weight_files import Stored, model_weights, stored
from sima_ray.ports import JsonDict

_PROJECTOR_FILE = "mm_projector.bin"


@dataclass(slots=True)
class Source:
    """A model to convert.

    Attributes:
        folder: With its config and tokenizer.
        layout: None is a plain Llama, whose projector comes with an adapter.
        values: The original config.json, where there is one.
        config: transformers' `LlavaConfig`, the vocabulary as it is in the source.
        tower: Folder of the vision tower, where there is one of its own.
        weights: By published name, what is stored where.
        skipped: Tensors left out.
    """

    folder: Path
    layout: Layout | None
    values: JsonDict
    config: Any
    tower: Path | None
    weights: dict[str, Stored] = field(default_factory=dict)
    skipped: Counter[Skipped] = field(default_factory=Counter)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all weights that the config speaks of, by published name."""
        return published_shapes(self.config)

    @property
    def rows(self) -> int:
        """Of the embeddings."""
        return self.weights[EMBEDDINGS].shape[0]

    @property
    def has_tower(self) -> bool:
        """Whether the vision tower's weights were found."""
        return any(name.startswith(TOWER) for name in self.weights)

    def own_name(self, published: str) -> str:
        """What the source itself calls a weight."""
        return published if self.layout is Layout.HF else original_name(published)


def read_source(
    folder: Path, adapter: Path | None, vision_tower: Path | None, *, with_tower: bool
) -> Source:
    """Find out what a model folder holds, from configs and headers alone.

    Args:
        folder: The model, or an adapter's base.
        adapter: Its folder has the config where the base is a language model alone.
        vision_tower: CLIP folder that the user gave.
        with_tower: Whether the vision tower is looked for beyond the checkpoint.

    Raises:
        ModelError: A broken or unknown folder, file or config, or a weight that no LLaVA has.
    """
    layout = layout_of(folder)
    if layout is Layout.HF:
        if vision_tower is not None:
            raise ModelError(f"{folder}: has its vision tower; leave out --vision-tower")
        source = Source(folder, layout, {}, read_hf_config(folder), None)
    else:
        values = _original_values(folder, layout, adapter)
        tower = vision_tower or tower_folder(folder, str(values.get("mm_vision_tower")))
        config = read_original_config(folder, values, tower_config(folder, values, vision_tower))
        source = Source(folder, layout, values, config, tower)
    _add_model(source)
    if layout is not Layout.HF:
        _add_projector(source)
        if with_tower and source.tower and not source.has_tower:
            _add_tower(source, source.tower)
    return source


def check_weights(source: Source, adapter: Adapter | None, *, with_tower: bool) -> None:
    """Check that all weights are there and have the config's shapes.

    Raises:
        ModelError: Names the file and the weight.
    """
    shapes = source.shapes
    for name, held in source.weights.items():
        if held.shape != shapes[name]:
            raise ModelError(
                f"{held.file}: {held.name} is {held.shape}, by the config {shapes[name]}"
            )
        if not held.dtype.is_floating_point or held.dtype.itemsize < 2:
            raise ModelError(
                f"{held.file}: {held.name} is {held.dtype}: quantized weights are not converted"
            )
    if adapter is not None:
        adapter.check(shapes)
    whole: Mapping[str, object] = adapter.whole if adapter else {}
    lacking = [name for name in shapes if name not in source.weights and name not in whole]
    if not with_tower and not source.has_tower:
        lacking = [name for name in lacking if not name.startswith(TOWER)]
    if not lacking:
        return
    if all(name.startswith(TOWER) for name in lacking) and not source.has_tower:
        raise ModelError(
            f"{source.folder}: the vision tower is not in the checkpoint, which only names it "
            f"({source.values.get('mm_vision_tower')}); give its folder: --vision-tower"
        )
    raise ModelError(
        f"{source.folder}: lacks {len(lacking)} of {len(shapes)} weights: "
        f"{source.own_name(lacking[0])}{', …' if len(lacking) > 1 else ''}"
    )


def _original_values(folder: Path, layout: Layout | None, adapter: Path | None) -> JsonDict:
    """The original config: an adapter's own where it has one, as LLaVA's own code reads it."""
    if adapter and (adapter / "config.json").is_file() and layout_of(adapter) is Layout.ORIGINAL:
        return read_config(adapter)
    if layout is None:
        raise ModelError(
            f"{folder}: a Llama without vision; it can be the --base of a LLaVA adapter whose folder has "
            "LLaVA's config.json"
        )
    return read_config(folder)


def _add_model(source: Source) -> None:
    shapes = source.shapes
    for name, held in model_weights(source.folder).items():
        if reason := skipped(name):
            source.skipped[reason] += 1
            continue
        published = published_name(name)
        if published not in shapes:
            raise ModelError(
                f"{held.file}: {name} {held.shape}: no such weight in a LLaVA-1.5 with the config's "
                f"{source.config.text_config.num_hidden_layers} layers"
            )
        if published in source.weights:
            other = source.weights[published].name
            raise ModelError(f"{held.file}: {name} and {other} are the same weight")
        source.weights[published] = held
    if EMBEDDINGS not in source.weights:
        raise ModelError(f"{source.folder}: lacks {source.own_name(EMBEDDINGS)}")


def _add_projector(source: Source) -> None:
    """Of the file that pretraining leaves, beside a model that may hold the projector too."""
    file = source.folder / _PROJECTOR_FILE
    if not file.is_file():
        return
    inside = any(name.startswith(PROJECTOR) for name in source.weights)
    for name, held in stored([file]).items():
        published = published_name(name)
        if not published.startswith(PROJECTOR) or published not in source.shapes:
            raise ModelError(f"{file}: {name} {held.shape}: no weight of LLaVA-1.5's projector")
        if inside:
            source.skipped[Skipped.REPEATED] += 1
        else:
            source.weights[published] = held


def _add_tower(source: Source, folder: Path) -> None:
    shapes = source.shapes
    for name, held in model_weights(folder).items():
        published = published_tower_name(name)
        if isinstance(published, Skipped):
            source.skipped[published] += 1
        elif published not in shapes:
            raise ModelError(
                f"{held.file}: {name} {held.shape}: no such weight in this vision tower"
            )
        else:
            source.weights[published] = held

"""Preference pairs that a tiny model learns in a few steps: the chosen response says "yes", the rejected "no"."""

from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sima_ray.records import PreferencePair


def easy_pairs(images: Path, count: int) -> list[PreferencePair]:
    """Pairs of ragged lengths, each with an image of its own in the folder."""
    images.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (40 + i, 50), (9 * i % 256, 80, 200 - i)).save(images / f"{i}.png")
    return [
        PreferencePair(
            row_id=f"r{i:03d}",
            image=f"{i}.png",
            prompt="Is it so?" + " Say." * (i % 3),
            chosen="yes" + " yes" * (i % 4),
            rejected="no" + " no" * (i % 2),
            chosen_from="greedy",
            rejected_from="sampled",
            weight=1.0 + i % 2,
        )
        for i in range(count)
    ]


def write_pairs(pairs: list[PreferencePair], path: Path) -> str:
    """A pairs file; returns its path."""
    pq.write_table(pa.Table.from_pylist([asdict(pair) for pair in pairs]), path)
    return str(path)

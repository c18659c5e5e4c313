"""Small preference data sets in the very forms that others publish, all of the same pairs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, Value

from sima_ray.records import PreferencePair

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXTS = ("question", "chosen", "rejected")


def encoded(pair: PreferencePair, images: Path) -> dict[str, Any]:
    """An image as `datasets` keeps it in a file."""
    return {"bytes": (images / pair.image).read_bytes(), "path": pair.image}


def rlaif_v(pairs: list[PreferencePair], images: Path, file: Path) -> str:
    """RLAIF-V-Dataset's columns, all of them."""
    strings = ("ds_name", *TEXTS, "origin_dataset", "origin_split", "idx", "image_path")
    rows = [
        dict.fromkeys(strings, "x")
        | {"image": encoded(pair, images), "idx": pair.row_id, "image_path": pair.image}
        | dict(zip(TEXTS, (pair.prompt, pair.chosen, pair.rejected), strict=True))
        for pair in pairs
    ]
    texts = [(name, pa.string()) for name in strings]
    schema = pa.schema([texts[0], ("image", IMAGE), *texts[1:]])
    pq.write_table(pa.Table.from_pylist(rows, schema), file, row_group_size=4)
    return str(file)


def messages(role: str, text: str, image: bool = False) -> list[dict[str, Any]]:
    """One message with typed content."""
    place = [{"type": "image", "text": None}] if image else []
    return [{"role": role, "content": [*place, {"type": "text", "text": text}]}]


def trl(pairs: list[PreferencePair], images: Path, folder: Path) -> str:
    """A folder that `datasets` saved, with TRL's columns."""
    part = {"type": Value("string"), "text": Value("string")}
    said = List({"role": Value("string"), "content": List(part)})
    names = ("prompt", "chosen", "rejected")
    features = Features({"images": List(Image()), **dict.fromkeys(names, said)})

    def rows() -> Iterator[dict[str, Any]]:
        for pair in pairs:
            yield {
                "images": [encoded(pair, images)],
                "prompt": messages("user", pair.prompt, image=True),
                "chosen": messages("assistant", pair.chosen),
                "rejected": messages("assistant", pair.rejected),
            }

    Dataset.from_list(list(rows()), features=features).save_to_disk(folder)
    return str(folder)


def povid(pairs: list[PreferencePair], file: Path) -> str:
    """The JSON of POVID and of SIMA's release; images are names."""

    def turns(question: str, answer: str) -> list[dict[str, str]]:
        return [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ]

    rows = [
        {
            "id": pair.row_id,
            "image": pair.image,
            "conversations": turns(pair.prompt, pair.chosen),
            "rejected_conversations": turns(pair.prompt, pair.rejected),
        }
        for pair in pairs
    ]
    file.write_text(json.dumps(rows))
    return str(file)

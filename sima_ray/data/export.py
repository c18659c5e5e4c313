"""Preference pairs for other trainers: LLaVA/POVID JSON, and Parquet as TRL and `datasets` read
it.

Neither format has weights, and their trainers count every pair alike: of inconsistent verdicts that
`pairs.inconsistent_weight` keeps, too. pairs.parquet has the weights.
"""

import json
import posixpath
from collections.abc import Iterable, Iterator
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from sima_ray.data.locations import open_location, read_image
from sima_ray.ports import JsonDict
from sima_ray.records import PreferencePair

_ROWS_A_GROUP = 64  # each with its image: what is held in memory

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())]))),
    ]
)

_STRING = {"dtype": "string", "_type": "Value"}
_MESSAGES = {
    "feature": {
        "role": _STRING,
        "content": {"feature": {"type": _STRING, "text": _STRING}, "_type": "List"},
    },
    "_type": "List",
}
_FEATURES = {
    "images": {"feature": {"_type": "Image"}, "_type": "List"},
    "prompt": _MESSAGES,
    "chosen": _MESSAGES,
    "rejected": _MESSAGES,
}

TRL_SCHEMA = pa.schema(
    [
        ("images", pa.list_(_IMAGE)),
        ("prompt", pa.list_(_MESSAGE)),
        ("chosen", pa.list_(_MESSAGE)),
        ("rejected", pa.list_(_MESSAGE)),
    ],
    # What `datasets` reads its features from: without it the images would stay bytes.
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)
"""TRL's conversational preference format with images; the images are in the file, as encoded."""


def export_llava(pairs: Iterable[PreferencePair], path: str) -> int:
    """Write pairs as one JSON array, as LLaVA and POVID read it; the number of pairs.

    Images stay names, relative to the image folder.
    """
    filesystem, path = open_location(path)
    count = 0
    with filesystem.open_output_stream(path) as stream:
        for pair in pairs:
            start = "[\n" if count == 0 else ",\n"
            stream.write(f"{start}{json.dumps(_llava(pair), ensure_ascii=False)}".encode())
            count += 1
        stream.write(b"\n]\n" if count else b"[]\n")
    return count


def export_trl(pairs: Iterable[PreferencePair], path: str, *, images: str) -> int:
    """Write pairs as Parquet with TRL's columns and the images in it; the number of pairs.

    `datasets.load_dataset("parquet", data_files=path)` gives decoded images and messages that
    `DPOTrainer` takes.

    Args:
        pairs: The pairs.
        path: The file to write.
        images: What image names are relative to, as `data.images` of a run.

    Raises:
        ImageProblem: An image is gone.
    """
    filesystem, path = open_location(path)
    count = 0
    with pq.ParquetWriter(path, TRL_SCHEMA, filesystem=filesystem) as writer:
        for group in _groups(pairs):
            rows = [_trl(pair, read_image(images, pair.image)) for pair in group]
            writer.write_table(pa.Table.from_pylist(rows, TRL_SCHEMA))
            count += len(group)
    return count


def _groups(pairs: Iterable[PreferencePair]) -> Iterator[list[PreferencePair]]:
    pairs = iter(pairs)
    while group := list(islice(pairs, _ROWS_A_GROUP)):
        yield group


def _llava(pair: PreferencePair) -> JsonDict:
    question = {"from": "human", "value": f"<image>\n{pair.prompt}"}
    return {
        "id": pair.row_id,
        "image": pair.image,
        "conversations": [question, {"from": "gpt", "value": pair.chosen}],
        "rejected_conversations": [question, {"from": "gpt", "value": pair.rejected}],
    }


def _trl(pair: PreferencePair, image: bytes) -> JsonDict:
    def message(role: str, *content: JsonDict) -> list[JsonDict]:
        return [{"role": role, "content": list(content)}]

    def text(value: str) -> JsonDict:
        return {"type": "text", "text": value}

    return {
        "images": [{"bytes": image, "path": posixpath.basename(pair.image)}],
        "prompt": message("user", {"type": "image"}, text(pair.prompt)),
        "chosen": message("assistant", text(pair.chosen)),
        "rejected": message("assistant", text(pair.rejected)),
    }

"""What an image's name in a prompts file means: relative, never out of its root, in any of COCO's layouts."""

import re

_COCO_NAME = re.compile(
    r"(?:coco/)?(?:(?:train|val)20(?:14|17)/)?(?:COCO_(?:train|val)2014_)?(?P<leaf>[^/]+)"
)
_COCO_PLACES = (
    "{leaf}",
    "train2017/{leaf}",
    "val2017/{leaf}",
    "coco/train2017/{leaf}",
    "coco/val2017/{leaf}",
    "COCO_train2014_{leaf}",
    "COCO_val2014_{leaf}",
    "train2014/COCO_train2014_{leaf}",
    "val2014/COCO_val2014_{leaf}",
)
"""Where COCO keeps one and the same image, by how and when it was downloaded; ids are unique over
all sets."""


def plain_name(name: str) -> str | None:
    """A relative name without empty parts and dots; None for one that leads elsewhere."""
    parts = name.split("/")
    if "://" in name or name.startswith("/") or ".." in parts or "\0" in name:
        return None
    return "/".join(part for part in parts if part not in ("", "."))


def places(name: str) -> list[str]:
    """Where the image of a plain name may lie, the name as it stands first."""
    found = [name]
    if match := _COCO_NAME.fullmatch(name):
        found += [place.format(leaf=match["leaf"]) for place in _COCO_PLACES]
    return list(dict.fromkeys(found))


def bare_name(name: str) -> str | None:
    """The shortest name by which an image is found; None for one that is not below a root."""
    relative = plain_name(name)
    match = _COCO_NAME.fullmatch(relative) if relative else None
    return match["leaf"] if match else relative or None

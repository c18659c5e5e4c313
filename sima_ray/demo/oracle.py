"""The judge who cannot err: counts errors against the exact description of the scene."""

from sima_ray.demo.language import Caption, Entry, parse_caption


def entry_errors(truth: Entry | None, said: Entry | None) -> int:
    """Errors at one place: 0 when both agree.

    An object that is not there counts one, an object left out counts one (so another object in
    its place counts two), and a wrong size or fading of the right object counts one.
    """
    if truth is None or said is None:
        return int(truth is not said)
    if truth.name != said.name:
        return 2
    return int((truth.small, truth.faded) != (said.small, said.faded))


def by_place(caption: Caption) -> dict[int, Entry]:
    """The first entry of each place, in reading order."""
    first: dict[int, Entry] = {}
    for entry in caption.entries:
        first.setdefault(entry.place, entry)
    return dict(sorted(first.items()))


def caption_errors(said: Caption, truth: Caption) -> int:
    """Wrong, missing and misplaced objects, wrong attributes and a wrong background, added up.

    An object at a wrong place counts twice: missing where it is, wrong where it is said to be. A
    second object at the same place counts one.
    """
    wanted, given = by_place(truth), by_place(said)
    errors = sum(entry_errors(wanted.get(p), given.get(p)) for p in wanted.keys() | given.keys())
    repeated = len(said.entries) - len(given)
    return errors + repeated + int(said.background != truth.background)


def count_errors(response: str, ground_truth: str) -> int:
    """`caption_errors` of two texts."""
    return caption_errors(parse_caption(response), parse_caption(ground_truth))

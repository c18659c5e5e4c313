"""How the demo's critic reasons: place by place, quoting the ground truth and both responses.

    on a blue background: Response 1 blue, right; Response 2 green, 1 error. at the top a large dog:
    Response 1 a large dog, right; Response 2 nothing, 1 error. In all 0 against 2.
    Choice: [[1]]

Every row can be checked against the texts by itself, so that a small model can learn to write it.
"""

from sima_ray.demo.language import PLACES, Entry, parse_caption, phrase
from sima_ray.demo.oracle import by_place, caption_errors, entry_errors
from sima_ray.records import Choice

MARKS = ("right", "1 error", "2 errors")


def write_reason(ground_truth: str, first: str, second: str) -> str:
    """The reason, up to where the choice begins."""
    truth, one, two = (parse_caption(text) for text in (ground_truth, first, second))
    color = f"{truth.background or 'plain'} background"
    rows = [_row(f"on a {color}", one.background, two.background, truth.background)]
    wanted, said_1, said_2 = by_place(truth), by_place(one), by_place(two)
    for place in sorted(wanted.keys() | said_1.keys() | said_2.keys()):
        right, a, b = wanted.get(place), said_1.get(place), said_2.get(place)
        rows.append(
            f"{PLACES[place]} {_said(right)}:"
            f" Response 1 {_said(a)}, {MARKS[entry_errors(right, a)]};"
            f" Response 2 {_said(b)}, {MARKS[entry_errors(right, b)]}."
        )
    total = f"In all {caption_errors(one, truth)} against {caption_errors(two, truth)}."
    return " ".join([*rows, total])


def write_critique(ground_truth: str, first: str, second: str, choice: Choice) -> str:
    """The critic's whole answer."""
    return f"{write_reason(ground_truth, first, second)}\nChoice: [[{choice}]]"


def _row(key: str, one: str | None, two: str | None, right: str | None) -> str:
    marks = [MARKS[int(said != right)] for said in (one, two)]
    return (
        f"{key}: Response 1 {one or 'nothing'}, {marks[0]};"
        f" Response 2 {two or 'nothing'}, {marks[1]}."
    )


def _said(entry: Entry | None) -> str:
    return phrase(entry) if entry else "nothing"

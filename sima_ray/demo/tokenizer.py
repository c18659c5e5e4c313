"""The phrases that the demo policy reads and writes as one token each.

Matching is what a small critic finds hard: so every name, place, size, colour, mark and count is
one token, the same one wherever it occurs, and the fixed texts of the critic prompt cost few.
"""

from sima_ray.critic.prompt import HERE as CRITIC
from sima_ray.demo.critique import MARKS
from sima_ray.demo.language import COLORS, NAMES, PLACES, QUESTIONS

COUNTS = 13  # "In all 0 against 12." is the highest that has tokens of its own
COMMON = (
    *("the", "a", "an", "is", "are", "of", "in", "on", "at", "and", "or", "to", "it", "with"),
    *("image", "picture", "object", "objects", "response", "better", "yes", "no", "not", "what"),
    *("left", "right", "top", "bottom", "center", "large", "small", "faded", "background"),
    *("one", "two", "three", "there", "this", "that", "which", "many", "how", "where", "please"),
)


def phrases() -> list[str]:
    """All phrases, most of them with the space before them."""
    criteria = (CRITIC / "templates" / "criteria.j2").read_text(encoding="utf-8")
    marks = [f", {mark}{end}" for mark in MARKS for end in (";", ".")]
    return [
        *("USER: ", " ASSISTANT:", "\n", ".", ",", ":", " Yes", " No"),
        *(line + "\n" for line in criteria.split("\n")),
        *(line for line in criteria.split("\n")),
        *("Example", "\nQuestion:", "\nGround truth:", "\nResponse 1:", "\nResponse 2:"),
        *("\nThe case to judge", "The case to judge", "\nReason:", "\nChoice:", " [[1]]", " [[2]]"),
        *(f"{space}{question}" for question in QUESTIONS for space in ("", " ")),
        *("Is there a", "Is there an", " Is there a", " Is there an", " in the image?"),
        *(
            " On a",
            " on a",
            " background:",
            " nothing",
            ": Response 1",
            " Response 1",
            " Response 2",
        ),
        *(f" {place}" for place in PLACES),
        *(f" a {size}" for size in ("large", "small", "large faded", "small faded")),
        *(f" {color}" for color in COLORS),
        *(f" {name}" for name in NAMES),
        *marks,
        *(" In all", " against", *(f" {count}" for count in range(COUNTS))),
        *(f" {word}" for word in COMMON),
    ]

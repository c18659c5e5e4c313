"""Reading a critic's text: its reason, and the response that it chose."""

import re

from sima_ray.records import Choice

VERDICTS = ("Choice: [[1]]", "Choice: [[2]]")
"""The two verdicts as the worked examples spell them: they differ in the number alone."""

_CHOICES: dict[str, Choice] = {"1]]": 1, "2]]": 2}
_LABEL = re.compile(r"(?:^|\s)[*_]*choice[*_]*\s*:?[*_]*\s*$", re.IGNORECASE)


def parse_verdict(raw: str) -> tuple[str, Choice | None]:
    """Split a critic's text into its reason and its choice.

    The last double bracket decides, and it must be exactly `[[1]]` or `[[2]]`. When the last one is
    anything else, such as `[[3]]`, `[[tie]]`, `[[Response 1]]` or a bracket that was cut short, the
    critic chose neither, and an earlier `[[1]]` is most likely a quotation of the instructions: no
    choice.

    Args:
        raw: The critic's whole text.

    Returns:
        The reason (what stands before the verdict, without a trailing "Choice:"; the whole text
        when there is no choice), and the choice, None when unparseable.
    """
    before, _, after = raw.rpartition("[[")
    choice = _CHOICES.get(after[:3])
    if choice is None:
        return raw.strip(), None
    return _LABEL.sub("", before).strip(), choice

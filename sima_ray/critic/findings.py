"""What a critic's reason says under each of the three metrics, where it is written metric by metric."""

import re

METRICS = ("objects", "relationships", "attributes")
"""In the order of the criteria (`templates/criteria.j2`)."""

_HEADING = re.compile(
    r"(?:^|(?<=[.;!?])[ \t]+)"  # of a line, or of a sentence
    r"[ \t]*(?:[-*•#]+[ \t]+|\(?\d[.)][ \t]*)?[*_]*"  # a list's mark, emphasis
    r"(?:accuracy[ \t]+(?:in|of)[ \t]+)?(?:the[ \t]+)?(?:depicting|describing)?[ \t]*"
    r"(?P<metric>object|relationship|attribute)s?(?:[ \t]+(?:descriptions?|accuracy))?"
    r"[*_]*[ \t]*:[*_]*",
    re.IGNORECASE | re.MULTILINE,
)


def read_findings(reason: str) -> dict[str, str]:
    """The reason's parts by metric.

    Args:
        reason: See `Critique.reason`.

    Returns:
        Metric → what stands under its heading ("Objects: …", "1. **Accuracy in object description**: …"), for
        those that have one with text, in the order of `METRICS`. A metric with several headings has their texts,
        a line each. Empty for a reason that is not written metric by metric.
    """
    headings = list(_HEADING.finditer(reason))
    ends = [*(heading.start() for heading in headings[1:]), len(reason)]
    found: dict[str, list[str]] = {metric: [] for metric in METRICS}
    for heading, end in zip(headings, ends, strict=False):  # without headings one end is left over
        text = reason[heading.end() : end].strip()
        if text:
            found[f"{heading['metric'].lower()}s"].append(text)
    return {metric: "\n".join(texts) for metric, texts in found.items() if texts}

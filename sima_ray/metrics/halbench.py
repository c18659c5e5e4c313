"""Object HalBench by rules: CHAIR over 300 COCO images that are to be described in detail.

The original has a language model list the objects of a description; its rule-based variant looks the
words up in a list of synonyms, as CHAIR does, and is what this is. The original's own list can be
given (`evaluation.halbench.synonyms`); the rest differs as `sima_ray.metrics.chair` says.

Published tables show the response-level figure over the descriptions that name any COCO object
("response hallucination"), and the mention-level figure ("object hallucination").
"""

from collections.abc import Sequence

from sima_ray.metrics.bootstrap import Ratio
from sima_ray.metrics.chair import CaptionScore, chair_ratios


def halbench_ratios(scores: Sequence[CaptionScore]) -> dict[str, Ratio]:
    """The columns, a row a description.

    Returns:
        response: share of the descriptions with an object that have a hallucinated one; mention:
        share of the mentions that are hallucinated; recall, objects, length: as for CHAIR.
    """
    columns = chair_ratios(scores)
    wrong = [float(len(score.hallucinated) > 0) for score in scores]
    return {
        "response": Ratio.of(wrong, [float(len(score.mentions) > 0) for score in scores]),
        "mention": columns["chair_i"],
        "recall": columns["recall"],
        "objects": columns["objects"],
        "length": columns["length"],
    }

"""Findings by metric, from the ways in which models head them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sima_ray.critic.findings import METRICS, read_findings


@pytest.mark.parametrize(
    "reason",
    [
        "Objects: a cup too many.\nRelationships: both right.\nAttributes: the cup is red.",
        "1. Accuracy in object description: a cup too many.\n2. Accuracy in depicting relationships: both right.\n"
        "3. Accuracy in describing attributes: the cup is red.",
        "First, by the metrics.\n- **Object description:** a cup too many.\n- **Relationships**: both right.\n"
        "- **Attributes**: the cup is red.",
        "Object accuracy: a cup too many. Relationships: both right. Attributes: the cup is red.",
        "Attributes: the cup is red.\n\nOBJECTS:\na cup too many.\n\nRelationship: both right.",
    ],
)
def test_each_metric_has_its_part(reason: str) -> None:
    assert read_findings(reason) == {
        "objects": "a cup too many.",
        "relationships": "both right.",
        "attributes": "the cup is red.",
    }


@pytest.mark.parametrize(
    "reason",
    [
        "",
        "Response 1 names the objects: a cup and a dog, with their attributes right.",
        "on a red background: Response 1 red, right; Response 2 blue, 1 error.",
        "Objects:\nAttributes:  ",
    ],
)
def test_a_reason_in_one_piece_has_none(reason: str) -> None:
    assert read_findings(reason) == {}


def test_two_headings_of_one_metric() -> None:
    found = read_findings("Objects: one lost.\nAttributes: right.\nObjects: one too many.")
    assert found == {"objects": "one lost.\none too many.", "attributes": "right."}


@given(st.text(alphabet="objects: attributeRelationships\n.*1-", max_size=300))
def test_nothing_is_made_up(reason: str) -> None:
    found = read_findings(reason)
    assert list(found) == [metric for metric in METRICS if metric in found]
    for text in found.values():
        assert text and all(line in reason for line in text.split("\n"))

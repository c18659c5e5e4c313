"""Which replica a request goes to: keys of images, and the order of replicas for a key."""

import os
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_apps.routing import WINDOW, choose, image_key
from sima_ray.ports import image_part, text_part

REPLICAS = [f"replica-{number}" for number in range(8)]
IDLE = dict.fromkeys(REPLICAS, 0)
KEYS = [number.to_bytes(16, "big") for number in range(2000)]


def request(*content: Any, **more: Any) -> dict[str, Any]:
    return {"content": list(content), "max_tokens": 1, "temperature": 0.0} | more


def test_the_key_is_the_images() -> None:
    one, other = os.urandom(100), os.urandom(100)
    key = image_key(request(image_part(one), text_part("What is it?")))
    assert key is not None
    assert key == image_key(request(image_part(one), text_part("What else?"), temperature=1.0))
    assert key == image_key(request(text_part("Criteria"), image_part(one), text_part("Answers")))
    assert key != image_key(request(image_part(other), text_part("What is it?")))
    assert key == image_key([request(image_part(one)), request(image_part(one))])  # a call's


@pytest.mark.parametrize("at", [0, 100, 2 * WINDOW, 4 * WINDOW - 1])
def test_large_images_differ_by_their_head_middle_and_tail(at: int) -> None:
    image = bytearray(4 * WINDOW)
    before = image_key(request(image_part(bytes(image))))
    image[at] = 1
    assert image_key(request(image_part(bytes(image)))) != before
    assert image_key(request(image_part(bytes(image) + b"\0"))) != before


@pytest.mark.parametrize(
    "sent",
    [
        None,
        "text",
        {},
        [],
        [request(text_part("no image"))],
        {"content": "text"},
        {"content": [None, 3, "image"]},
        {"content": [{"type": "image"}, {"type": "image", "image": "text"}]},
        request(text_part("no image")),
    ],
)
def test_requests_without_an_image_have_no_key(sent: object) -> None:
    assert image_key(sent) is None


def test_images_spread_evenly_over_idle_replicas() -> None:
    counts = Counter(choose(key, IDLE, 0) for key in KEYS)
    assert set(counts) == set(REPLICAS)
    assert max(counts.values()) < 1.3 * len(KEYS) / len(REPLICAS)


def test_a_replica_that_goes_moves_only_its_own_images() -> None:
    homes = {key: choose(key, IDLE, 0) for key in KEYS}
    left = dict.fromkeys(REPLICAS[1:], 0)
    moved = {key for key in KEYS if choose(key, left, 0) != homes[key]}
    assert moved == {key for key in KEYS if homes[key] == REPLICAS[0]}
    assert set(Counter(choose(key, left, 0) for key in moved)) == set(left)  # not all to one


queues = st.dictionaries(st.sampled_from(REPLICAS), st.integers(0, 100), min_size=1)


@given(st.sampled_from(KEYS), queues, st.integers(0, 10))
def test_no_queue_grows_beyond_the_slack(key: bytes, queues: dict[str, int], slack: int) -> None:
    chosen = choose(key, queues, slack)
    assert queues[chosen] <= min(queues.values()) + slack
    home = choose(key, dict.fromkeys(queues, 0), slack)
    if queues[home] <= min(queues.values()) + slack:
        assert chosen == home
    assert choose(key, dict(reversed(queues.items())), slack) == chosen  # the order says nothing


def test_a_hot_image_goes_on_to_the_same_second_replica() -> None:
    key = KEYS[0]
    first = choose(key, IDLE, 4)
    second = choose(key, IDLE | {first: 5}, 4)
    assert first != second == choose(key, IDLE | {first: 50}, 4)
    assert choose(key, IDLE | {first: 4}, 4) == first

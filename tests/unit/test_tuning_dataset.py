"""Pairs as token ids: rendering, boundaries, what is set aside, and the order of training."""

from dataclasses import replace
from pathlib import Path

import pytest
from easy_pairs import easy_pairs, write_pairs

from sima_ray.errors import DataError
from sima_ray.policy.chat import join_response, render_prompt
from sima_ray.policy.checkpoint import load_processor
from sima_ray.ports import image_part, text_part
from sima_ray.records import PreferencePair
from sima_ray.tuning.dataset import (
    PairEncoder,
    Schedule,
    SetAside,
    UnusablePair,
    micro_batches,
    order,
    read_pairs,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def pairs(images: Path) -> list[PreferencePair]:
    return easy_pairs(images, 6)


@pytest.fixture(scope="module")
def processor(tiny_llava: Path):
    return load_processor(tiny_llava)


@pytest.fixture
def encoder(processor, images: Path) -> PairEncoder:
    return PairEncoder(processor, str(images), max_tokens=512)


def test_a_pair_is_rendered_as_the_service_renders_it(encoder, processor, pairs):
    for pair in pairs:
        encoded = encoder.encode(pair)
        prompt = render_prompt(processor, [image_part(b""), text_part(pair.prompt)])
        for text, response in (
            (pair.chosen, encoded.chosen_C),
            (pair.rejected, encoded.rejected_R),
        ):
            whole = processor.tokenizer(join_response(prompt, text))["input_ids"]
            whole.append(processor.tokenizer.eos_token_id)
            ids = [*encoded.prompt_P.tolist(), *response.tolist()]
            first = ids.index(processor.image_token_id)
            last = len(ids) - ids[::-1].index(processor.image_token_id)
            assert last - first == 36  # (96 / 16)² features
            assert ids[: first + 1] + ids[last:] == whole


def test_a_response_ends_with_the_end_token_and_holds_only_itself(encoder, processor, pairs):
    encoded = encoder.encode(pairs[1])
    assert processor.tokenizer.decode(encoded.chosen_C) == " yes yes</s>"
    assert processor.tokenizer.decode(encoded.prompt_P).endswith("ASSISTANT:")


def test_the_boundary_is_where_the_tokens_part(images: Path, pairs):
    """A tokenizer that joins the prompt's last character with the response's first."""
    phrases = [": yes", ": no"]
    from sima_ray.policy.tiny import TinyShape, make_processor

    processor = make_processor(phrases, TinyShape())
    encoded = PairEncoder(processor, str(images), 512).encode(pairs[0])
    assert processor.tokenizer.decode(encoded.prompt_P).endswith("ASSISTANT")
    assert processor.tokenizer.decode(encoded.chosen_C) == ": yes</s>"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": " "}, SetAside.EMPTY_RESPONSE),
        ({"rejected": ""}, SetAside.EMPTY_RESPONSE),
        ({"chosen": "yes " * 200}, SetAside.TOO_LONG),
        ({"prompt": "word " * 200}, SetAside.TOO_LONG),
        ({"rejected": "see <image> there"}, SetAside.IMAGE_TOKENS),
        ({"image": "none.png"}, SetAside.MISSING_IMAGE),
        ({"image": "broken.png"}, SetAside.BROKEN_IMAGE),
        ({"weight": float("nan")}, SetAside.BAD_WEIGHT),
        ({"weight": -1.0}, SetAside.BAD_WEIGHT),
    ],
)
def test_an_unusable_pair_names_itself_and_the_reason(encoder, images, pairs, change, reason):
    (images / "broken.png").write_bytes((images / "0.png").read_bytes()[:60])
    with pytest.raises(UnusablePair, match="r000") as caught:
        encoder.encode(replace(pairs[0], **change))
    assert caught.value.reason is reason


def test_a_placeholder_in_a_prompt_is_only_text(encoder, pairs):
    encoded = encoder.encode(replace(pairs[0], prompt="what is <image>?"))
    assert encoded.tokens > encoder.encode(pairs[0]).tokens


def test_pairs_are_sorted_and_defaults_filled(tmp_path: Path, pairs):
    path = write_pairs(list(reversed(pairs)), tmp_path / "pairs.parquet")
    assert read_pairs(path) == pairs


def test_a_file_that_holds_no_pairs_is_an_error(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(DataError, match="cannot be read"):
        read_pairs(str(tmp_path / "none.parquet"))
    pq.write_table(pa.table({"row_id": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="no column image, prompt, chosen, rejected"):
        read_pairs(str(tmp_path / "other.parquet"))


def test_the_order_depends_on_seed_and_epoch_alone():
    assert order(50, seed=1, epoch=0) == order(50, seed=1, epoch=0)
    assert sorted(order(50, 1, 0)) == list(range(50))
    assert len({tuple(order(50, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_every_pair_is_seen_once_an_epoch():
    schedule = Schedule(pairs=10, batch_size=4, epochs=2, seed=0)
    assert (schedule.steps_per_epoch, schedule.steps) == (3, 6)
    for epoch in range(2):
        rows = [row for step in range(3) for row in schedule.batch(3 * epoch + step)]
        assert len(rows) == 12
        assert sorted(row for row in rows if row is not None) == list(range(10))


@pytest.mark.parametrize(("world", "size"), [(1, 8), (1, 1), (2, 4), (4, 1), (2, 2)])
def test_workers_share_a_batch_without_gap_or_overlap(world: int, size: int):
    batch: list[int | None] = [*range(7), None]
    shares = [list(micro_batches(batch, rank, world, size)) for rank in range(world)]
    assert {len(share) for share in shares} == {8 // (world * size)}
    rows = [row for share in shares for micro in share for row in micro]
    assert sorted(rows, key=str) == sorted(batch, key=str)

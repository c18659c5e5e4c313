"""Pairs as token ids: rendering, boundaries, and what is set aside."""

from dataclasses import replace
from pathlib import Path

import pytest
from easy_pairs import easy_pairs, write_pairs

from sima_ray.errors import DataError
from sima_ray.policy.chat import join_response, render_prompt
from sima_ray.policy.checkpoint import load_processor
from sima_ray.ports import image_part, text_part
from sima_ray.records import PreferencePair
from sima_ray.tuning.dataset import PairEncoder, SetAside, UnusablePair, read_pairs


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

    with pytest.raises(DataError, match=r"none\.parquet: pairs cannot be read: No such file or"):
        read_pairs(str(tmp_path / "none.parquet"))
    pq.write_table(pa.table({"row_id": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="no column image, prompt, chosen, rejected"):
        read_pairs(str(tmp_path / "other.parquet"))


def test_the_models_own_context_is_a_limit_too(processor, images: Path, pairs):
    with pytest.raises(UnusablePair, match=r"over the 40 of the model's own context") as caught:
        PairEncoder(processor, str(images), 512, context=40).encode(pairs[0])
    assert caught.value.reason is SetAside.TOO_LONG
    with pytest.raises(UnusablePair, match=r"over the 40 of max_tokens"):
        PairEncoder(processor, str(images), 40, context=512).encode(pairs[0])


def test_a_response_of_no_token_is_unusable(processor, images: Path, pairs):
    """Text that a tokenizer drops is no response, though it is not blank."""

    class Dropping(PairEncoder):
        def _ids(self, text: str) -> list[int]:
            return super()._ids(text.replace(" gone", ""))

    with pytest.raises(UnusablePair, match="the chosen response has no token") as caught:
        Dropping(processor, str(images), 512).encode(replace(pairs[0], chosen="gone"))
    assert caught.value.reason is SetAside.EMPTY_RESPONSE


def test_the_digest_is_of_the_image(encoder, images: Path, pairs):
    digests = [encoder.encode(pair).image_digest for pair in pairs[:2]]
    assert len(set(digests)) == 2
    assert encoder.encode(pairs[0]).image_digest == digests[0]

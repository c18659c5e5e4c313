"""Micro batches made ready, and what is found wrong with a pair before anything is computed."""

from pathlib import Path
from threading import Event

import pytest
import torch
from easy_pairs import easy_pairs
from PIL import Image

from sima_ray.errors import TrainingError
from sima_ray.policy.checkpoint import load_policy, load_processor
from sima_ray.tuning.batches import Ahead, Pairs, Read
from sima_ray.tuning.dataset import PairEncoder, SetAside
from sima_ray.tuning.forward import PairLogps, concatenated
from sima_ray.tuning.reference import Reference, ReferenceFile, reference_pass, usable


@pytest.fixture
def ready(tiny_llava: Path, tmp_path: Path) -> tuple[Pairs, Path]:
    pairs = easy_pairs(tmp_path, 3)
    encoder = PairEncoder(load_processor(tiny_llava), str(tmp_path), 512)
    encoded = [encoder.encode(pair) for pair in pairs]
    references = {
        e.pair.row_id: Reference(
            *(e.pair.row_id, -1.0 - i, -2.0 - i),
            tokens=e.tokens,
            width=len(e.prompt_P) + max(len(e.chosen_C), len(e.rejected_R)),
            image_digest=e.image_digest,
        )
        for i, e in enumerate(encoded)
    }
    return Pairs(pairs, references, encoder), tmp_path


def test_rows_become_micro_batches_and_a_filler_weighs_nothing(ready):
    pairs, _ = ready
    first, filler = pairs.read([[2, 1], [None]]).agreed()
    assert [pair.pair.row_id for pair in first.pairs] == ["r002", "r001"]
    assert first.weights_B.tolist() == [1.0, 2.0]
    assert first.reference_chosen_B.tolist() == [-3.0, -2.0]
    assert first.reference_rejected_B.dtype == torch.float64
    assert filler.weights_B.tolist() == [0.0]
    assert filler.pairs[0].pair.row_id == "r000"  # the narrowest
    assert pairs.weight([0, 1]) == 3.0


def test_an_image_that_is_gone_or_another_stops_the_run(ready):
    pairs, images = ready
    (images / "1.png").unlink()
    with pytest.raises(TrainingError, match=r"pair r001: image 1.png.*has changed since"):
        pairs.read([[0], [1]]).agreed()
    Image.new("RGB", (41, 50), (200, 0, 0)).save(images / "2.png")
    with pytest.raises(TrainingError, match=r"pair r001: .*\(and 1 more\)"):
        pairs.read([[2], [1]]).agreed()
    assert len(pairs.read([[0]]).agreed()) == 1


def test_the_next_step_is_read_while_this_one_is_computed():
    """And what was not asked for next is read when it is."""
    read = [Event() for _ in range(5)]

    def reader(step: int) -> Read:
        assert not read[step].is_set(), "read twice"
        read[step].set()
        return Read([], [str(step)])

    ahead = Ahead(reader)
    assert ahead(0, 5).problems == ["0"]
    assert read[1].wait(10)
    assert ahead(1, 5).problems == ["1"]
    assert read[2].wait(10)
    assert ahead(4, 5).problems == ["4"]
    assert not read[3].is_set()


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_reference_that_is_not_finite_sets_its_pair_aside(
    tiny_llava: Path, tmp_path: Path, bad: float
):
    pairs = easy_pairs(tmp_path, 4)
    model, processor = load_policy(tiny_llava, "float32")
    encoder = PairEncoder(processor, str(tmp_path), 512)

    def broken(model, batch):
        logps = concatenated(model, batch)
        rows = torch.tensor([pair.pair.row_id == "r002" for pair in batch])
        return PairLogps(logps.chosen_B, torch.where(rows, bad, logps.rejected_B))

    file = ReferenceFile(str(tmp_path / "reference.parquet"), "key")
    references = reference_pass(model, broken, encoder, pairs, file, batch_size=2)
    assert references["r002"].set_aside == SetAside.BAD_REFERENCE
    assert "rejected response is" in (references["r002"].detail or "")
    assert [pair.row_id for pair in usable(pairs, references)] == ["r000", "r001", "r003"]
    assert file.read() == references
    assert references["r000"].width and references["r000"].image_digest

"""The tuning benchmark: its arithmetic by hand, its rows, and its gate on a model that the tests can afford."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.tuning.by_released import pair_loss, rejected_labels, row_logps
from benchmarks.tuning.comparison import check, stirred
from benchmarks.tuning.figures import cost, figures, run_flops, table
from benchmarks.tuning.gate import LIMITS, Gate
from benchmarks.tuning.shapes import SHAPES, Lengths, Shapes, Work, for_gate, make_pairs, prepare
from benchmarks.tuning.trial import Clock, Lap, Trial, memory


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """The quick shapes' folder, as the gate has it."""
    folder = tmp_path_factory.mktemp("bench")
    made = Work(folder, for_gate(SHAPES["quick"]), "cpu", epochs=2, seed=3)
    made.write()
    prepare(made)
    return made


def trial(trainer: str, *, reference: float | None, epochs: list[float], peak: int) -> Trial:
    laps = [Lap(seconds, 2 * seconds) for seconds in epochs]
    alone = None if reference is None else Lap(reference, 2 * reference)
    return Trial(trainer, "a", alone, laps, ready_bytes=100, peak_bytes=peak)


def test_a_folder_describes_itself(work: Work) -> None:
    assert Work.read(work.folder) == work
    lengths = work.lengths()
    assert len(lengths) == work.shapes.pairs
    low, high = work.shapes.response_tokens
    for pair in lengths:
        assert pair.prompt == 36 + 22 + work.shapes.prompt_words  # image, template, words
        assert low <= pair.chosen <= high
        assert low <= pair.rejected <= high


def test_rows_are_a_function_of_the_seed() -> None:
    shapes = SHAPES["small"]
    assert list(make_pairs(shapes, 1)) == list(make_pairs(shapes, 1))
    assert list(make_pairs(shapes, 1)) != list(make_pairs(shapes, 2))


def test_the_gate_passes_without_trl(work: Work) -> None:
    gate = check(work, with_trl=False)
    assert gate.failures() == []
    assert abs(gate.loss - math.log(2)) > 1e-4  # adapters that do something


def test_the_gate_passes_with_trl(work: Work) -> None:
    pytest.importorskip("trl")
    gate = check(work)
    assert gate.same_rows
    assert gate.failures() == []


def test_a_gate_names_what_fails() -> None:
    fine = Gate(
        dict.fromkeys(LIMITS, 0.0), trl_loss=0.0, same_rows=True, loss=0.5, attention="sdpa"
    )
    assert fine.failures() == []
    assert len(replace(fine, fp64=fine.fp64 | {"grads": float("nan")}).failures()) == 1
    assert len(replace(fine, trl_loss=1e-3, same_rows=False).failures()) == 2


def test_the_released_rejected_term_is_not_dpo(work: Work) -> None:
    model, pairs = stirred(work)
    released, dpo = (pair_loss(model, pairs[0], true_dpo=true).item() for true in (False, True))
    assert released != pytest.approx(dpo, abs=1e-6)


def test_rejected_labels_by_hand() -> None:
    logits_TV = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0]])
    # The first label is the model's own first choice, so the second choice stands in; the other is not.
    assert rejected_labels(logits_TV, torch.tensor([1, 0])).tolist() == [2, 1]


def test_row_logps_by_hand() -> None:
    """Two tokens a row, the second a response: uniform over a vocabulary of 4 but for one logit of log 5."""
    logits_WTV = torch.zeros(2, 2, 4)
    logits_WTV[1, 0, 3] = math.log(5)
    ids_WT = torch.tensor([[0, 1], [0, 2]])
    response_WT = torch.tensor([[False, True], [False, True]])
    chosen, rejected = row_logps(logits_WTV, ids_WT, response_WT, true_dpo=True).exp().tolist()
    assert (chosen, rejected) == pytest.approx((1 / 4, 1 / 8))
    _, rejected = row_logps(logits_WTV, ids_WT, response_WT, true_dpo=False).exp().tolist()
    assert rejected == pytest.approx(5 / 8)  # the model's favourite


def test_figures_by_hand() -> None:
    ours = trial("ours", reference=1.0, epochs=[2.0, 2.0, 1.0], peak=300)
    trl = trial("trl", reference=None, epochs=[4.0, 4.0, 4.0], peak=500)
    released = trial("released", reference=None, epochs=[6.0, 6.0, 6.0], peak=600)
    assert cost(ours, "cpu_s", 3) == 6.0
    repeats = [{"ours": ours, "trl": trl, "released": released}]
    lengths = [Lengths(10, 3, 4), Lengths(10, 3, 4)]
    found = figures(repeats, Shapes(), lengths, "cpu_s", peak_flops=1e12)
    assert found["speedup_vs_trl"] == 2.0
    assert found["speedup_vs_sima"] == 3.0
    assert found["one_epoch_speedup_vs_trl"] == pytest.approx(4 / 3)
    assert found["steps_speedup_vs_trl"] == pytest.approx(12 / 5)
    assert found["memory_vs_trl"] == 0.6
    assert found["working_memory_vs_trl"] == 0.5
    assert found["reference_share"] == pytest.approx(1 / 6)
    assert found["trainers"]["ours"]["cpu_s_per_pair"]["median"] == 1.0  # 6 over 2 pairs × 3 epochs
    assert found["trainers"]["trl"]["tokens_per_s"]["median"] == 3 * 2 * 27 / 24
    assert "speedup_vs_trl" in table(found)


def test_flops_by_hand() -> None:
    """One layer of width 1 (query, key, value, output: 1 parameter each; MLP: 6), a head of 1; prompt 2,
    responses 2 and 1. The first token of the prompt is not read in the last layer, which is the only one."""
    shapes: Any = replace(Shapes(), text_width=1, text_inner=2, text_layers=1, vocabulary=1)
    n, pair = shapes.decoder_parameters, Lengths(2, 2, 1)
    plain_linear, plain_sees = 2 * n * 7 + 2 * 3, (16 + 9) / 2
    forward, backward = plain_linear + 4 * plain_sees, plain_linear + 8 * plain_sees
    assert run_flops(shapes, pair, 2, shared=False) == 2 * (2 * forward + backward)
    shared_linear, shared_sees = 2 * (10 + 2 + 10) + 2 * 3, 2 + 2 * 1 + 1 / 2 - 1 / 2
    forward, backward = shared_linear + 4 * shared_sees, shared_linear + 8 * shared_sees
    assert run_flops(shapes, pair, 2, shared=True) == 2 * (forward + backward) + forward


def test_a_clock_counts_what_lies_within() -> None:
    clock = Clock("cpu")
    for _ in range(2):
        with clock.lap("epoch"):
            sum(range(10_000))
    laps = clock.laps["epoch"]
    assert len(laps) == 2
    assert all(lap.wall_s > 0 and lap.cpu_s >= 0 for lap in laps)


def test_memory_now_is_below_the_peak() -> None:
    now, peak = memory("cpu")
    assert 0 < now <= peak


def test_the_shapes_of_7b_are_llavas() -> None:
    shapes, small = SHAPES["7b"], SHAPES["small"]
    assert shapes.decoder_parameters == 6_476_005_376  # Llama-7B's linear layers
    assert for_gate(shapes).text_layers == 2
    assert for_gate(small) == replace(small, pairs=2)
    assert Work(Path(), shapes, "cuda", 3, 0).training().accelerator == "gpu"

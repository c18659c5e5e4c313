"""In bfloat16, rows that share their prompt learn as plain rows do: the curves differ by rounding alone.

What rounding makes of a run is measured: runs whose batches are cut into other micro batches add the same numbers
in another order, and their losses drift apart over the steps. Runs with shared rows may on average be no further
from the plain runs than half as much again as these are from each other; a single run may stray, of either kind,
which is why there are several of both. That this can fail is shown by shared rows whose second response also sees
the first.
"""

from collections.abc import Iterable
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from easy_pairs import easy_pairs, write_pairs
from one_worker import one_worker, tuned_by
from torch import Tensor

from sima_ray.tuning import attention
from sima_ray.tuning.forward import PairForward, concatenated
from sima_ray.tuning.shared import shared

STEPS = 50
SLACK = 1.5
CONFIG: dict[str, Any] = {
    "learning_rate": 2e-3,
    "epochs": 25,
    "batch_size": 8,
    "max_tokens": 512,
    "dtype": "bfloat16",
    "lora": {"r": 4, "alpha": 8},
    "zero_stage": 2,
}


class Curves:
    """Runs that differ by how pairs are scored and by how batches are cut."""

    def __init__(self, model: Path, folder: Path) -> None:
        pairs = easy_pairs(folder / "images", 16)
        self._folder = folder
        self._job = {
            "model": str(model),
            "pairs": write_pairs(pairs, folder / "pairs.parquet"),
            "images": str(folder / "images"),
            "seed": 3,
        }

    def run(self, name: str, forward: PairForward, micro_batch_size: int) -> Tensor:
        """The loss of every step, from a reference pass of its own on."""
        job = self._job | {"references": str(self._folder / f"{name}.parquet")}
        config = CONFIG | {"micro_batch_size": micro_batch_size}
        _, losses = tuned_by(job, config, forward)
        assert len(losses) == STEPS
        return torch.tensor(losses, dtype=torch.float64)


def distance(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Between two curves: the mean over the steps, and the largest."""
    apart = (one - other).abs()
    return float(apart.mean()), float(apart.max())


def typical(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """The averages of both distances over some pairs of curves."""
    means, largest = zip(*(distance(*pair) for pair in pairs), strict=True)
    return fmean(means), fmean(largest)


def test_shared_rows_learn_within_the_spread_of_plain_runs(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with one_worker(tmp_path):
        curves = Curves(tiny_llava, tmp_path)
        plain = [curves.run(f"plain-{size}", concatenated, size) for size in (8, 4, 2, 1)]
        ours = [curves.run(f"shared-{size}", shared, size) for size in (8, 4)]
        monkeypatch.setattr(attention, "visible", whatever_stands_before)
        wrong = curves.run("wrong", shared, 8)
    spread = typical(combinations(plain, 2))
    found = typical(product(ours, plain))
    leaking = typical(product([wrong], plain))
    for name, (mean, largest) in (("plain", spread), ("shared", found), ("leaking", leaking)):
        print(f"{name:<8} from plain runs: mean {mean:.1e}, at most {largest:.1e}")
    assert plain[0][-5:].mean() < plain[0][0] - 0.4  # they learn
    for ours_apart, plain_apart, wrong_apart in zip(found, spread, leaking, strict=True):
        assert 0 < ours_apart <= SLACK * plain_apart
        assert wrong_apart > 5 * plain_apart


def whatever_stands_before(segments_BT: Tensor) -> Any:
    """A mask gone wrong: a response sees the one before it."""

    def sees(row: Any, head: Any, q: Any, kv: Any) -> Tensor:
        return (kv <= q) & (segments_BT[row, kv] != attention.PADDING)

    return sees

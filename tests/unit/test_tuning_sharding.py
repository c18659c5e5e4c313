"""What sharing a model out relies on; the workers that do it are in tests/cluster/test_tuning_workers.py."""

from pathlib import Path

import pytest

from sima_ray.policy.checkpoint import load_policy

MAPS = Path("/proc/self/maps")


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux's /proc")
def test_weights_in_the_precision_of_their_files_stay_there_until_they_are_read(tiny_llava: Path):
    def mapped(dtype: str) -> set[bool]:
        model, _ = load_policy(tiny_llava, dtype)
        spans = [
            tuple(int(end, 16) for end in line.split()[0].split("-"))
            for line in MAPS.read_text().splitlines()
            if line.endswith(str(tiny_llava / "model.safetensors"))
        ]
        places = [weight.data_ptr() for weight in model.parameters()]
        return {any(start <= place < end for start, end in spans) for place in places}

    assert mapped("auto") == {True}
    assert mapped("float32") == {False}

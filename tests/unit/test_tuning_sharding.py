"""What sharing a model out relies on; the workers that do it are in tests/cluster/test_tuning_workers.py."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from sima_ray.errors import ModelError
from sima_ray.policy.checkpoint import load_policy, stored_dtype

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

    assert mapped(stored_dtype(tiny_llava)) == {True}
    assert mapped("float32") == {False}


def test_the_precision_is_that_of_the_files_whatever_the_config_says(
    tiny_llava: Path, tmp_path: Path
):
    folder = shutil.copytree(tiny_llava, tmp_path / "policy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert stored_dtype(folder) == "bfloat16"
    model, _ = load_policy(folder, stored_dtype(folder))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no floating-point weights"):
        stored_dtype(folder)

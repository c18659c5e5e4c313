"""A policy made deeper without changing what it computes: a larger model's cost a token, the small one's answers.

A layer that is added is a copy of one of the policy's own with its two output projections set to zero, so that it
adds nothing to what passes through it, and costs an engine what any layer costs.
"""

import json
import shutil
from pathlib import Path

from sima_ray.ports import JsonDict

LAYER = "language_model.model.layers.{}."
"""Of LLaVA-1.5's published names."""

OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def deepen(policy: Path, layers: int, folder: Path) -> Path:
    """Write the policy with so many layers in its language model.

    Args:
        policy: A LLaVA-1.5 in one file of weights.
        layers: At least as many as it has.
        folder: Made.

    Raises:
        ValueError: Fewer layers than it has.
    """
    import torch
    from safetensors.torch import load_file, save_file

    config: JsonDict = json.loads((policy / "config.json").read_text(encoding="utf-8"))
    own: int = config["text_config"]["num_hidden_layers"]
    if layers < own:
        raise ValueError(f"{policy} has {own} layers: it cannot be made {layers} deep")
    shutil.copytree(policy, folder)
    weights = load_file(policy / "model.safetensors")
    for layer in range(own, layers):
        copied, added = LAYER.format(layer % own), LAYER.format(layer)
        for name in [name for name in weights if name.startswith(copied)]:
            inside = name.removeprefix(copied)
            value = weights[name]
            weights[added + inside] = (
                torch.zeros_like(value) if inside in OUTPUTS else value.clone()
            )
    config["text_config"]["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder

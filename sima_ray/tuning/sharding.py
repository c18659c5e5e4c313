"""ZeRO 3 from the start: no worker ever holds a model's weights whole, on its GPU or in its own memory."""

from typing import Any

import torch
from torch import nn

from sima_ray.config import TrainingConfig
from sima_ray.tuning.engine import deepspeed_config, device_of, load_deepspeed
from sima_ray.tuning.forward import PairScorer, base_of
from sima_ray.tuning.limits import MOST_REDUCED


def shard(model: Any, config: TrainingConfig, rank: int, world: int) -> None:
    """Leave each worker its part of every weight, and put the buffers on its device; every worker must call this.

    One weight is whole at a time, rank 0's: the others take their parts of that. The files behind the weights are
    mapped and not read before, so that in a worker's own memory there is never more than that one either.

    Args:
        model: As it was loaded, in the precision of its files.
        config: Precision, accelerator, and where the parts are kept.
        rank, world: This worker, and how many there are.
    """
    deepspeed = load_deepspeed(config)
    dtype, device = getattr(torch, config.dtype), device_of(config)
    stored = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        # Others are computed as the model is made, in the precision that they need.
        cast = buffer.is_floating_point() and name in stored
        buffer.data = buffer.to(device, dtype if cast else buffer.dtype)
    shared: Any = None
    for weight in model.parameters():
        whole = {"dtype": dtype, "device": device}
        # A copy in any case: rank 0's is written over that of the others, and theirs may be a mapped file.
        weight.data = (
            weight.detach().to(**whole, copy=True).contiguous()
            if rank == 0
            else torch.empty(weight.shape, **whole)
        )
        if shared is None:
            settings = deepspeed_config(config, world, MOST_REDUCED)
            deepspeed.zero.Init(module=nn.ParameterList([weight]), config_dict_or_path=settings)
            shared = weight
        else:
            shared.convert_to_zero_parameters(param_list=[weight])


def gather_throughout(scorer: PairScorer) -> None:
    """Let some weights be whole as long as a scorer computes, and not only while a module of theirs does.

    The head computes as often as there are chunks of logits, which is not equally often on all workers, as any
    gathering must be; the weights of the model itself are used by methods that are not its forward pass.
    """
    import deepspeed

    model = base_of(scorer.model)
    backbone = getattr(model, model.base_model_prefix)
    for weight in [
        *model.get_output_embeddings().parameters(),
        *backbone.parameters(recurse=False),
    ]:
        deepspeed.zero.register_external_parameter(scorer, weight)

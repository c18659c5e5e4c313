"""The optimizer's numbers by parameter, whole and in float32, wherever an engine keeps them.

Each ZeRO stage keeps weights and moments in another place, flat and shared over the workers. Here they are read
and written as if there were one worker and no ZeRO, so that what one engine saved another takes up: at another
number of workers, in another stage.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sima_ray.tuning.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's, by their names in its state."""


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """What Adam knows, whole.

    Attributes:
        weights, exp_avg, exp_avg_sq: By parameter name, float32, on the CPU; the weights unrounded.
        updates: How many were made.
    """

    weights: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    updates: int


def read_optimizer(engine: Engine, parameters: dict[str, nn.Parameter]) -> OptimizerState:
    """Gather the state; every worker must call this, after the first update or a write.

    Args:
        engine: In any stage.
        parameters: The trained ones by name, in one order on all workers.
    """
    found: dict[str, dict[str, Tensor]] = {name: {} for name in ("weights", *MOMENTS)}
    if engine.zero_optimization():
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in parameters.items():
            found["weights"][name] = _copied(safe_get_full_fp32_param(parameter))
            for key in MOMENTS:
                found[key][name] = _copied(safe_get_full_optimizer_state(parameter, key))
    else:
        names = {id(parameter): name for name, parameter in parameters.items()}
        for parameter, weights, state in _unshared(engine):
            name = names[id(parameter)]
            found["weights"][name] = _copied(weights)
            for key in MOMENTS:
                found[key][name] = _copied(state[key])
    return OptimizerState(**found, updates=_updates(engine))


def write_optimizer(
    engine: Engine, parameters: dict[str, nn.Parameter], state: OptimizerState
) -> None:
    """Take up a state, the model's weights included; every worker must call this with the same one."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    _make_states(engine, state.updates)
    device = engine.device
    if engine.zero_optimization():
        _link(engine)
        for name, parameter in parameters.items():
            safe_set_full_fp32_param(parameter, state.weights[name].to(device))
            for key in MOMENTS:
                whole = getattr(state, key)[name].to(device)
                safe_set_full_optimizer_state(parameter, whole, key)
    else:
        names = {id(parameter): name for name, parameter in parameters.items()}
        for parameter, weights, moments in _unshared(engine):
            name = names[id(parameter)]
            weights.data.copy_(state.weights[name])
            for key in MOMENTS:
                moments[key].copy_(getattr(state, key)[name])
    with (
        torch.no_grad(),
        deepspeed.zero.GatheredParameters(
            list(parameters.values()),
            modifier_rank=0,
            enabled=engine.zero_optimization_partition_weights(),
        ),
    ):
        for name, parameter in parameters.items():
            parameter.data.copy_(state.weights[name])
    _gather_small(engine)


def _base(engine: Engine) -> torch.optim.Optimizer:
    """The Adam within DeepSpeed's wrappers."""
    return engine.basic_optimizer


def _masters(engine: Engine) -> list[Tensor]:
    """This worker's float32 tensors, as Adam's state knows them."""
    stage3 = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    if stage3 is not None:  # the groups hold one of them at a time
        return list(stage3)
    return [tensor for group in _base(engine).param_groups for tensor in group["params"]]


def _make_states(engine: Engine, updates: int) -> None:
    """Adam makes its moments at its first update; here they are needed before."""
    for tensor in _masters(engine):
        state = _base(engine).state[tensor]
        state["step"] = torch.tensor(float(updates))
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(tensor)


def _updates(engine: Engine) -> int:
    return int(_base(engine).state[_masters(engine)[0]]["step"])


def _link(engine: Engine) -> None:
    """Stages 1 and 2 note at their first update where in the flat tensors a parameter's moments are."""
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()


def _gather_small(engine: Engine) -> None:
    """Stage 3 keeps small parameters whole on every worker; a change shares them out."""
    small = getattr(engine.optimizer, "persistent_parameters", None)
    if small:
        small[0].all_gather(small)


def _unshared(engine: Engine) -> Iterator[tuple[nn.Parameter, Tensor, dict[str, Any]]]:
    """Without ZeRO: each parameter with views of its float32 weights and moments."""
    state = _base(engine).state
    wrapper = engine.optimizer
    if not hasattr(wrapper, "fp16_groups"):  # float32: Adam has the parameters themselves
        for tensor in _masters(engine):
            yield tensor, tensor, state[tensor]  # pyright: ignore[reportReturnType]
        return
    flats = getattr(wrapper, "fp32_groups_flat", None)
    for group, parameters in enumerate(wrapper.fp16_groups):
        if flats is None:
            for parameter, weights in zip(parameters, wrapper.fp32_groups[group], strict=True):
                yield parameter, weights, state[weights]
            continue
        start = 0
        for parameter in parameters:
            part = slice(start, start := start + parameter.numel())
            moments = {key: state[flats[group]][key][part].view_as(parameter) for key in MOMENTS}
            yield parameter, flats[group].data[part].view_as(parameter), moments


def _copied(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.detach().float().cpu().clone()

"""Megatron's optimizers over torch's Adam, where Apex and Transformer Engine are not installed.

Megatron's loading of optimizer state is written for the Adam of those two. With torch's it misses
three things, which are supplied here: the state before a first step, the `step` of each parameter
when shards are filled in, and a `step` tensor of its own for every parameter (loaded, they share
one, and every parameter would count it up).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor


def initialise_adam(optimizer: MegatronOptimizer) -> None:
    """Create the state that torch's Adam would create in its first step, where there is none.

    Megatron describes what to load by the state that is there.
    """
    for part in _torch_adams(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                if "step" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict(state)`, for torch's Adam too."""
    parts = [
        part
        for part in _torch_adams(optimizer)
        if hasattr(part, "_set_main_param_and_optimizer_states")
    ]
    for part in parts:
        part._set_main_param_and_optimizer_states = functools.partial(
            _set_states_but_step, part, part._set_main_param_and_optimizer_states
        )
    try:
        optimizer.load_state_dict(state)
    finally:
        for part in parts:
            del part._set_main_param_and_optimizer_states
    for part in _torch_adams(optimizer):
        for parameter_state in part.optimizer.state.values():
            parameter_state["step"] = parameter_state["step"].clone()


def _torch_adams(optimizer: MegatronOptimizer) -> Iterator[Any]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            yield part


def _set_states_but_step(
    part: Any, set_states: Any, model_param: Tensor, tensors: dict[str, Tensor]
) -> None:
    group, order = part.model_param_group_index_map[model_param]
    main_param = part.optimizer.param_groups[group]["params"][order]
    # `step` is not stored per parameter: it came with the parameter groups and is already set.
    set_states(model_param, {"step": part.optimizer.state[main_param]["step"], **tensors})

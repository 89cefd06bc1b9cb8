"""flash-linear-attention's kernels on the CPU, by Triton's interpreter, in a process of its own.

What Triton's interpreter or a CPU does not have is given here, none of which is arithmetic: the
choice of a configuration by time, a device to be on, and a loop counter that is a Triton scalar.
"""

from __future__ import annotations

import builtins
import contextlib
import os
from collections.abc import Iterator
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton.language as tl
from triton.runtime.autotuner import Autotuner

from megatron_prefix.attention.delta_rule_check import rule_errors
from megatron_prefix.attention.delta_rules import FlashLinearAttentionRule

_init = Autotuner.__init__


def _first_configuration(
    self: Any, fn: Any, arg_names: Any, configs: Any, key: Any, *args: Any, **kwargs: Any
) -> None:
    known = [name for name in key if name in arg_names]
    _init(self, fn, arg_names, configs[:1], known, *args, **kwargs)


def _range(*bounds: Any) -> Iterator[Any]:
    return (tl.full((), i, tl.int32) for i in builtins.range(*map(int, bounds)))


Autotuner.__init__ = _first_configuration
torch.cpu.device = lambda index: contextlib.nullcontext()

from fla.ops.common import chunk_delta_h  # noqa: E402, it decorates with what was set above

chunk_delta_h.range = _range

# Triton's interpreter does not compute in bfloat16.
for name, tolerance in (("float32", 5e-6), ("float16", 3e-3)):
    errors = rule_errors(
        FlashLinearAttentionRule(),
        device=torch.device("cpu"),
        dtype=getattr(torch, name),
        num_heads=2,
        key_dim=16,
        value_dim=32,
    )
    assert max(errors.values()) <= tolerance, (name, errors)
    print(name, *(f"{what} {error:.1e}" for what, error in errors.items()), sep="; ")

"""Megatron's gated delta net, also where flash-linear-attention is not installed."""

from __future__ import annotations

import sys
from typing import Any

try:
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet
except ImportError:  # since 0.16
    GatedDeltaNet = None


def is_gated_delta_net(module: Any) -> bool:
    """Whether a class is Megatron's gated delta net."""
    return (
        GatedDeltaNet is not None and isinstance(module, type) and issubclass(module, GatedDeltaNet)
    )


def build_without_flash_linear_attention() -> None:
    """Let `GatedDeltaNet` be built where flash-linear-attention is missing, which it runs with.

    Ours runs batches with `PrefixPackedSeqParams` without it.
    """
    for base in GatedDeltaNet.__mro__:
        module = sys.modules[base.__module__]
        if hasattr(module, "HAVE_FLA"):
            module.HAVE_FLA = True


def have_flash_linear_attention() -> bool:
    """Whether Megatron found flash-linear-attention."""
    homes = (sys.modules[base.__module__] for base in GatedDeltaNet.__mro__)
    return any(getattr(home, "chunk_gated_delta_rule", None) is not None for home in homes)

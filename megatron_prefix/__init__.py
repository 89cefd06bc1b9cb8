"""GRPO on Megatron-Core with the prompt of each group computed once, exactly.

    prefix_grouped              any layer spec, taught to share prefixes
    prefix_grouped_layer_spec   a ready layer spec
    PrefixTree, pack            from token lists to a packed row
    PrefixPackedSeqParams       what such a row's batch carries through GPTModel

Names are imported when first used, so that importing the package loads neither torch nor Megatron.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "PrefixPackedSeqParams": "megatron_prefix.layers.packed_seq_params",
    "PrefixTree": "megatron_prefix.layout",
    "pack": "megatron_prefix.layout",
    "prefix_grouped": "megatron_prefix.layer_spec",
    "prefix_grouped_layer_spec": "megatron_prefix.layer_spec",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__

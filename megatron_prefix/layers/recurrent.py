"""Layers that would take a packed row for one sequence, and are refused."""

from __future__ import annotations

from typing import Any, NoReturn

from megatron_prefix.layers.subclass import prefix_subclass


class _RefusedRecurrentLayer:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        refuse_recurrent_layer(type(self).__mro__[2])


def refused_recurrent_layer(base: type) -> type:
    """A subclass that cannot be built, and says why."""
    return prefix_subclass(_RefusedRecurrentLayer, base)


def refuse_recurrent_layer(layer: type) -> NoReturn:
    """Say why a class of layers cannot share prefixes."""
    raise ValueError(
        f"{layer.__name__} cannot be combined with shared prefixes: its state would run through a "
        "packed row as if this were one sequence. Use a model whose layers all have softmax "
        "attention, or a HybridModel of prefix_hybrid_model (megatron-core 0.18 or newer)"
    )

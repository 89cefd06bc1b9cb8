"""Megatron's HybridModel, whose layers are named by a pattern, with shared prefixes.

`prefix_hybrid_model(HybridModel)` is built with a stack spec that went through `prefix_grouped`.
Layers of kinds that cannot share prefixes are refused by their place in the pattern.
"""

from __future__ import annotations

from typing import Any

from megatron_prefix.attention.layer_kinds import hybrid_layers, set_hybrid_pattern
from megatron_prefix.layers.router import has_statistics
from megatron_prefix.layers.subclass import prefix_subclass
from megatron_prefix.layout.hybrid_pattern import faults_of_pattern, first_trimmed, layers_of
from megatron_prefix.megatron.hybrid_model import HybridModel, require_hybrid_model


class _PrefixHybridStack:
    """A stack whose last layers leave rows out that nothing depends on."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if not hybrid_layers(config):
            raise ValueError(
                "a stack of prefix_grouped needs the pattern of the whole model: build "
                "prefix_hybrid_model(HybridModel) with it"
            )
        super().__init__(config, *args, **kwargs)
        trimmed = len(self.layers)
        if self.post_process:
            kinds = "".join(self.layer_type_list)
            trimmed = first_trimmed(kinds, experts_collect=has_statistics(config))
        for index, layer in enumerate(self.layers):
            layer.prefix_trimming = (
                "before" if index < trimmed else "here" if index == trimmed else "behind"
            )


class _PrefixHybridModel:
    """A HybridModel that says on its config which layers it has."""

    def __init__(
        self,
        config: Any,
        hybrid_stack_spec: Any,
        *args: Any,
        hybrid_layer_pattern: str | None = None,
        **kwargs: Any,
    ) -> None:
        if hybrid_layer_pattern is None:
            raise ValueError("hybrid_layer_pattern: give it by name; it is missing")
        if faults := "; ".join(faults_of_pattern(hybrid_layer_pattern)):
            raise ValueError(f"hybrid_layer_pattern: {hybrid_layer_pattern!r}: {faults}")
        if config.num_layers != len(layers_of(hybrid_layer_pattern)):
            raise ValueError(
                f"hybrid_layer_pattern: {hybrid_layer_pattern!r} has "
                f"{len(layers_of(hybrid_layer_pattern))} layers, and num_layers is "
                f"{config.num_layers}: set it so"
            )
        if not issubclass(hybrid_stack_spec.module, _PrefixHybridStack):
            raise ValueError(
                f"hybrid_stack_spec: {hybrid_stack_spec.module.__name__} cannot share prefixes; "
                "pass prefix_grouped(hybrid_stack_spec)"
            )
        set_hybrid_pattern(config, hybrid_layer_pattern)
        super().__init__(
            config,
            hybrid_stack_spec,
            *args,
            hybrid_layer_pattern=hybrid_layer_pattern,
            **kwargs,
        )


def prefix_hybrid_stack(base: type) -> type:
    """The subclass of a class of Megatron's hybrid stacks that takes shared prefixes.

    A class that already is one is returned as it is.
    """
    return prefix_subclass(_PrefixHybridStack, base)


def prefix_hybrid_model(base: type | None = None) -> type:
    """The subclass of a HybridModel class that takes shared prefixes.

    A class that already is one is returned as it is.

    Args:
        base: None: Megatron's own.

    Raises:
        ValueError: the release has none.
    """
    require_hybrid_model()
    return prefix_subclass(_PrefixHybridModel, base or HybridModel)

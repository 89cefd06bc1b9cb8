"""Our layer spec in the model that verl builds, whichever of its two bridges builds it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.transformer.attention import Attention

from megatron_prefix.layer_spec import prefix_grouped
from megatron_prefix.layers.attention import takes_shared_prefixes
from megatron_prefix.layers.built_model import refuse_mrope


def share_prefixes_in_mbridge(bridge: Any) -> None:
    """Let a bridge of mbridge build layers that take shared prefixes.

    Args:
        bridge: mbridge's, before it has built the model.
    """
    # An instance attribute comes before the class's method.
    bridge._get_transformer_layer_spec = _grouped(bridge._get_transformer_layer_spec)


def share_prefixes_in_provider(provider: Any) -> None:
    """Let a model provider of Megatron-Bridge build layers that take shared prefixes.

    Args:
        provider: Megatron-Bridge's, before it has built the model. Its `transformer_layer_spec` is
            a layer spec, or a function that returns one.
    """
    spec = provider.transformer_layer_spec
    provider.transformer_layer_spec = _grouped(spec) if callable(spec) else prefix_grouped(spec)


def _grouped(make_spec: Any) -> Any:
    """The function, with a spec that takes shared prefixes for what it returns."""

    # Megatron-Bridge asks for the signature; `wraps` keeps it.
    @functools.wraps(make_spec)
    def make(*args: Any, **kwargs: Any) -> Any:
        return prefix_grouped(make_spec(*args, **kwargs))

    return make


def refuse_other_layers(chunk: torch.nn.Module) -> None:
    """Refuse a model with attention that does not come from our spec.

    Args:
        chunk: of the model.

    Raises:
        ValueError: naming the layer's class, or the model's kind of positions.
    """
    refuse_mrope(chunk)
    for name, module in chunk.named_modules():
        if isinstance(module, Attention) and not takes_shared_prefixes(module.core_attention):
            raise ValueError(
                f"{name} has a {type(module.core_attention).__name__}, which the bridge has not "
                "taken from our layer spec, not with shared prefixes: leave attention_backend as "
                "verl sets it, or take a model whose bridge builds a GPTModel from a layer spec"
            )

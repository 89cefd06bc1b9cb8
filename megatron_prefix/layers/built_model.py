"""Layers of a model that is built already, taught to share prefixes.

`prefix_grouped` rewrites the spec that a model is built from. A framework that builds the model
itself hands over the model instead.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from megatron_prefix.layers.attention import RopeTable, share_in_self_attention
from megatron_prefix.layers.last_layer import prefix_transformer_layer
from megatron_prefix.layers.recurrent import refuse_recurrent_layer
from megatron_prefix.megatron.options import refuse_unsupported
from megatron_prefix.megatron.recurrent_layers import RECURRENT_LAYERS


def share_in_layers(model: nn.Module, config: Any, *, rope_table: RopeTable | None = None) -> None:
    """Give every decoder layer of a built model the subclass of its own class that shares prefixes.

    Parameters, checkpoint keys and behaviour stay as they are, until a batch carries
    `PrefixPackedSeqParams`. Layers that can share already are left alone.

    Args:
        model: a GPTModel, or a part of it.
        config: its `TransformerConfig`.
        rope_table: that the model gives to its layers; None: one of Megatron's own.

    Raises:
        ValueError: an option or a layer that cannot share prefixes, by name.
    """
    refuse_unsupported(config)
    refuse_mrope(model)
    layers = list(model.modules())
    for layer in layers:
        if isinstance(layer, RECURRENT_LAYERS):
            refuse_recurrent_layer(type(layer))
        if isinstance(layer, TransformerLayer) and not isinstance(
            layer.self_attention, (SelfAttention, MLASelfAttention)
        ):
            raise ValueError(
                f"layer {layer.layer_number} has {type(layer.self_attention).__name__} for its "
                "self attention, which cannot share prefixes. Use a model whose layers all have "
                "Megatron's SelfAttention or MLASelfAttention"
            )
    for layer in layers:
        if isinstance(layer, TransformerLayer):
            layer.__class__ = prefix_transformer_layer(type(layer))
            share_in_self_attention(layer.self_attention, rope_table=rope_table)


def refuse_mrope(model: nn.Module) -> None:
    """Raise a ValueError if the prefixes of this model's rows are not found by tokens alone.

    Args:
        model: a GPTModel, or a module around one.
    """
    for module in model.modules():
        if getattr(module, "position_embedding_type", None) == "mrope":
            raise ValueError(
                "position_embedding_type='mrope': images that have the same placeholder tokens "
                "would be taken for one image. Run this model without shared prefixes, or pack its "
                "rows yourself, with PrefixPackedSeqParams.from_layout(mrope_positions=...)"
            )

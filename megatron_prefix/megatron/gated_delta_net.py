"""Megatron's gated delta net, also where flash-linear-attention is not installed."""

from __future__ import annotations

import copy
import dataclasses
import sys
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_prefix.attention.layer_kinds import hybrid_layers
from megatron_prefix.layout.hybrid_pattern import ATTENTION, GATED_DELTA_NET

try:
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as variants
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
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


def delta_net_layers(config: Any) -> tuple[bool, ...]:
    """[num_layers] whether each layer is a gated delta net; () if none is.

    Args:
        config: Megatron's `TransformerConfig`.
    """
    if kinds := hybrid_layers(config):
        found = tuple(kind == GATED_DELTA_NET for kind in kinds)
        return found if any(found) else ()
    if getattr(config, "experimental_attention_variant", None) != "gated_delta_net":
        return ()
    every = config.linear_attention_freq
    if isinstance(every, int):
        return tuple((layer + 1) % every != 0 for layer in range(config.num_layers))
    return tuple(bool(entry) for entry in every)


def attending_layers(config: Any) -> tuple[bool, ...]:
    """[num_layers] whether each layer has softmax attention.

    Args:
        config: Megatron's `TransformerConfig`.
    """
    if kinds := hybrid_layers(config):
        return tuple(kind == ATTENTION for kind in kinds)
    recurrent = delta_net_layers(config) or (False,) * config.num_layers
    return tuple(not is_recurrent for is_recurrent in recurrent)


def hybrid_block_spec(
    config: Any, *, use_transformer_engine: bool, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The spec of this rank's layers of a GPTModel with gated delta nets.

    Megatron makes one for Transformer Engine only. The other one is made here: its local spec, with
    a gated delta net of the same linear layers and norms where the config says so.
    """
    build_without_flash_linear_attention()
    if use_transformer_engine:
        return variants.get_transformer_block_with_experimental_attention_variant_spec(
            config, vp_stage=vp_stage
        )
    # Asked for gated delta nets, newer releases make no local spec.
    plain = copy.copy(config)
    plain.experimental_attention_variant = None
    block = get_gpt_decoder_block_spec(plain, use_transformer_engine=False, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    kinds = delta_net_layers(config)[first:]
    layers = [
        local_recurrent_layer(layer, config) if recurrent else layer
        for layer, recurrent in zip(block.layer_specs, kinds, strict=False)
    ]
    return dataclasses.replace(block, layer_specs=layers)


def local_recurrent_layer(layer: ModuleSpec, config: Any) -> ModuleSpec:
    """A local layer spec with a gated delta net in place of its self attention."""
    local = LocalSpecProvider()
    layer = copy.deepcopy(layer)
    layer.submodules.self_attention = ModuleSpec(
        module=GatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=local.column_parallel_linear(),
            out_norm=local.layer_norm(rms_norm=config.normalization == "RMSNorm", for_qk=False),
            out_proj=local.row_parallel_linear(),
        ),
    )
    # As Transformer Engine's layer, which holds the norm too, stores it.
    layer.submodules.sharded_state_dict_keys_map = {
        **layer.submodules.sharded_state_dict_keys_map,
        "input_layernorm.": "self_attention.in_proj.layer_norm_",
    }
    return layer

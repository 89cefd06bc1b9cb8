"""Layer specs whose attention takes shared prefixes.

`prefix_grouped(spec)` rewrites any Megatron-Core spec; `prefix_grouped_layer_spec` is a ready one
for Megatron-LM's `--spec megatron_prefix.layer_spec prefix_grouped_layer_spec`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any, TypeVar

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module, get_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, TransformerLayer

from megatron_prefix.layers.attention import prefix_core_attention, prefix_self_attention
from megatron_prefix.layers.gated_delta_net import prefix_gated_delta_net
from megatron_prefix.layers.hybrid import prefix_hybrid_stack
from megatron_prefix.layers.last_layer import prefix_transformer_layer
from megatron_prefix.layers.latent_attention import prefix_latent_attention
from megatron_prefix.layers.mamba import prefix_mamba_layer, prefix_mamba_mixer
from megatron_prefix.layers.predicting_model import is_prediction_layer, prefix_prediction_layer
from megatron_prefix.layers.recurrent import refused_recurrent_layer
from megatron_prefix.megatron.gated_delta_net import is_gated_delta_net
from megatron_prefix.megatron.hybrid_model import is_hybrid_stack
from megatron_prefix.megatron.latent_attention import (
    build_without_transformer_engine,
    is_latent,
    local_latent_core,
)
from megatron_prefix.megatron.mamba import is_mamba_layer, is_mamba_mixer
from megatron_prefix.megatron.norms import IN_PLACE_OF, use_in_blocks
from megatron_prefix.megatron.recurrent_layers import RECURRENT_LAYERS
from megatron_prefix.megatron.releases import have_transformer_engine

Spec = TypeVar("Spec")


def prefix_grouped(spec: Spec) -> Spec:
    """A copy of a Megatron-Core spec in which self attention takes shared prefixes.

    Args:
        spec: a layer `ModuleSpec`, `TransformerBlockSubmodules`, the spec of an MTP block (for
            `prefix_gpt_model`) or of a HybridModel's stack (for `prefix_hybrid_model`), or any
            dataclass of specs (local, Transformer Engine, MoE, heterogeneous). It is not changed.

    Returns:
        The same structure with every `SelfAttention`, `MLASelfAttention`, `GatedDeltaNet` and
        `MambaMixer`, their core attention and their layer replaced by subclasses of themselves;
        everything else as it was. Torch's norms also take sequence parallelism, and Apex's give way
        to them for RMSNorm and on the CPU.

    Raises:
        ValueError: the spec has no self attention that can share prefixes. (Mamba's layers beside
            it are refused before megatron-core 0.18, where one is built: a spec of a hybrid model
            names them whether the model has any or not.)
    """
    grouped, found = _rewrite(copy.deepcopy(spec))
    if not found:
        raise ValueError(
            f"prefix_grouped: no self attention in this spec ({spec!r:.200}). Pass a "
            "GPT layer or block spec, or that of a HybridModel's stack"
        )
    return grouped


def _rewrite(spec: Any) -> tuple[Any, bool]:
    """The rewritten spec, and whether a self attention was found in it."""
    if isinstance(spec, functools.partial):
        keywords, found = _rewrite(dict(spec.keywords))
        function = IN_PLACE_OF.get(spec.func, spec.func)
        return functools.partial(function, *spec.args, **keywords), found
    if isinstance(spec, ModuleSpec):
        return _rewrite_module_spec(spec)
    if isinstance(spec, type) and spec in IN_PLACE_OF:
        return IN_PLACE_OF[spec], False
    if isinstance(spec, (list, tuple)):
        parts = [_rewrite(part) for part in spec]
        return type(spec)(part for part, _ in parts), any(found for _, found in parts)
    if isinstance(spec, dict):
        parts = {key: _rewrite(part) for key, part in spec.items()}
        return {k: part for k, (part, _) in parts.items()}, any(f for _, f in parts.values())
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        found_any = False
        for field in dataclasses.fields(spec):
            part, found = _rewrite(getattr(spec, field.name))
            setattr(spec, field.name, part)
            found_any = found_any or found
        return spec, found_any
    return spec, False


def _rewrite_module_spec(spec: ModuleSpec) -> tuple[ModuleSpec, bool]:
    spec.submodules, found = _rewrite(spec.submodules)
    module = get_module(spec)
    if is_hybrid_stack(module):
        spec.module = prefix_hybrid_stack(module)
        for layer in (spec.submodules.mlp_layer, spec.submodules.moe_layer):
            if isinstance(layer, ModuleSpec):
                layer.module = prefix_transformer_layer(get_module(layer))
        return spec, found
    if is_gated_delta_net(module):
        spec.module = prefix_gated_delta_net(module)
        return spec, True
    if is_mamba_mixer(module):
        spec.module = prefix_mamba_mixer(module)
        return spec, True
    if found and is_mamba_layer(module):
        spec.module = prefix_mamba_layer(module)
        return spec, True
    if isinstance(module, type) and issubclass(module, RECURRENT_LAYERS):
        spec.module = refused_recurrent_layer(module)
        return spec, found
    if found and is_prediction_layer(module):
        spec.module = prefix_prediction_layer(module)
        return spec, True
    if found and isinstance(module, type) and issubclass(module, TransformerLayer):
        spec.module = prefix_transformer_layer(module)
        return spec, True
    if is_latent(module):
        build_without_transformer_engine()
        submodules = spec.submodules
        assert isinstance(submodules, MLASelfAttentionSubmodules)
        spec.module = prefix_latent_attention(module)
        submodules.core_attention = _prefix_core(local_latent_core(submodules.core_attention))
        return spec, True
    if isinstance(module, type) and issubclass(module, SelfAttention):
        submodules = spec.submodules
        assert isinstance(submodules, SelfAttentionSubmodules)
        spec.module = prefix_self_attention(module)
        submodules.core_attention = _prefix_core(submodules.core_attention)
        return spec, True
    return spec, found


def _prefix_core(core: Any) -> Any:
    if isinstance(core, ModuleSpec):
        core.module = prefix_core_attention(get_module(core))
        return core
    return prefix_core_attention(get_module(core))


class PrefixTransformerLayer(BaseTransformerLayer):
    """Builds the decoder layer that the config asks for, with shared prefixes.

    Transformer Engine's layer where it is installed, else the local one; QK norm, normalization
    and experts as the config says. It exists for frameworks that name a spec before there is a
    config, such as Megatron-LM's `--spec`.
    """

    def __new__(cls, config: TransformerConfig, *args: Any, **kwargs: Any) -> Any:
        """Return a Megatron `TransformerLayer`, built from the config's own spec."""
        if config.num_moe_experts is not None and config.moe_layer_freq != 1:
            raise ValueError(
                f"moe_layer_freq={config.moe_layer_freq!r} mixes dense and expert layers, which "
                "one layer spec cannot say: use "
                "prefix_grouped(get_gpt_decoder_block_spec(config, ...))"
            )
        options = {"num_experts": config.num_moe_experts, "qk_layernorm": config.qk_layernorm}
        if have_transformer_engine():
            spec = get_gpt_layer_with_transformer_engine_spec(
                **options, moe_grouped_gemm=config.moe_grouped_gemm
            )
        else:
            spec = get_gpt_layer_local_spec(**options, normalization=config.normalization)
        kwargs.pop("submodules", None)
        return build_module(prefix_grouped(spec), config, *args, **kwargs)


use_in_blocks()

prefix_grouped_layer_spec = ModuleSpec(module=PrefixTransformerLayer)
"""A layer spec for `--spec megatron_prefix.layer_spec prefix_grouped_layer_spec`."""

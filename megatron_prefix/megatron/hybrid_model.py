"""Megatron's HybridModel (0.18 and newer), also where Transformer Engine is not installed.

Its stack of layers has Transformer Engine's norm behind the last one, and the spec that Megatron
ships names Transformer Engine's modules. `hybrid_stack_spec` is that spec, or one of Megatron's
local layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_prefix.megatron.gated_delta_net import (
    build_without_flash_linear_attention,
    local_recurrent_layer,
)
from megatron_prefix.megatron.mamba import build_without_mamba_ssm, local_mamba_layer
from megatron_prefix.megatron.releases import release

try:
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel
except ImportError:  # since 0.18
    HybridModel = None
else:
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.transformer_layer import MoETransformerLayer

    @dataclass
    class LocalStackSubmodules(HybridStackSubmodules):
        """The layers of a stack, and the norm behind them."""

        final_norm: Any = IdentityOp

    class LocalHybridStack(HybridStack):
        """Megatron's stack with the norm of its spec, not Transformer Engine's."""

        def __init__(
            self, config: Any, submodules: Any, *, post_layer_norm: bool = True, **kwargs: Any
        ) -> None:
            super().__init__(config, submodules, post_layer_norm=False, **kwargs)
            self.post_layer_norm = post_layer_norm
            if self.post_process and post_layer_norm:
                self.final_norm = build_module(
                    submodules.final_norm,
                    config=config,
                    hidden_size=config.hidden_size,
                    eps=config.layernorm_epsilon,
                )


def require_hybrid_model() -> None:
    """Raise where the release has no HybridModel.

    Raises:
        ValueError: it names the release.
    """
    if HybridModel is None:
        raise ValueError(
            f"megatron-core {release()} has no HybridModel: install 0.18 or newer, or build a "
            "GPTModel, which has gated delta nets by experimental_attention_variant"
        )


def is_hybrid_stack(module: Any) -> bool:
    """Whether a spec's module is Megatron's stack of a HybridModel's layers."""
    return HybridModel is not None and isinstance(module, type) and issubclass(module, HybridStack)


def hybrid_stack_spec(config: Any, *, use_transformer_engine: bool) -> ModuleSpec:
    """The spec of a HybridModel's layers, as unmodified Megatron has them.

    Args:
        config: Megatron's `TransformerConfig`.
        use_transformer_engine: Megatron's own spec; else one of its local layers, of the same
            parameters and checkpoint keys.
    """
    require_hybrid_model()
    build_without_flash_linear_attention()
    build_without_mamba_ssm()
    if use_transformer_engine:
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

        return hybrid_stack_spec
    plain = get_gpt_layer_local_spec(normalization=config.normalization)
    attention = _mixing(plain, norm_of="self_attention.linear_qkv")
    recurrent = _mixing(local_recurrent_layer(plain, config), norm_of="self_attention.in_proj")
    experts = plain
    if config.num_moe_experts is not None:
        experts = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            normalization=config.normalization,
        )
    return ModuleSpec(
        module=LocalHybridStack,
        submodules=LocalStackSubmodules(
            mamba_layer=local_mamba_layer(plain, config),
            gdn_layer=recurrent,
            attention_layer=attention,
            mlp_layer=_by_token(plain, MLPLayer, norm_of="mlp.linear_fc1"),
            moe_layer=_by_token(experts, MoETransformerLayer),
            final_norm=plain.submodules.input_layernorm,
        ),
    )


def _mixing(layer: ModuleSpec, *, norm_of: str) -> ModuleSpec:
    """The attention of a GPTModel's layer as a layer of its own.

    Args:
        norm_of: the linear layer that Transformer Engine's spec has the norm in, by whose name it
            is stored.
    """
    whole = layer.submodules
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=whole.input_layernorm,
            self_attention=whole.self_attention,
            self_attn_bda=whole.self_attn_bda,
            sharded_state_dict_keys_map={"input_layernorm.": f"{norm_of}.layer_norm_"},
        ),
    )


def _by_token(layer: ModuleSpec, module: type, *, norm_of: str | None = None) -> ModuleSpec:
    """The MLP or the experts of a GPTModel's layer as a layer of their own.

    Args:
        norm_of: as for `_mixing`; None: the norm is stored by its own name.
    """
    whole = layer.submodules
    stored = {} if norm_of is None else {"pre_mlp_layernorm.": f"{norm_of}.layer_norm_"}
    return ModuleSpec(
        module=module,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=whole.pre_mlp_layernorm,
            mlp=whole.mlp,
            mlp_bda=whole.mlp_bda,
            sharded_state_dict_keys_map=stored,
        ),
    )

"""Megatron's multi-latent attention where Transformer Engine is not installed.

Its local layer spec names `DotProductAttention`, which no release from 0.14 to 0.19 can build for
it: the class takes no sizes of heads. Releases before 0.17 also compare with a class of Transformer
Engine that is not there.
"""

from __future__ import annotations

import copy
from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor
from torch.torch_version import TorchVersion

from megatron_prefix.megatron.releases import have_transformer_engine, release


class LatentDotProductAttention(DotProductAttention):
    """Megatron's dot-product attention for values of another size than keys.

    Its forward takes the sizes from the tensors; only the width of the output is taken from the
    config, as `kv_channels` of each head. `MLASelfAttention` names the sizes once more in
    `k_channels` and `v_channels`.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        of_values = copy.copy(config)
        of_values.kv_channels = config.v_head_dim
        kwargs = {k: v for k, v in kwargs.items() if k not in ("k_channels", "v_channels")}
        super().__init__(of_values, *args, **kwargs)
        self.config = config


def local_latent_core(core_attention: Any) -> Any:
    """The class that a layer spec names -> the one that multi-latent attention can build."""
    return LatentDotProductAttention if core_attention is DotProductAttention else core_attention


def complete_local_spec(block: Any) -> None:
    """Let a block spec of Megatron's own layers be built with multi-latent attention."""
    build_without_transformer_engine()
    for layer in block.layer_specs:
        submodules = layer.submodules.self_attention.submodules
        submodules.core_attention = local_latent_core(submodules.core_attention)


def build_without_transformer_engine() -> None:
    """Let `MLASelfAttention` be built where Transformer Engine is missing.

    Releases before 0.17 take a stand-in for the class that they could not import, and `isinstance`
    raises on it.
    """
    if not have_transformer_engine():
        multi_latent_attention.HAVE_TE = False


def known_projections() -> tuple[type, ...]:
    """The linear layers that are their weight, behind an RMSNorm where they hold its weight too."""
    if not have_transformer_engine():
        return (ColumnParallelLinear,)
    from megatron.core.extensions import transformer_engine as wrappers

    return (
        ColumnParallelLinear,
        wrappers.TEColumnParallelLinear,
        wrappers.TELayerNormColumnParallelLinear,
    )


def normalised(linear: Any, x: Tensor, config: Any) -> Tensor:
    """[n, in] what one of `known_projections` multiplies by its weight."""
    weight = getattr(linear, "layer_norm_weight", None)
    if weight is None:
        return x
    if config.layernorm_zero_centered_gamma:
        weight = weight + 1
    return F.rms_norm(x, x.shape[-1:], weight, config.layernorm_epsilon)


def returns_latents() -> bool:
    """Whether this release's `get_query_key_value_tensors` returns the latents too (since 0.16)."""
    return TorchVersion(release()) >= "0.16"


def is_latent(module: Any) -> bool:
    """Whether a class is Megatron's multi-latent self attention."""
    return isinstance(module, type) and issubclass(module, MLASelfAttention)

"""Megatron's norms where Transformer Engine is not installed, for what they refuse.

Its local specs name Apex's fused norm where Apex is installed, which has no RMSNorm and needs a
GPU, and else torch's norm, which refuses sequence parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.transformer import transformer_block
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class PrefixTorchNorm:
    """Megatron's `WrappedTorchNorm`, also under sequence parallelism.

    The weight is marked `sequence_parallel`, so that `finalize_model_grads` adds up the partial
    gradients of the ranks' sequence shards, as it does for Transformer Engine's norms.
    """

    def __new__(
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any
    ) -> torch.nn.Module:
        """Build the torch norm that `config.normalization` names."""
        classes = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        if config.normalization not in classes:
            raise ValueError(
                f"normalization={config.normalization!r} has no torch norm: use one of "
                f"{sorted(classes)}, or a Transformer Engine layer spec"
            )
        if config.memory_efficient_layer_norm:
            raise ValueError(
                "memory_efficient_layer_norm=True is not an option of torch's norms, which this "
                "model has: set it to False, or use a Transformer Engine layer spec"
            )
        norm = classes[config.normalization](hidden_size, eps=eps)
        if config.layernorm_zero_centered_gamma:
            norm.__class__ = _ZERO_CENTRED[config.normalization]
            torch.nn.init.zeros_(norm.weight)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class _ZeroCentredRMSNorm(torch.nn.RMSNorm):
    """The factor of each channel is 1 more than the weight."""

    def forward(self, x: Tensor) -> Tensor:
        """See `torch.nn.RMSNorm`."""
        return F.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


class _ZeroCentredLayerNorm(torch.nn.LayerNorm):
    """The factor of each channel is 1 more than the weight."""

    def forward(self, x: Tensor) -> Tensor:
        """See `torch.nn.LayerNorm`."""
        return F.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias, self.eps)


_ZERO_CENTRED = {"LayerNorm": _ZeroCentredLayerNorm, "RMSNorm": _ZeroCentredRMSNorm}


class PrefixFusedNorm:
    """Apex's `FusedLayerNorm` where it can run, else `PrefixTorchNorm`."""

    def __new__(
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any
    ) -> torch.nn.Module:
        """Build the norm that `config.normalization` names, for the model's device."""
        if config.normalization == "LayerNorm" and not config.use_cpu_initialization:
            return FusedLayerNorm(config, hidden_size, eps=eps, **kwargs)
        return PrefixTorchNorm(config, hidden_size, eps=eps, **kwargs)


IN_PLACE_OF: dict[Any, type] = {WrappedTorchNorm: PrefixTorchNorm, FusedLayerNorm: PrefixFusedNorm}
"""Norms that a spec may name -> what builds these, and what they refuse."""


def use_in_blocks() -> None:
    """Let blocks that are built from a layer's spec alone have our norm as their last one.

    Such a block takes its last norm from a name in Megatron's module, and no spec says another.
    What Megatron's own norm can be built for is built as before.
    """
    norm = transformer_block.LayerNormImpl
    transformer_block.LayerNormImpl = IN_PLACE_OF.get(norm, norm)

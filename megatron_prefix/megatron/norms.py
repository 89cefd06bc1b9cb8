"""Megatron's torch norm where Megatron refuses it: under sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


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
        for option in ("layernorm_zero_centered_gamma", "memory_efficient_layer_norm"):
            if getattr(config, option):
                raise ValueError(
                    f"{option}=True needs Transformer Engine's norm: set it to False, or use a "
                    "Transformer Engine layer spec"
                )
        norm = classes[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

"""Zero-centred norms, which Megatron's own norms on the CPU are not, written out.

`layernorm_zero_centered_gamma`: the factor of each channel is 1 more than the weight. Megatron's
norms of Transformer Engine and Apex have it, torch's do not.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import transformer_block
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor


class ZeroCentredNorm(torch.nn.Module):
    """LayerNorm (arXiv 1607.06450), or RMSNorm (arXiv 1910.07467) without mean and bias."""

    def __init__(self, size: int, eps: float, *, rms: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size))
        self.bias = None if rms else torch.nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] of [..., size]."""
        if self.bias is not None:
            x = x - x.mean(-1, keepdim=True)
        out = x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * (1 + self.weight)
        return out if self.bias is None else out + self.bias


def use_zero_centred_norms(config: Any) -> None:
    """Let the models that this process builds have them, if their config says so.

    Args:
        config: Megatron's `TransformerConfig`, of a model that is not built yet.
    """
    if not config.layernorm_zero_centered_gamma:
        return

    def build(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        return ZeroCentredNorm(hidden_size, eps, rms=config.normalization == "RMSNorm")

    WrappedTorchNorm.__new__ = build
    transformer_block.LayerNormImpl = WrappedTorchNorm

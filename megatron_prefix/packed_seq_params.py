"""The batch description that travels through GPTModel to every attention layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_prefix.attention.function import prefix_attention
from megatron_prefix.attention.kernels import select_kernel
from megatron_prefix.attention.stages import AttentionPlan
from megatron_prefix.layout import PackedLayout


@dataclass
class PrefixPackedSeqParams(PackedSeqParams):
    """`PackedSeqParams` of one packed row in which prefixes are shared.

    To Megatron it is one packed sequence of T tokens (`cu_seqlens = [0, T]`); the two fields it
    adds are what our attention reads. `max_seqlen_*` are the longest logical path, since GPTModel
    sizes its RoPE table by them.
    """

    plan: AttentionPlan = None
    """The attention stages of the row."""
    position_ids: Tensor = None
    """[T] int64: each token's position in its own sequence."""
    kernel: str | None = None
    """Attention kernel by name; None takes the best for the device."""

    @classmethod
    def from_layout(
        cls, layout: PackedLayout, device: torch.device, *, kernel: str | None = None
    ) -> PrefixPackedSeqParams:
        """Params of a packed layout, with its tensors on `device`."""
        cu_seqlens = torch.tensor([0, layout.num_tokens], dtype=torch.int32).to(
            device, non_blocking=True
        )
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=layout.max_seqlen,
            max_seqlen_kv=layout.max_seqlen,
            plan=AttentionPlan.from_layout(layout, device),
            position_ids=torch.from_numpy(layout.position_ids).to(device, non_blocking=True),
            kernel=kernel,
        )

    def attend(self, layer_number: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        """The core attention of one layer. A subclass may keep k and v, or add earlier ones.

        Args:
            layer_number: of the layer in the whole model, from 1.
            q: [T, heads, dim], rotated; k and v: [T, kv heads, dim], k rotated.
            scale: factor of q k^T before the softmax.

        Returns:
            [T, heads, dim] in q's dtype.
        """
        kernel = select_kernel(self.kernel, device=q.device, dtype=q.dtype, head_dim=q.shape[-1])
        return prefix_attention(q, k, v, self.plan, scale=scale, kernel=kernel)

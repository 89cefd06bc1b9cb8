"""Attention sinks: one more term in the sum that a softmax divides by.

With a sink s_h of head h, a softmax of its own for each query divides by exp(s_h) + sum_j exp(x_j).
That is as if every query saw one more key with score s_h and a value of zero. So it is the last
term of the merge:

    lse' = log(exp(lse) + exp(s_h))        out' = exp(lse - lse') out

The stages' backward with out' and lse' gives their exact shares (see `Kernel.backward`), and the
sink's own gradient is that of the score of such a key,

    ds_h = sum_t P_th (0 - dout_th . out'_th)      with P_th = exp(s_h - lse'_th)

(sinks: arXiv:2309.17453; learnable ones of gpt-oss; s_h = 0 is "softmax off by one").
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prefix.attention.kernels import MergedAttention


def merge_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """out [N, H, D] and lse [N, H] over all keys, with a sink [H] beside them."""
    with_sink = torch.logaddexp(lse, sink.to(lse))
    return out * (lse - with_sink).exp().unsqueeze(-1), with_sink


def sink_gradient(merged: MergedAttention, sink: Tensor) -> Tensor:
    """[H] in the sink's dtype, of out and lse that have the sink in them."""
    wide = merged.lse.dtype
    weight = (sink.to(merged.lse) - merged.lse).exp()
    dot = (merged.dout.to(wide) * merged.out.to(wide)).sum(-1)
    return -(weight * dot).sum(0).to(sink)

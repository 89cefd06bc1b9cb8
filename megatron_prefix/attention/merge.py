"""The log-sum-exp merge of attention over different keys, in place on the packed output.

    lse = log(exp(lse_a) + exp(lse_b))        out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

On CUDA one Triton kernel reads each side once and writes the result over the first; elsewhere a few
torch operations do the same. Bytes moved per merged element of out, with an output of w bytes per
element, a stage of n, and 12 to 20 more per row and head for the lse's:

    Triton    2 w + n       6 for bfloat16 into bfloat16, 10 into float32
    torch     2 w + n       where all have the lse's dtype; else more, for copies in it
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def merge_(
    out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor, *, rows: Tensor | None = None
) -> None:
    """Merge attention over other keys into out and lse, in place.

    Args:
        out: [n, H, D], and lse [n, H] in float32 or wider; views with any strides but for out's
            last dimension. Computed in the lse's dtype, and rounded once where out is narrower.
        other_out: [m, H, D] in any dtype; other_lse: [m, H].
        rows: [m] int64, each once: which of the n rows the others are of. None: all, in order.
    """
    fused = _fused_merge()
    if (
        fused is not None
        and out.is_cuda
        and lse.dtype == torch.float32
        and out.dtype in _FUSED_DTYPES
        and other_out.dtype in _FUSED_DTYPES
    ):
        fused(out, lse, other_out, other_lse, rows)
    elif rows is None:
        _merge_with_torch(out, lse, other_out, other_lse)
    else:
        chosen_out, chosen_lse = out[rows], lse[rows]
        _merge_with_torch(chosen_out, chosen_lse, other_out, other_lse)
        out[rows], lse[rows] = chosen_out, chosen_lse


def _merge_with_torch(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    # exp(other_lse - logaddexp(lse, other_lse))
    other_weight = torch.sigmoid(other_lse - lse).unsqueeze(-1)
    other_out = other_out.to(lse.dtype)
    if out.dtype == lse.dtype:
        out.lerp_(other_out, other_weight)
    else:
        out.copy_(torch.lerp(out.to(lse.dtype), other_out, other_weight))
    torch.logaddexp(lse, other_lse, out=lse)


@functools.cache
def _fused_merge() -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], None] | None:
    """The Triton kernel's launcher, where Triton is installed (as with torch's CUDA builds)."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return None
    from megatron_prefix.attention.merge_triton import merge_with_triton

    return merge_with_triton

"""A check of the merge of two stages on the run's own device, part of `self_check.py`.

On a GPU the merge is a kernel of its own, of many programs that run at once: what goes wrong
between them shows in many rows only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_prefix.attention.merge import merge_

_ROWS = {"cpu": 64, "cuda": 4096}


def merge_errors(
    device: torch.device, dtype: torch.dtype, num_heads: int, head_dim: int
) -> Iterator[tuple[str, float]]:
    """("lse", its largest error) and ("out", the L2 norm of its error over that of out).

    For what is merged into in `dtype` and, as where more than two stages meet, in the lse's;
    through a slice and through an index. Unlike two kernels, both sides merge the same numbers.
    """
    generator = torch.Generator(device).manual_seed(1)
    num_rows, lse_dtype = _ROWS[device.type], torch.promote_types(dtype, torch.float32)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=lse_dtype)

    order = torch.randperm(num_rows, generator=generator, device=device)
    for out_dtype in (dtype, lse_dtype):
        for rows in (None, order):
            out, other_out = (random(num_rows, num_heads, head_dim) for _ in range(2))
            # A stage's lse is [H, rows] in memory where flash kernels give it.
            lse, other_lse = random(num_rows, num_heads), random(num_heads, num_rows).T
            out, other_out = out.to(out_dtype), other_out.to(dtype)
            into = slice(None) if rows is None else rows
            merged_lse = torch.logaddexp(lse[into], other_lse)
            weights = (torch.exp(x - merged_lse).unsqueeze(-1) for x in (lse[into], other_lse))
            expected = sum(
                w * x.to(lse_dtype) for w, x in zip(weights, (out[into], other_out), strict=True)
            )
            merge_(out, lse, other_out, other_lse, rows=rows)
            yield "lse", float((lse[into] - merged_lse).abs().max())
            yield "out", float((out[into].to(lse_dtype) - expected).norm() / expected.norm())

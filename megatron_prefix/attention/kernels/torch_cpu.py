"""torch's own flash attention for CPUs, which never materialises the scores.

    aten::_scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal, scale) -> out, lse
    aten::_scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, ...)

They take [batch, heads, length, dim] with any strides but for the last dimension. What they ask of
their caller, seen in torch 2.6, 2.9 and 2.13:

- An empty batch or length is a division by zero that ends the process. None reaches them.
- Key/value heads that several query heads share are read in place since torch 2.9; before, the op
  reads beyond the end of k and v. There they are expanded.
- Backward runs one thread per sequence and key/value head. Where that leaves threads idle, shared
  heads are expanded too.
- In float16 and bfloat16 backward rounds dq, dk and dv after every block of at most 256 queries,
  and is slower than in float32 on CPUs without matrix units. Both are computed in float32.
- It has no sliding windows, but takes a mask that is added to the scores: see `cpu_windows.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prefix.attention.kernels.base import (
    CallOptions,
    Gradients,
    KernelInputs,
    MergedAttention,
    OutAndLse,
    Rectangles,
)
from megatron_prefix.attention.kernels.cpu_batches import Batch, split_into_batches
from megatron_prefix.attention.kernels.cpu_windows import split_into_blocks

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_READS_SHARED_HEADS = torch.torch_version.TorchVersion(torch.__version__) >= "2.9"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TorchCpuKernel:
    """Flash attention on the CPU, for any head dimension. float64 is computed in float64."""

    name = "torch_cpu"
    automatic = True
    windows = True
    value_sizes = False

    def unsupported(self, inputs: KernelInputs) -> str | None:
        """See `Kernel.unsupported`. It always is deterministic."""
        if inputs.device.type != "cpu":
            return f"device {inputs.device} is not a CPU"
        if inputs.dtype not in _DTYPES:
            return f"{inputs.dtype} is none of {', '.join(map(str, _DTYPES))}"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, on: Rectangles, options: CallOptions
    ) -> OutAndLse:
        """See `Kernel.forward`."""
        wide = torch.promote_types(q.dtype, torch.float32)
        out, lse = q.new_empty(q.shape, dtype=wide), q.new_empty(q.shape[:2], dtype=wide)
        for batch in _batches(on):
            if batch.queries.length == 0:
                continue
            queries = batch.queries.read(q).to(wide)
            keys, values = (batch.keys.read(x).to(wide) for x in (k, v))
            batch_out, batch_lse = _forward(queries, keys, values, on, options, batch.mask)
            out = batch.queries.write(out, batch_out)
            lse = batch.queries.write(lse, batch_lse)
        return out, lse

    def backward(
        self, merged: MergedAttention, k: Tensor, v: Tensor, on: Rectangles, options: CallOptions
    ) -> Gradients:
        """See `Kernel.backward`. It always is deterministic."""
        wide = merged.lse.dtype
        of_queries = (merged.dout, merged.q, merged.out)
        dq, dk, dv = (x.new_empty(x.shape, dtype=wide) for x in (merged.q, k, v))
        if on.window is not None:  # several blocks may have a key, or none
            dk, dv = dk.zero_(), dv.zero_()
        for batch in _batches(on):
            if batch.queries.length == 0:
                batch.keys.read(dk).zero_()
                batch.keys.read(dv).zero_()
                continue
            douts, queries, outs = (batch.queries.read(x).to(wide) for x in of_queries)
            keys, values = (batch.keys.read(x).to(wide) for x in (k, v))
            lse = batch.queries.read(merged.lse)
            batch_dq, batch_dk, batch_dv = _backward(
                douts, queries, keys, values, outs, lse, on, options, batch.mask
            )
            dq = batch.queries.write(dq, batch_dq)
            put = batch.keys.write if on.window is None else batch.keys.add
            dk, dv = put(dk, batch_dk), put(dv, batch_dv)
        return dq, dk, dv


def _batches(on: Rectangles) -> tuple[Batch, ...]:
    return split_into_batches(on) if on.window is None else split_into_blocks(on)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, on: Rectangles, options: CallOptions, mask: Tensor | None
) -> OutAndLse:
    """The op on [batch, heads, length, dim], with shared heads expanded where it needs that."""
    if not _READS_SHARED_HEADS:
        k, v = (_to_query_heads(x, q.shape[1]) for x in (k, v))
    causal = on.causal and mask is None
    mask = None if mask is None else mask.to(q.dtype)
    return _FORWARD(q, k, v, 0.0, causal, attn_mask=mask, scale=options.scale)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    on: Rectangles,
    options: CallOptions,
    mask: Tensor | None,
) -> Gradients:
    """Its backward; dk and dv have k's heads."""
    num_key_heads = k.shape[1]
    idle_threads = k.shape[0] * num_key_heads < torch.get_num_threads()
    if idle_threads or not _READS_SHARED_HEADS:
        k, v = (_to_query_heads(x, q.shape[1]) for x in (k, v))
    causal = on.causal and mask is None
    mask = None if mask is None else mask.to(q.dtype)
    dq, dk, dv = _BACKWARD(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=options.scale
    )
    return dq, _to_key_heads(dk, num_key_heads), _to_key_heads(dv, num_key_heads)


def _to_query_heads(x: Tensor, num_heads: int) -> Tensor:
    """[count, Hk, length, D] -> [count, H, length, D]; a view where Hk is 1 or H."""
    group = num_heads // x.shape[1]
    return x.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2)


def _to_key_heads(x: Tensor, num_key_heads: int) -> Tensor:
    """[count, H or Hk, length, D] -> [count, Hk, length, D], summed over the heads of a group."""
    return x if x.shape[1] == num_key_heads else x.unflatten(1, (num_key_heads, -1)).sum(2)

"""torch's own flash attention for CUDA, which needs nothing but torch.

    aten::_flash_attention_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, ...)
    aten::_flash_attention_backward(dout, q, k, v, out, lse, cu_q, cu_k, ..., rng, unused, ...)

FlashAttention-2 with variable lengths; shared key/value heads are read in place. What differs
between releases, read in torch 2.6 and 2.13 (`tests/attention/test_cuda_adapters.py` names it):

- lse is [n, H, max_q] in torch 2.6, and [H, tq] later. The op's registration for meta tensors
  tells which.
- The state of the random numbers is (seed, offset) in int64, later (state [2], unused) in uint64.
  Without dropout it is an argument that nobody reads.
- Whether backward is deterministic it reads off `torch.use_deterministic_algorithms`, which is set
  around the call where it is asked for.

In all of them backward holds dk and dv once per query head before it sums them over shared heads.

cuDNN's attention (`aten::_cudnn_attention_forward` and `_backward`) is not used. Its forward takes
variable lengths and returns the lse. Its backward with variable lengths takes the number of queries
and keys from `query.size(2)` and `key.size(2)`, which in a packed row is the head dimension, and
torch's own variable-length attention never chooses it. Without variable lengths it wants batches of
equal shape, and builds and compiles a graph for every new shape, of which a packed row has many.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

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
from megatron_prefix.attention.kernels.cuda_varlen import (
    CudaVarlenKernel,
    lse_from_heads,
    lse_from_padded,
    lse_to_heads,
    lse_to_padded,
    unsupported_inputs,
)

_FORWARD = torch.ops.aten._flash_attention_forward
_BACKWARD = torch.ops.aten._flash_attention_backward
_SMALL_SHARED_MEMORY = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))
"""Compute capabilities on which the op has no backward for head dimensions above 192."""


class TorchCudaKernel(CudaVarlenKernel):
    """FlashAttention-2 as torch carries it, in bfloat16 and float16."""

    name = "torch_cuda"
    windows = True

    def unsupported(self, inputs: KernelInputs) -> str | None:
        """See `Kernel.unsupported`. It can always be deterministic."""
        reason = unsupported_inputs(inputs, max_head_dim=256)
        if reason is not None:
            return reason
        if not torch.backends.cuda.is_flash_attention_available():
            return f"torch {torch.__version__} is built without flash attention"
        capability = torch.cuda.get_device_capability(inputs.device)
        if capability < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
        head_dim = inputs.head_dim
        if head_dim > 192 and capability in _SMALL_SHARED_MEMORY:
            return (
                f"head_dim {head_dim} has no backward on compute capability "
                f"{capability[0]}.{capability[1]}"
            )
        return None

    def run_forward(
        self, q: Tensor, k: Tensor, v: Tensor, on: Rectangles, options: CallOptions
    ) -> OutAndLse:
        """See `CudaVarlenKernel.run_forward`."""
        out, lse, *_ = _FORWARD(
            *(q, k, v, on.cu_q, on.cu_k, on.max_q, on.max_k),
            *(0.0, on.causal, False),
            scale=options.scale,
            **_window(on),
        )
        if lse_is_padded():
            return out, lse_from_padded(lse, on.cu_q, q.shape[0])
        return out, lse_from_heads(lse)

    def run_backward(
        self, merged: MergedAttention, k: Tensor, v: Tensor, on: Rectangles, options: CallOptions
    ) -> Gradients:
        """See `CudaVarlenKernel.run_backward`."""
        q, lse = merged.q, merged.lse
        lse = lse_to_padded(lse, on.cu_q, on.max_q) if lse_is_padded() else lse_to_heads(lse)
        with _deterministic() if options.deterministic else contextlib.nullcontext():
            return _BACKWARD(
                *(merged.dout, q, k, v, merged.out, lse),
                *(on.cu_q, on.cu_k, on.max_q, on.max_k, 0.0, on.causal),
                *_random_state(q.device),
                scale=options.scale,
                **_window(on),
            )


def _window(on: Rectangles) -> dict[str, int]:
    """Counted from a rectangle's last query and last key, which are the same token."""
    return {} if on.window is None else {"window_size_left": on.window, "window_size_right": 0}


@functools.cache
def lse_is_padded() -> bool:
    """Whether the op's lse is [n, H, max_q] in this torch, and not [H, tq]."""
    q = torch.empty(3, 2, 8, device="meta", dtype=torch.bfloat16)
    cu = torch.empty(2, device="meta", dtype=torch.int32)
    _, lse, *_ = _FORWARD(q, q, q, cu, cu, 3, 3, 0.0, False, False)
    return lse.dim() == 3


def _random_state(device: torch.device) -> tuple[Tensor, Tensor]:
    arguments = {argument.name for argument in _BACKWARD.default._schema.arguments}
    if "rng_state" in arguments:
        return (
            torch.empty(2, dtype=torch.uint64, device=device),
            torch.empty((), dtype=torch.uint64, device=device),
        )
    return tuple(torch.empty((), dtype=torch.int64, device=device) for _ in range(2))


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """torch's deterministic algorithms within the block, without filling new memory."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fills

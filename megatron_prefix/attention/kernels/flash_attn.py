"""The flash-attn packages: FlashAttention 3 for Hopper, 4 (CuTe) for Hopper and Blackwell, and 2.

Where an installed release differs from those that are known, its kernel is unsupported and says
why (see `flash_attn_calls.py`); nothing is guessed. What is asked of each:

    flash_attn_3  compute capability 9.x; head_dim up to 256, deterministic up to 192
    flash_attn_4  compute capability 9.x, 10.x, 11.x; head_dim up to 128
    flash_attn_2  compute capability 8.0 and above; head_dim up to 256
"""

from __future__ import annotations

import importlib
from typing import Any

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
    lse_to_heads,
    unsupported_inputs,
)
from megatron_prefix.attention.kernels.flash_attn_calls import (
    FLASH_ATTN_2,
    FLASH_ATTN_3,
    FLASH_ATTN_4,
    WINDOW,
    Package,
    load,
)


class FlashAttnKernel(CudaVarlenKernel):
    """One of the packages. Subclasses say on which GPUs, and name the lse in backward."""

    name: str
    package: Package
    max_head_dim: int
    lse_name = "softmax_lse"
    windows = True

    def unsupported(self, inputs: KernelInputs) -> str | None:
        """See `Kernel.unsupported`."""
        reason = unsupported_inputs(inputs, max_head_dim=self.max_head_dim)
        if reason is None:
            reason = self.unsupported_device(torch.cuda.get_device_capability(inputs.device))
        if reason is None:
            loaded = load(self.package)
            reason = loaded if isinstance(loaded, str) else None
            if reason is None and inputs.windows and not loaded.windows:
                reason = f"this release of {self.package.name} takes no {WINDOW[0]}"
        if reason is None:
            reason = self.unsupported_build(inputs)
        return reason

    def unsupported_device(self, capability: tuple[int, int]) -> str | None:
        """Why not on a GPU of this compute capability."""
        raise NotImplementedError

    def unsupported_build(self, inputs: KernelInputs) -> str | None:
        """What this package, as it is installed, does not have."""
        return None

    def run_forward(
        self, q: Tensor, k: Tensor, v: Tensor, on: Rectangles, options: CallOptions
    ) -> OutAndLse:
        """See `CudaVarlenKernel.run_forward`."""
        out, lse, *_ = load(self.package).forward(
            q=q,
            k=k,
            v=v,
            **_described(on, options),
        )
        return out, lse_from_heads(lse)

    def run_backward(
        self, merged: MergedAttention, k: Tensor, v: Tensor, on: Rectangles, options: CallOptions
    ) -> Gradients:
        """See `CudaVarlenKernel.run_backward`."""
        # Rectangles without queries: their keys' gradients stay what they are here.
        q = merged.q
        dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
        load(self.package).backward(
            dout=merged.dout,
            q=q,
            k=k,
            v=v,
            out=merged.out,
            dq=dq,
            dk=dk,
            dv=dv,
            **_described(on, options),
            deterministic=options.deterministic,
            **{self.lse_name: lse_to_heads(merged.lse)},
        )
        return dq, dk, dv


class FlashAttn2Kernel(FlashAttnKernel):
    """flash-attn 2.7 and newer."""

    name = "flash_attn_2"
    package = FLASH_ATTN_2
    max_head_dim = 256

    def unsupported_device(self, capability: tuple[int, int]) -> str | None:
        """See `FlashAttnKernel.unsupported_device`."""
        return None if capability >= (8, 0) else _not_on(capability, "8.0 or above")


class FlashAttn3Kernel(FlashAttnKernel):
    """FlashAttention 3, built from the hopper folder."""

    name = "flash_attn_3"
    package = FLASH_ATTN_3
    max_head_dim = 256

    def unsupported_device(self, capability: tuple[int, int]) -> str | None:
        """See `FlashAttnKernel.unsupported_device`."""
        return None if capability[0] == 9 else _not_on(capability, "9.x (Hopper)")

    def unsupported_build(self, inputs: KernelInputs) -> str | None:
        """What the build leaves out, and deterministic backward of the largest heads."""
        head_dim = inputs.head_dim
        if inputs.deterministic and head_dim > 192:
            return f"its deterministic backward ends at head_dim 192, below {head_dim}"
        flags = _build_flags()
        left_out = ["FLASHATTENTION_DISABLE_BACKWARD", "FLASHATTENTION_DISABLE_VARLEN"]
        if inputs.dtype == torch.float16:
            left_out.append("FLASHATTENTION_DISABLE_FP16")
        sizes = (64, 96, 128, 192, 256)
        built = [n for n in sizes if not flags.get(f"FLASHATTENTION_DISABLE_HDIM{n}")]
        for flag in left_out:
            if flags.get(flag):
                return f"it was built with {flag}"
        if not any(head_dim <= n for n in built):
            return f"it was built for head_dim up to {max(built, default=0)}, below {head_dim}"
        return None


class FlashAttn4Kernel(FlashAttnKernel):
    """FlashAttention 4, in CuTe: compiled when it is first called with a new kind of input.

    A beta, and this adapter has not run on a GPU yet: it is not chosen by itself until
    `pytest -m gpu` has passed with it. Named explicitly, it runs.
    """

    name = "flash_attn_4"
    automatic = False
    package = FLASH_ATTN_4
    max_head_dim = 128
    lse_name = "lse"

    def unsupported_device(self, capability: tuple[int, int]) -> str | None:
        """See `FlashAttnKernel.unsupported_device`."""
        known = capability[0] in (9, 10, 11)
        return None if known else _not_on(capability, "9.x, 10.x or 11.x")


def _described(on: Rectangles, options: CallOptions) -> dict[str, Any]:
    """The arguments that forward and backward have in common, by the packages' names."""
    window = {} if on.window is None else dict(zip(WINDOW, (on.window, 0), strict=True))
    return {
        "cu_seqlens_q": on.cu_q,
        "cu_seqlens_k": on.cu_k,
        "max_seqlen_q": on.max_q,
        "max_seqlen_k": on.max_k,
        "softmax_scale": options.scale,
        "causal": on.causal,
        **window,
    }


def _not_on(capability: tuple[int, int], known: str) -> str:
    return f"compute capability {capability[0]}.{capability[1]} is not {known}"


def _build_flags() -> dict[str, Any]:
    """What FlashAttention 3 was built without; newer builds say so."""
    try:
        config = importlib.import_module("flash_attn_config")
    except ImportError:
        return {}
    return config.CONFIG["build_flags"]

"""Attention kernels: the registry, and the choice of one."""

from __future__ import annotations

import functools
import logging

import torch

from megatron_prefix.attention.kernel_names import kernel_names
from megatron_prefix.attention.kernels.base import (
    CallOptions,
    Kernel,
    KernelInputs,
    MergedAttention,
    Rectangles,
)
from megatron_prefix.attention.kernels.flash_attn import (
    FlashAttn2Kernel,
    FlashAttn3Kernel,
    FlashAttn4Kernel,
)
from megatron_prefix.attention.kernels.reference import ReferenceKernel
from megatron_prefix.attention.kernels.torch_cpu import TorchCpuKernel
from megatron_prefix.attention.kernels.torch_cuda import TorchCudaKernel

__all__ = [
    "CallOptions",
    "Kernel",
    "KernelInputs",
    "MergedAttention",
    "Rectangles",
    "kernel_names",
    "select_kernel",
    "usable_kernels",
]

logger = logging.getLogger(__name__)

_KERNELS: tuple[Kernel, ...] = (
    FlashAttn3Kernel(),
    FlashAttn4Kernel(),
    FlashAttn2Kernel(),
    TorchCudaKernel(),
    TorchCpuKernel(),
    ReferenceKernel(),
)
"""Best first. A new kernel is one file, one entry here and its name in `kernel_names.py`."""

assert kernel_names() == tuple(kernel.name for kernel in _KERNELS)


def select_kernel(
    name: str | None,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    deterministic: bool = False,
    windows: bool = False,
) -> Kernel:
    """The attention kernel called `name`, or the best that the inputs allow.

    Args:
        name: one of `kernel_names()`, or None for the best. Two are only ever chosen by name: the
            reference kernel, which holds all scores of a segment in memory, and FlashAttention 4,
            a beta.
        device, dtype, head_dim: of q, k and v.
        deterministic: only kernels whose backward can give the same bits every time. It has to be
            asked for in each call of `Kernel.backward` as well.
        windows: only kernels that compute sliding windows.

    Raises:
        ValueError: the name is unknown, or that kernel (or without a name, every kernel) cannot
            compute these inputs.

    The first choice for each kind of input is logged.
    """
    device = torch.device(device)
    reasons = _reasons(device, dtype, head_dim, deterministic, windows)
    usable = [kernel for kernel in _KERNELS if reasons[kernel.name] is None]
    inputs = f"device {device}, {dtype}, head_dim {head_dim}"
    if deterministic:
        inputs += ", deterministic"
    if windows:
        inputs += ", sliding windows"
    if name is not None:
        if name not in reasons:
            raise ValueError(
                f"unknown attention kernel {name!r}: choose one of {', '.join(kernel_names())}, or "
                "None for the best one"
            )
        if reasons[name] is not None:
            choices = ", ".join(kernel.name for kernel in usable) or "none"
            raise ValueError(
                f"attention kernel {name!r} cannot compute {inputs}: {reasons[name]}. Kernels that "
                f"can: {choices}"
            )
        kernel = next(kernel for kernel in usable if kernel.name == name)
    else:
        automatic = [kernel for kernel in usable if kernel.automatic]
        if not automatic:
            why = "; ".join(f"{n}: {reason or 'must be named'}" for n, reason in reasons.items())
            raise ValueError(f"no attention kernel for {inputs} ({why})")
        kernel = automatic[0]
    _log_choice(kernel.name, device.type, dtype, head_dim)
    return kernel


def usable_kernels(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    deterministic: bool = False,
    windows: bool = False,
) -> tuple[str, ...]:
    """The names that `select_kernel` takes for these inputs, best first."""
    reasons = _reasons(torch.device(device), dtype, head_dim, deterministic, windows)
    return tuple(name for name, reason in reasons.items() if reason is None)


@functools.lru_cache(maxsize=64)  # every layer of every microbatch asks for the same few
def _reasons(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    deterministic: bool,
    windows: bool = False,
) -> dict[str, str | None]:
    inputs = KernelInputs(
        device=device,
        dtype=dtype,
        head_dim=head_dim,
        deterministic=deterministic,
        windows=windows,
    )
    return {kernel.name: _unsupported(kernel, inputs) for kernel in _KERNELS}


def _unsupported(kernel: Kernel, inputs: KernelInputs) -> str | None:
    reason = kernel.unsupported(inputs)
    if reason is None and inputs.windows and not kernel.windows:
        reason = "its sliding windows are not used yet"
    return reason


@functools.cache
def _log_choice(name: str, device_type: str, dtype: torch.dtype, head_dim: int) -> None:
    logger.info("attention kernel %s for %s, %s, head_dim %d", name, device_type, dtype, head_dim)

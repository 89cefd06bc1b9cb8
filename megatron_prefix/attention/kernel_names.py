"""The kernels' names, which a configuration is checked by before torch is imported."""

from __future__ import annotations

_NAMES = (
    "flash_attn_3",
    "flash_attn_4",
    "flash_attn_2",
    "torch_cuda",
    "torch_cpu",
    "reference",
)
"""In the order of the registry (`attention/kernels`)."""
_ON_CPU = ("torch_cpu", "reference")


def cpu_kernel_names() -> tuple[str, ...]:
    """The names of those that compute on the CPU; the others need a GPU."""
    return _ON_CPU


def kernel_names() -> tuple[str, ...]:
    """The names that `select_kernel` takes."""
    return _NAMES


_DELTA_RULES = ("flash_linear_attention", "torch")
"""In the order of the registry (`attention/delta_rules`)."""


def delta_rule_names() -> tuple[str, ...]:
    """The names that `select_delta_rule` takes."""
    return _DELTA_RULES


def cpu_delta_rule_names() -> tuple[str, ...]:
    """The names of those that compute on the CPU; the others need a GPU."""
    return ("torch",)

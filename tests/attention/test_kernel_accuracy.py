"""bfloat16 and float16 attention over packed rows, by relative L2 error against float64.

Every kernel that can compute the dtype on a device is measured there: on the CPU always, on a GPU
where there is one.
"""

from __future__ import annotations

import pytest
import torch

from megatron_prefix.attention.function import prefix_attention
from megatron_prefix.attention.kernels import kernel_names, select_kernel
from megatron_prefix.attention.stages import AttentionPlan
from megatron_prefix.layout import PrefixTree, pack
from tests.attention.oracle import dense_attention, gradients, group, random_qkv, visible_keys

# Inputs are the oracle's own. What is left is rounding: of a stage's out and of the merged one (at
# most 2^-9 each in bfloat16), and in backward of dout V^T, P and dS before they are multiplied.
OUT, GRADIENT = 4e-3, 1e-2

LAYOUTS = {
    "one group": [(200, [40, 1, 130])],
    "groups, one without anything shared": [(64, [33] * 4), (1, [50]), (20, [65, 64])],
}
DEEP = [[1] * 60 + [2 + i // 2] * 30 + [9 + i] * (20 + 7 * i) for i in range(4)]
HEAD_DIMS = {"cpu": (64,), **({"cuda": (64, 128, 256)} if torch.cuda.is_available() else {})}


def usable() -> list[object]:
    """(device, kernel, dtype, head_dim) as far as kernels go, for each device that is here."""
    found = []
    for device, head_dims in HEAD_DIMS.items():
        for name in kernel_names():
            for dtype in (torch.bfloat16, torch.float16):
                for head_dim in head_dims:
                    try:
                        select_kernel(name, device=device, dtype=dtype, head_dim=head_dim)
                    except ValueError:
                        continue
                    marks = [pytest.mark.gpu] if device == "cuda" else []
                    name_of_case = f"{device}-{name}-{dtype}-{head_dim}"
                    found.append(
                        pytest.param(device, name, dtype, head_dim, id=name_of_case, marks=marks)
                    )
    return found


@pytest.mark.parametrize(("device", "name", "dtype", "head_dim"), usable())
def test_relative_error(rng, device, name, dtype, head_dim):
    trees = [PrefixTree.from_groups([group(p, r) for p, r in g]) for g in LAYOUTS.values()]
    for tree in (*trees, PrefixTree.from_sequences(DEEP)):
        layout = pack(tree, pad_to_multiple=8)
        check(layout, device, name, dtype, 4, 2, head_dim)


def check(layout, device, name, dtype, heads, kv_heads, head_dim) -> None:
    """Out, dq, dk and dv; twice, the second time deterministic and compared to the bit."""
    scale = head_dim**-0.5
    inputs = random_qkv(layout.num_tokens, heads, kv_heads, head_dim, dtype)
    dout = torch.randn(layout.num_tokens, heads, head_dim, dtype=torch.float64).to(dtype)
    exact = tuple(x.double().requires_grad_() for x in inputs)
    expected_out = dense_attention(*exact, visible_keys(layout), scale)
    expected = (expected_out, *gradients(expected_out, dout.double(), exact))

    inputs = tuple(x.to(device).requires_grad_() for x in inputs)
    dout = dout.to(device)
    plan = AttentionPlan.from_layout(layout, device)
    choice = {"device": device, "dtype": dtype, "head_dim": head_dim}
    kernel = select_kernel(name, **choice)
    out = prefix_attention(*inputs, plan, scale=scale, kernel=kernel)
    found = (out, *gradients(out, dout, inputs))
    for what, value, exact_value in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        error = (value.cpu().double() - exact_value).norm() / exact_value.norm()
        assert error <= (OUT if what == "out" else GRADIENT), f"{what}: {error:.2e}"

    try:
        kernel = select_kernel(name, **choice, deterministic=True)
    except ValueError:
        return  # it says so, and has been measured
    runs = []
    for _ in range(2):
        out = prefix_attention(*inputs, plan, scale=scale, kernel=kernel, deterministic=True)
        runs.append((out, *gradients(out, dout, inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_cuda_kernel_is_among_those_measured():
    assert any(param.values[1] == "torch_cuda" for param in usable())

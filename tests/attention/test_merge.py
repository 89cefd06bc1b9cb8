"""The merge of two stages, with torch and with the Triton kernel, against float64.

The Triton kernel runs under Triton's interpreter, in a process of its own since that is chosen
before import. What these tests do not cover: the compiled kernel without a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_prefix.attention.merge import merge_

Merge = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], None]

# Of out, relative to its largest element: float32 rounds the weights (2^-24) and torch's and
# Triton's exp add a few more; bfloat16 and float16 round the result once.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def exact_merge(
    out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, in float64; a side without keys weighs nothing."""
    out, lse, other_out, other_lse = (x.double() for x in (out, lse, other_out, other_lse))
    merged_lse = torch.logaddexp(lse, other_lse)
    finite = torch.where(merged_lse.isinf(), 0.0, merged_lse)
    a, b = (torch.exp(x - finite).unsqueeze(-1) for x in (lse, other_lse))
    return torch.where(a > 0, a * out, 0.0) + torch.where(b > 0, b * other_out, 0.0), merged_lse


def check(
    merge: Merge,
    *,
    num_rows: int,
    heads: int,
    head_dim: int,
    out_dtype: torch.dtype,
    stage_dtype: torch.dtype,
    device: str = "cpu",
    spread: float = 5.0,
    without_keys: bool = False,
    tolerances: dict[torch.dtype, float] = TOLERANCES,
) -> None:
    """Merge into some rows of a larger buffer, each through a slice and through an index.

    The buffers are views: heads lie in the middle of a wider projection, and the stage's lse is
    [H, m] in memory as flash kernels give it. Whatever is not merged into is NaN.
    """
    torch.manual_seed(num_rows * head_dim + heads)
    before, after = 3, 2
    length = before + num_rows + after
    for chosen in (False, True):
        wide = torch.full((length, heads + 2, head_dim), torch.nan, dtype=out_dtype, device=device)
        out, lse = wide[:, 1:-1], torch.full((length, heads), torch.nan, device=device)
        other_out = torch.randn(num_rows, heads, head_dim, device=device).to(stage_dtype)
        other_lse = (spread * torch.randn(heads, num_rows, device=device)).T
        if chosen:
            rows = torch.randperm(length, device=device)[:num_rows]
        else:
            rows = torch.arange(before, before + num_rows, device=device)
        out[rows] = torch.randn(num_rows, heads, head_dim, device=device).to(out_dtype)
        lse[rows] = spread * torch.randn(num_rows, heads, device=device)
        if without_keys:
            # Row 0: none here. Row 1: none in the stage, whose out is garbage. Row 2: neither.
            lse[rows[0]], out[rows[0]] = -torch.inf, torch.nan
            other_lse[1], other_out[1] = -torch.inf, torch.nan
            lse[rows[2]] = other_lse[2] = -torch.inf
        expected_out, expected_lse = exact_merge(out[rows], lse[rows], other_out, other_lse)
        if chosen:
            merge(out, lse, other_out, other_lse, rows)
        else:
            part = slice(before, before + num_rows)
            merge(out[part], lse[part], other_out, other_lse, None)

        what = f"{num_rows} rows, {heads} heads of {head_dim}, {out_dtype}, chosen {chosen}"
        largest = expected_out.abs().max().clamp(min=1e-30)
        error = (out[rows].double() - expected_out).abs().max() / largest
        assert error <= tolerances[out_dtype], f"{what}: {error}"
        # float32 itself, and its exp and log.
        assert torch.allclose(lse[rows].double(), expected_lse, rtol=1e-6, atol=1e-6), what
        untouched = torch.ones(length, dtype=torch.bool, device=device)
        untouched[rows] = False
        assert out[untouched].isnan().all() and lse[untouched].isnan().all(), what
        assert wide[:, 0].isnan().all() and wide[:, -1].isnan().all(), what


CASES = [
    {"num_rows": 1, "heads": 1, "head_dim": 8},
    {"num_rows": 70, "heads": 3, "head_dim": 80},
    {"num_rows": 33, "heads": 2, "head_dim": 128},
    {"num_rows": 129, "heads": 1, "head_dim": 33},
    {"num_rows": 17, "heads": 2, "head_dim": 256},
]


def check_all(
    merge: Merge, device: str = "cpu", tolerances: dict[torch.dtype, float] = TOLERANCES
) -> None:
    """Every shape, and one with every pair of dtypes that packed outputs and kernels have."""
    pairs = [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ]
    for case in CASES:
        for out_dtype, stage_dtype in pairs if case["num_rows"] == 70 else pairs[:1]:
            check(
                merge,
                **case,
                out_dtype=out_dtype,
                stage_dtype=stage_dtype,
                device=device,
                tolerances=tolerances,
            )
    same = {"out_dtype": torch.float32, "stage_dtype": torch.float32, "device": device}
    # One side outweighs the other by e^10000.
    check(merge, num_rows=40, heads=2, head_dim=40, spread=1e4, **same)


def check_fused(device: str = "cpu") -> None:
    """The Triton kernel: all of these, rows without keys, no rows, and strides it refuses."""
    from megatron_prefix.attention.merge_triton import merge_with_triton

    # Triton's interpreter cuts bfloat16 off where a GPU rounds.
    tolerances = {**TOLERANCES, torch.bfloat16: 2**-7} if device == "cpu" else TOLERANCES
    check_all(merge_with_triton, device, tolerances)
    check(
        merge_with_triton,
        num_rows=5,
        heads=2,
        head_dim=24,
        out_dtype=torch.float32,
        stage_dtype=torch.float32,
        without_keys=True,
        device=device,
    )
    nothing = torch.empty(0, 2, 8, device=device)
    merge_with_triton(nothing, nothing[..., 0], nothing, nothing[..., 0], None)
    x = torch.zeros(8, 2, 4, device=device)
    with pytest.raises(ValueError, match="the last dimension must be contiguous"):
        merge_with_triton(x.transpose(0, 2), x[..., 0], x.transpose(0, 2), x[..., 0], None)


def with_torch(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor, rows: object):
    merge_(out, lse, other_out, other_lse, rows=rows)


def test_merging_with_torch():
    check_all(with_torch)


def test_merging_with_torch_in_float64():
    out, other = torch.randn(9, 2, 4, dtype=torch.float64), torch.randn(9, 2, 4).double()
    lse, other_lse = torch.randn(9, 2).double(), torch.randn(9, 2).double()
    expected_out, expected_lse = exact_merge(out, lse, other, other_lse)
    merge_(out, lse, other, other_lse)
    assert torch.allclose(out, expected_out, rtol=1e-14, atol=1e-15)
    assert torch.allclose(lse, expected_lse, rtol=1e-14, atol=1e-15)


def test_merging_with_the_triton_kernel_under_its_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: it has wheels for Linux only")
    done = subprocess.run(
        [sys.executable, "-c", "from tests.attention.test_merge import check_fused; check_fused()"],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_merging_with_the_triton_kernel_on_a_gpu():
    check_fused("cuda")
    check_all(with_torch, "cuda")
    from megatron_prefix.attention.merge_triton import merge_with_triton

    # Many programs at once, of which each has fewer rows than threads.
    for head_dim in (64, 128, 256) * 5:
        check(
            merge_with_triton,
            num_rows=8192,
            heads=8,
            head_dim=head_dim,
            out_dtype=torch.float32,
            stage_dtype=torch.float32,
            device="cuda",
        )

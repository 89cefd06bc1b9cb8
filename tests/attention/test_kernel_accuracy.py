"""bfloat16 and float16 attention over packed rows, by relative L2 error against float64.

Whole rows, rows of a trimmed last layer, and the stages of context-parallel ranks, rank by rank.
Every kernel that can compute the dtype on a device is measured there: on the CPU always, on a GPU
where there is one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_prefix.attention.function import prefix_attention
from megatron_prefix.attention.kernels import MergedAttention, kernel_names, select_kernel
from megatron_prefix.attention.stage_compute import StageCompute
from megatron_prefix.device_copy import record_to_device
from megatron_prefix.layout import PackedLayout, PrefixTree, RowStages, pack, rank_row
from tests.attention.oracle import (
    dense_attention,
    gradients,
    group,
    in_window,
    random_qkv,
    stages_of,
    visible_keys,
)

# Inputs are the oracle's own. What is left is rounding: of a stage's out and of the merged one (at
# most 2^-9 each in bfloat16), and in backward of dout V^T, P and dS before they are multiplied.
OUT, GRADIENT = 4e-3, 1e-2

LAYOUTS = {
    "one group": [(200, [40, 1, 130])],
    "groups, one without anything shared": [(64, [33] * 4), (1, [50]), (20, [65, 64])],
}
DEEP = [[1] * 60 + [2 + i // 2] * 30 + [9 + i] * (20 + 7 * i) for i in range(4)]
HEAD_DIMS = {"cpu": (64,), **({"cuda": (64, 128, 256)} if torch.cuda.is_available() else {})}


def usable(*, windows: bool = False) -> list[object]:
    """(device, kernel, dtype, head_dim) as far as kernels go, for each device that is here."""
    found = []
    for device, head_dims in HEAD_DIMS.items():
        for name in kernel_names():
            for dtype in (torch.bfloat16, torch.float16):
                for head_dim in head_dims:
                    try:
                        inputs = {"device": device, "dtype": dtype, "head_dim": head_dim}
                        select_kernel(name, **inputs, windows=windows)
                    except ValueError:
                        continue
                    marks = [pytest.mark.gpu] if device == "cuda" else []
                    name_of_case = f"{device}-{name}-{dtype}-{head_dim}"
                    found.append(
                        pytest.param(device, name, dtype, head_dim, id=name_of_case, marks=marks)
                    )
    return found


def layouts(pad_to_multiple: int = 8) -> list[PackedLayout]:
    """Rows of such lengths, of two levels and of three."""
    trees = [PrefixTree.from_groups([group(p, r) for p, r in g]) for g in LAYOUTS.values()]
    return [
        pack(t, pad_to_multiple=pad_to_multiple) for t in (*trees, PrefixTree.from_sequences(DEEP))
    ]


@pytest.mark.parametrize(("device", "name", "dtype", "head_dim"), usable())
def test_relative_error(rng, device, name, dtype, head_dim):
    for layout in layouts():
        row = Row(layout, dtype, head_dim)
        check_stages(row, stages_of(layout, device), np.arange(layout.num_tokens), device, name)


@pytest.mark.parametrize(("device", "name", "dtype", "head_dim"), usable())
def test_relative_error_of_a_trimmed_layer(rng, device, name, dtype, head_dim):
    """Queries and keys are picked by row tensors, and so are the rows that are merged into."""
    picked = {"queries": False, "keys": False}
    for layout in layouts():
        needed = np.zeros(layout.num_tokens, dtype=bool)
        for i in range(layout.tree.num_sequences):
            # Of some sequences the whole last segment, of others its end or nothing of it.
            needed[layout.sequence_positions(i)[-1 - 40 * (i % 2) :]] = i % 3 < 2
        stages = stages_of(layout, device, needed=np.flatnonzero(needed))
        for stage in stages.local:
            picked["queries"] |= isinstance(stage.queries, torch.Tensor)
            picked["keys"] |= isinstance(stage.keys, torch.Tensor)
        queries = stages.queries.cpu().numpy()
        check_stages(Row(layout, dtype, head_dim), stages, queries, device, name)
    assert all(picked.values())


@pytest.mark.parametrize(("device", "name", "dtype", "head_dim"), usable(windows=True))
def test_relative_error_of_sliding_windows(rng, device, name, dtype, head_dim):
    for layout in layouts(pad_to_multiple=1):  # what padding sees does not matter
        for window in (1, 63, 400):
            row = Row(layout, dtype, head_dim, window)
            stages = stages_of(layout, device, window=window)
            check_stages(row, stages, np.arange(layout.num_tokens), device, name)


@pytest.mark.parametrize(("device", "name", "dtype", "head_dim"), usable())
def test_relative_error_of_context_parallel_stages(rng, device, name, dtype, head_dim):
    """Rank by rank in this process: each against the shards of both, the gradients added up."""
    for layout in layouts():
        row = Row(layout, dtype, head_dim)
        ranks = [rank_row(layout, rank=rank, num_ranks=2) for rank in range(2)]
        shard_tokens = ranks[0].shards.shard_tokens
        sharded = np.concatenate([r.rows[:n] for r, n in zip(ranks, shard_tokens, strict=True)])
        assert len(sharded)
        kernel = select_kernel(name, device=device, dtype=dtype, head_dim=head_dim)
        compute = StageCompute(kernel, row.scale)
        found = [torch.zeros_like(x) for x in (row.q, row.q, row.k, row.v)]
        for rank in ranks:
            stages = rank.model.stages
            own, others = rank.rows, sharded[stages.gathered.source]
            real = own >= 0
            out, dq, d_own, d_others = attend_as_rank(row, compute, stages, own, others, device)
            found[0][own[real]] = out[real]
            found[1][own[real]] = dq[real]
            for whole, mine, other in zip(found[2:], d_own, d_others, strict=True):
                whole.index_add_(0, torch.from_numpy(own[real]), mine[real])
                whole.index_add_(0, torch.from_numpy(others), other)
        # Padding is nobody's, so nothing of it comes back.
        real = slice(0, layout.num_tokens - layout.num_padding)
        expected = row.expected(np.arange(layout.num_tokens)[real])
        assert_accurate([x[real] for x in found], [expected[0], *(x[real] for x in expected[1:])])


class Row:
    """Inputs of a packed row in the dtype, and what is exact for them."""

    heads, kv_heads = 4, 2

    def __init__(
        self, layout: PackedLayout, dtype: torch.dtype, head_dim: int, window: int | None = None
    ) -> None:
        self.scale, self.dtype, self.window = head_dim**-0.5, dtype, window
        self._layout = layout
        self.q, self.k, self.v = random_qkv(
            layout.num_tokens, self.heads, self.kv_heads, head_dim, dtype
        )
        shape = layout.num_tokens, self.heads, head_dim
        self.dout = torch.randn(shape, dtype=torch.float64).to(dtype)

    def expected(self, queries: np.ndarray) -> list[torch.Tensor]:
        """out of these rows of queries, and dq, dk, dv of all, from a dense mask in float64."""
        exact = tuple(x.double().requires_grad_() for x in (self.q, self.k, self.v))
        visible = (
            visible_keys(self._layout)
            if self.window is None
            else in_window(self._layout, self.window)
        )
        out = dense_attention(*exact, visible, self.scale)[queries]
        return [out, *gradients(out, self.dout[queries].double(), exact)]


def check_stages(
    row: Row, stages: RowStages[torch.Tensor], queries: np.ndarray, device: str, name: str
) -> None:
    """Out, dq, dk and dv; twice, the second time deterministic and compared to the bit."""
    inputs = tuple(x.to(device).requires_grad_() for x in (row.q[queries], row.k, row.v))
    dout = row.dout[queries].to(device)
    windowed = row.window is not None
    choice = {
        "device": device,
        "dtype": row.dtype,
        "head_dim": row.q.shape[-1],
        "windows": windowed,
    }
    options = {"scale": row.scale, "windowed": windowed}
    kernel = select_kernel(name, **choice)
    out = prefix_attention(*inputs, stages, **options, kernel=kernel)
    out_expected, dq_expected, *others = row.expected(queries)
    assert_accurate(
        [out, *gradients(out, dout, inputs)], [out_expected, dq_expected[queries], *others]
    )

    try:
        kernel = select_kernel(name, **choice, deterministic=True)
    except ValueError:
        return  # it says so, and has been measured
    runs = []
    for _ in range(2):
        out = prefix_attention(*inputs, stages, **options, kernel=kernel, deterministic=True)
        runs.append((out, *gradients(out, dout, inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def attend_as_rank(
    row: Row,
    compute: StageCompute,
    stages: RowStages[np.ndarray],
    own: np.ndarray,
    others: np.ndarray,
    device: str,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """out and dq, dk and dv of the rank's own rows, and dk and dv of the gathered ones.

    As `GatheredAttention` does, but that nothing travels. Padding is a copy of some token, with a
    zero dout.
    """
    padding = torch.from_numpy(own < 0)
    q, k, v, dout = (x[own].to(device) for x in (row.q, row.k, row.v, row.dout))
    dout[padding.to(device)] = 0
    others_kv = [x[others].to(device) for x in (row.k, row.v)]
    local, from_shards = record_to_device((stages.local, stages.gathered.stages), device)
    out, lse = compute.attend(local, q, k, v, wide=True)
    compute.merge(from_shards, q, *others_kv, out, lse)
    out = out.to(q.dtype)
    merged = MergedAttention(q=q, out=out, lse=lse, dout=dout)
    dq, *d_own = compute.shares(local, merged, k, v, wide=True)
    d_others = [torch.zeros_like(x, dtype=lse.dtype) for x in others_kv]
    compute.add_shares(from_shards, merged, *others_kv, dq, *d_others)
    back = [[x.to("cpu", row.dtype) for x in xs] for xs in ((out, dq), d_own, d_others)]
    return *back[0], back[1], back[2]


def assert_accurate(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """out, dq, dk and dv by their relative L2 error."""
    for what, value, exact in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        error = (value.cpu().double() - exact).norm() / exact.norm()
        assert error <= (OUT if what == "out" else GRADIENT), f"{what}: {error:.2e}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_cuda_kernel_is_among_those_measured():
    assert any(param.values[1] == "torch_cuda" for param in usable())

"""Attention over a packed row equals attention in which every prefix is repeated.

What these tests do not cover: CUDA kernels, and the Megatron modules around the function.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from megatron_prefix.attention.function import prefix_attention
from megatron_prefix.attention.kernels import select_kernel
from megatron_prefix.layout.packing import PackedLayout, pack
from megatron_prefix.layout.tree import PrefixTree
from tests.attention.oracle import (
    assert_close,
    attention_by_sequence,
    dense_attention,
    gradients,
    group,
    random_qkv,
    random_tree,
    stages_of,
    visible_keys,
)

KERNELS = ["reference", "torch_cpu"]

# Of the largest element. float64 kernels differ from the oracle by the order of additions alone.
# In float32 torch's CPU op computes exp with an error of up to 2^-20. In half precision q, k, v and
# dout are the oracle's own, so that what is left is rounding of out (2^-9 and 2^-12, once in the
# result and once inside backward) and of each gradient.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}


def check_against_oracle(
    layout: PackedLayout,
    *,
    kernel: str,
    heads: int = 4,
    kv_heads: int = 4,
    head_dim: int = 32,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> None:
    q, k, v = random_qkv(layout.num_tokens, heads, kv_heads, head_dim, dtype)
    inputs = (q, k, v[..., :value_dim])
    dout = torch.randn(layout.num_tokens, heads, head_dim, dtype=torch.float64)
    dout = dout[..., :value_dim].to(dtype)
    scale = head_dim**-0.5

    exact = tuple(x.double().requires_grad_() for x in inputs)
    expected = dense_attention(*exact, visible_keys(layout), scale)
    expected_grads = gradients(expected, dout.double(), exact)

    inputs = tuple(x.requires_grad_() for x in inputs)
    out = run(layout, inputs, kernel=kernel, scale=scale)
    grads = gradients(out, dout, inputs)

    assert out.dtype == dtype and out.is_contiguous()
    assert_close(out, expected, TOLERANCES[dtype], "out")
    for name, grad, expected_grad in zip(("dq", "dk", "dv"), grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        assert_close(grad, expected_grad, TOLERANCES[dtype], name)


def run(
    layout: PackedLayout,
    inputs: tuple[torch.Tensor, ...],
    *,
    kernel: str = "torch_cpu",
    scale: float = 0.2,
) -> torch.Tensor:
    q = inputs[0]
    chosen = select_kernel(kernel, device=q.device, dtype=q.dtype, head_dim=q.shape[-1])
    return prefix_attention(*inputs, stages_of(layout, q.device), scale=scale, kernel=chosen)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("depth", range(1, 7))
def test_random_trees_of_each_depth(rng, kernel, depth):
    layout = pack(random_tree(rng, max_depth=depth), pad_to_multiple=int(rng.integers(1, 64)))
    assert len(layout.level_starts) == depth + 1
    check_against_oracle(layout, kernel=kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("head_dim", [32, 33, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_head_dims_with_grouped_and_single_key_heads(rng, kernel, head_dim, heads, kv_heads):
    layout = pack(random_tree(rng, max_depth=3, num_nodes=10, max_length=20))
    check_against_oracle(layout, kernel=kernel, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_values_smaller_than_keys(rng, kernel, dtype, heads, kv_heads):
    layout = pack(random_tree(rng, max_depth=3, num_nodes=10, max_length=20))
    check_against_oracle(
        layout, kernel=kernel, heads=heads, kv_heads=kv_heads, value_dim=21, dtype=dtype
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_lower_precision(rng, kernel, dtype, heads, kv_heads):
    layout = pack(random_tree(rng))
    check_against_oracle(layout, kernel=kernel, heads=heads, kv_heads=kv_heads, dtype=dtype)


@pytest.mark.parametrize(
    "groups",
    [
        pytest.param([group(50, [20])], id="one response"),
        pytest.param([group(1, [20, 30])], id="one-token prefix, so nothing is shared"),
        pytest.param([group(2, [1, 1, 1])], id="segments of one token everywhere"),
        pytest.param([group(300, [1, 400, 3, 90])], id="very unequal responses"),
        pytest.param([group(70, [20] * 5)] * 3, id="equal shapes"),
        pytest.param([group(70, [63, 64, 65, 66, 1, 2])], id="around the length that is padded"),
        pytest.param([group(520, [780, 10])], id="longer than a block of queries and of keys"),
    ],
)
def test_groups(rng, groups):
    layout = pack(PrefixTree.from_groups(groups))
    check_against_oracle(layout, kernel="torch_cpu", heads=2, kv_heads=1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_segments_that_nobody_continues_get_no_gradient_from_other_levels(rng, kernel):
    alone, continued = PrefixTree.from_sequences([[1] * 9]), PrefixTree.from_groups([group(7, [5])])
    layout = pack(PrefixTree.concat([alone, continued, alone, alone]))
    assert 0 in np.diff(layout.stages[1].on.cu_q)
    check_against_oracle(layout, kernel=kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_sees_only_itself(rng, kernel):
    check_against_oracle(pack(PrefixTree.from_groups([group(9, [5, 6])]), pad_to=64), kernel=kernel)
    check_against_oracle(pack(PrefixTree.from_groups([]), pad_to=8), kernel=kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_equals_each_sequence_alone(rng, kernel, heads, kv_heads):
    layout = pack(random_tree(rng))
    inputs = tuple(
        x.requires_grad_()
        for x in random_qkv(layout.num_tokens, heads, kv_heads, 32, torch.float64)
    )
    sequences = attention_by_sequence(*inputs, layout, 0.2)
    douts = [torch.randn_like(out) for out in sequences]
    expected_grads = torch.autograd.grad(sequences, inputs, douts)

    out = run(layout, inputs, kernel=kernel)
    dout = torch.zeros_like(out)
    for i, (expected, sequence_dout) in enumerate(zip(sequences, douts, strict=True)):
        rows = torch.from_numpy(layout.sequence_positions(i))
        assert_close(out[rows], expected, 1e-12, f"out of sequence {i}")
        dout[rows] += sequence_dout
    for name, grad, expected in zip(
        ("dq", "dk", "dv"), gradients(out, dout, inputs), expected_grads, strict=True
    ):
        assert_close(grad, expected, 1e-12, name)


def test_large_scores_stay_finite(rng):
    """Stages whose log-sum-exps lie hundreds apart: one of them weighs nothing, none overflows."""
    layout = pack(PrefixTree.from_groups([group(40, [30, 30])]))
    q, k, v = random_qkv(layout.num_tokens, 2, 2, 32, torch.float64)
    k = k.clone()
    k[:20] *= 300
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    out, dout = run(layout, inputs), torch.randn(layout.num_tokens, 2, 32, dtype=torch.float64)
    expected = dense_attention(*inputs, visible_keys(layout), 0.2)
    assert_close(out, expected, 1e-12, "out")
    for grad, other in zip(
        gradients(out, dout, inputs), gradients(expected, dout, inputs), strict=True
    ):
        # Scores of several hundred: their own rounding, 1e-16 of them, is what exp magnifies.
        assert_close(grad, other, 1e-10, "gradient")


@pytest.mark.parametrize("kernel", KERNELS)
def test_views_of_a_fused_projection_give_the_same_bits_as_copies(rng, kernel):
    layout = pack(random_tree(rng))
    views = random_qkv(layout.num_tokens, 4, 2, 32, torch.float32)
    assert not any(x.is_contiguous() for x in views[1:])
    dout = torch.randn(layout.num_tokens, 4, 32)
    results = []
    for inputs in (views, tuple(x.contiguous() for x in views)):
        inputs = tuple(x.detach().requires_grad_() for x in inputs)
        out = run(layout, inputs, kernel=kernel)
        results.append((out, *gradients(out, dout, inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_any_strides_are_accepted(rng):
    layout = pack(random_tree(rng))
    q, k, v = (torch.randn(32, 4, layout.num_tokens).permute(2, 1, 0) for _ in range(3))
    expected = run(layout, (q.contiguous(), k.contiguous(), v.contiguous()))
    assert torch.equal(run(layout, (q, k, v)), expected)
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    run(layout, inputs).sum().backward()  # a dout of stride zero
    assert_close(v.grad.sum(), torch.tensor(4.0 * 32 * layout.num_tokens), 1e-5, "sum of dv")


class SharesThatBfloat16WouldLose:
    """Gradients of 1 from the self stage, and of 2^-9 from the others: 1 + 2^-9 rounds to 1."""

    name, automatic, value_sizes = "stub", False, False

    def forward(self, q, k, v, on, options):
        return torch.zeros_like(q), torch.zeros(q.shape[:2])

    def backward(self, merged, k, v, on, options):
        share = 1.0 if on.causal else 2.0**-9
        return tuple(torch.full_like(x, share) for x in (merged.q, k, v))


def test_half_precision_shares_add_up_in_float32(rng):
    chain = PrefixTree.from_sequences([[0] * 4, [0] * 8, [0] * 12, [0] * 16, [0] * 20])
    layout = pack(chain)
    inputs = tuple(
        x.requires_grad_() for x in random_qkv(layout.num_tokens, 1, 1, 8, torch.bfloat16)
    )
    kernel = SharesThatBfloat16WouldLose()
    out = prefix_attention(*inputs, stages_of(layout), scale=1.0, kernel=kernel)
    dq, dk, _ = gradients(out, torch.ones_like(out), inputs)
    # The deepest segment has four ancestors, the root four descendants: 1 + 4 / 512.
    assert (dq[-1] == 1 + 2**-7).all()
    assert (dk[0] == 1 + 2**-7).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_uninitialised_memory_is_never_read(rng, kernel):
    layout = pack(
        PrefixTree.concat([random_tree(rng), PrefixTree.from_sequences([[1] * 9])]), pad_to=1000
    )
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # every torch.empty is now full of NaN
    try:
        assert torch.empty(4).isnan().all()
        for dtype in (torch.float64, torch.bfloat16):
            check_against_oracle(layout, kernel=kernel, kv_heads=2, dtype=dtype)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(rng, set_threads, dtype):
    set_threads(2)
    layout = pack(random_tree(rng, max_length=150))
    inputs = tuple(x.requires_grad_() for x in random_qkv(layout.num_tokens, 4, 2, 32, dtype))
    dout = torch.randn(layout.num_tokens, 4, 32).to(dtype)
    runs = []
    for _ in range(3):
        out = run(layout, inputs)
        runs.append((out, *gradients(out, dout, inputs)))
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))


def test_only_q_k_v_out_and_lse_are_saved_for_backward(rng):
    layout = pack(random_tree(rng))
    q, k, v = (x.requires_grad_() for x in random_qkv(layout.num_tokens, 4, 2, 32, torch.bfloat16))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = run(layout, (q, k, v))
    assert [x.data_ptr() for x in saved[:4]] == [x.data_ptr() for x in (q, k, v, out)]
    assert [tuple(x.shape) for x in saved[4:]] == [(layout.num_tokens, 4)]


def test_no_gradient_is_wanted(rng):
    layout = pack(random_tree(rng))
    inputs = random_qkv(layout.num_tokens, 4, 2, 32, torch.float32)
    assert not run(layout, inputs).requires_grad


MEASURE_MEMORY = """
import resource, torch
from megatron_prefix.attention.kernels import select_kernel
from megatron_prefix.attention.function import prefix_attention
from megatron_prefix.device_copy import record_to_device
from megatron_prefix.layout.packing import pack
from megatron_prefix.layout.rank_row import rank_row
from megatron_prefix.layout.tree import PrefixTree

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def step(prefix, responses):
    layout = pack(PrefixTree.from_groups([([0] * prefix, [[0] * n for n in responses])]))
    inputs = [torch.randn(layout.num_tokens, 1, 16, requires_grad=True) for _ in range(3)]
    kernel = select_kernel(None, device="cpu", dtype=torch.float32, head_dim=16)
    stages = record_to_device(rank_row(layout).model.stages, "cpu")
    prefix_attention(*inputs, stages, scale=0.2, kernel=kernel).sum().backward()
    return layout.num_tokens

torch.set_num_threads(1)
step(500, [500])
before = peak_bytes()
num_tokens = step(6000, [500, 2500, 3000])
print((peak_bytes() - before) / (4 * num_tokens**2))
"""


def test_memory_stays_far_below_a_matrix_of_scores():
    """Peak memory in units of one float32 [T, T], in a process of its own, with H=1 and D=16."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.05


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5])
def test_a_trimmed_plan_gives_the_rows_of_the_whole_one(rng, kernel, density):
    layout = pack(random_tree(rng, max_depth=4), pad_to_multiple=2)
    needed = np.flatnonzero(rng.random(layout.num_tokens) < density)
    stages = stages_of(layout, needed=needed, multiple=2)
    rows = stages.queries
    assert np.isin(needed, rows).all() and len(rows) % 2 == 0
    q, k, v = random_qkv(layout.num_tokens, 4, 2, 32, torch.float64)
    dout = torch.randn(len(rows), 4, 32, dtype=torch.float64)

    exact = tuple(x.clone().requires_grad_() for x in (q, k, v))
    expected = dense_attention(*exact, visible_keys(layout), 0.2)[rows]
    dq, *d_keys = gradients(expected, dout, exact)

    inputs = tuple(x.clone().requires_grad_() for x in (q[rows], k, v))
    chosen = select_kernel(kernel, device="cpu", dtype=torch.float64, head_dim=32)
    out = prefix_attention(*inputs, stages, scale=0.2, kernel=chosen)
    assert_close(out, expected, TOLERANCES[torch.float64], "out")
    found = gradients(out, dout, inputs)
    for name, a, b in zip(("dq", "dk", "dv"), found, (dq[rows], *d_keys), strict=True):
        assert_close(a, b, TOLERANCES[torch.float64], name)


def test_every_stage_of_the_layout_is_on_the_device_in_the_dtypes_of_kernels(rng):
    layout = pack(random_tree(rng), pad_to_multiple=8)
    stages = stages_of(layout)
    assert stages.num_tokens == stages.num_queries == layout.num_tokens
    assert len(stages.local) == len(layout.stages)
    assert all(s.on.cu_q.dtype == s.on.cu_k.dtype == torch.int32 for s in stages.local)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((1, 19, 4, 32), (19, 4, 32), (19, 4, 32), r"expected \[tokens, heads, head_dim\]"),
        ((18, 4, 32), (18, 4, 32), (18, 4, 32), "the attention plan is for 19 tokens"),
        ((19, 4, 32), (19, 4, 16), (19, 4, 16), "head_dim 32, 16, 16"),
        ((19, 4, 32), (19, 4, 32), (19, 4, 48), "head_dim 32, 32, 48"),
        ((19, 4, 32), (19, 3, 32), (19, 3, 32), "q a multiple of them"),
        ((19, 4, 32), (19, 4, 32), (19, 2, 32), "equally many heads"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(q, k, v, message):
    layout = pack(PrefixTree.from_groups([group(10, [5, 5])]))
    with pytest.raises(ValueError, match=message):
        run(layout, (torch.zeros(q), torch.zeros(k), torch.zeros(v)))


def test_mixed_dtypes_are_refused():
    layout = pack(PrefixTree.from_groups([group(10, [5, 5])]))
    q, k, v = (torch.zeros(19, 4, 32, dtype=d) for d in (torch.bfloat16, torch.bfloat16, None))
    with pytest.raises(ValueError, match=r"v torch\.float32: cast them to one dtype"):
        run(layout, (q, k, v))

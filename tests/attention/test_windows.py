"""Layers with a sliding window or a sink equal dense attention under the window's own mask.

What these tests do not cover: CUDA kernels, and the Megatron modules around the function.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_prefix.attention import kernels
from megatron_prefix.attention.function import prefix_attention
from megatron_prefix.attention.kernels import select_kernel
from megatron_prefix.layout.packing import PackedLayout, pack
from megatron_prefix.layout.tree import PrefixTree
from tests.attention.oracle import (
    assert_close,
    dense_attention,
    gradients,
    group,
    in_window,
    random_qkv,
    random_tree,
    stages_of,
    visible_keys,
)

KERNELS = ["reference", "torch_cpu"]
HEADS, KEY_HEADS, HEAD_DIM, SCALE = 4, 2, 16, 0.3
TOLERANCE = 1e-12  # of the largest element: float64, the order of additions alone
WINDOWS = [0, 4, 63, 400]
"""Keys before a query's own; 400 are more than any sequence has."""


def check(
    layout: PackedLayout,
    window: int | None,
    *,
    kernel: str = "torch_cpu",
    sink: Tensor | None = None,
    needed: np.ndarray | None = None,
) -> None:
    """out, dq, dk, dv and the sink's gradient, of the rows that are computed."""
    options = {} if needed is None else {"needed": needed}
    stages = stages_of(layout, window=window, **options)
    rows = torch.arange(layout.num_tokens) if stages.queries is None else stages.queries
    real = rows < layout.num_tokens - layout.num_padding
    q, k, v = random_qkv(layout.num_tokens, HEADS, KEY_HEADS, HEAD_DIM, torch.float64)
    dout = torch.randn(len(rows), HEADS, HEAD_DIM, dtype=torch.float64) * real[:, None, None]
    visible = visible_keys(layout) if window is None else in_window(layout, window)

    exact = tuple(x.clone().requires_grad_() for x in (q, k, v))
    exact_sink = None if sink is None else sink.clone().requires_grad_()
    expected = dense(*exact, visible, exact_sink)[rows]
    inputs = tuple(x.clone().requires_grad_() for x in (q[rows], k, v))
    own_sink = None if sink is None else sink.clone().requires_grad_()
    windows = window is not None
    chosen = select_kernel(kernel, device="cpu", dtype=q.dtype, head_dim=HEAD_DIM, windows=windows)
    out = prefix_attention(
        *inputs, stages, scale=SCALE, kernel=chosen, windowed=windows, sink=own_sink
    )
    assert_close(out[real], expected[real], TOLERANCE, "out")
    if sink is not None:
        (found,) = torch.autograd.grad(out, own_sink, dout, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected, exact_sink, dout, retain_graph=True)
        assert_close(found, wanted, TOLERANCE, "dsink")
    dq, *found_keys = gradients(out, dout, inputs)
    expected_dq, *expected_keys = gradients(expected, dout, exact)
    if window != 0 or sink is not None:  # a softmax over one key has no gradient
        assert_close(dq, expected_dq[rows], TOLERANCE, "dq")
        assert_close(found_keys[0], expected_keys[0], TOLERANCE, "dk")
    else:
        assert max(float(x.abs().max()) for x in (dq, found_keys[0])) < TOLERANCE
    assert_close(found_keys[1], expected_keys[1], TOLERANCE, "dv")


def dense(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sink: Tensor | None) -> Tensor:
    """`dense_attention`; a sink is one more key, by a softmax that is written out."""
    if sink is None:
        return dense_attention(q, k, v, visible, SCALE)
    k, v = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (k, v))
    scores = SCALE * torch.einsum("qhd,khd->hqk", q, k)
    weights = scores.exp() * visible
    weights = weights / (weights.sum(-1, keepdim=True) + sink.exp()[:, None, None])
    return torch.einsum("hqk,khd->qhd", weights, v)


def random_sink() -> Tensor:
    return torch.randn(HEADS, dtype=torch.float64)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("depth", [1, 3, 6])
def test_windows_on_random_trees(rng, kernel, window, depth):
    layout = pack(random_tree(rng, max_depth=depth), pad_to_multiple=int(rng.integers(1, 64)))
    check(layout, window, kernel=kernel)


@pytest.mark.parametrize("window", [None, *WINDOWS])
@pytest.mark.parametrize("sink", ["zero", "random"])
def test_sinks_with_and_without_windows(rng, window, sink):
    layout = pack(random_tree(rng, max_depth=3), pad_to_multiple=16)
    check(layout, window, sink=torch.zeros(HEADS).double() if sink == "zero" else random_sink())


@pytest.mark.parametrize("window", WINDOWS)
def test_a_trimmed_last_layer(rng, window):
    layout = pack(random_tree(rng, max_depth=3), pad_to_multiple=16)
    last = [layout.sequence_positions(i)[-3:] for i in range(layout.tree.num_sequences)]
    check(layout, window, needed=np.concatenate(last), sink=random_sink())


def test_a_halo_reaches_over_ancestors_of_one_token(rng):
    sequences = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 8, 9], [1, 2, 3, 10, 11], [1, 2, 12, 13, 14]]
    layout = pack(PrefixTree.from_sequences(sequences))
    assert min(segment.length for segment in layout.segments) == 1
    for window in range(1, 7):
        check(layout, window)


def test_a_segment_copies_no_more_than_the_windows_rows_of_its_prefix():
    layout = pack(PrefixTree.from_groups([group(500, [20] * 8)]))
    stage = stages_of(layout, window=9).windowed.stage
    assert len(stage.keys) == layout.num_tokens + 8 * 9


def test_a_window_longer_than_every_sequence_copies_nothing():
    layout = pack(PrefixTree.from_groups([group(50, [20] * 8)]))
    assert stages_of(layout, window=layout.max_seqlen - 1).windowed is None
    assert stages_of(layout, window=layout.max_seqlen - 2).windowed is not None
    check(layout, layout.max_seqlen - 1)
    check(layout, layout.max_seqlen - 2)


class CountedPairs(TorchDispatchMode):
    """Counts the pairs of a query and a key that torch's attention computes, of all heads."""

    total = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name()
        if "scaled_dot_product" in name:
            q, k = args[1:3] if name.endswith("backward") else args[:2]
            self.total += q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        return op(*args, **(kwargs or {}))


def work(prefix: int, responses: list[int], window: int | None) -> int:
    """Pairs of a group's attention, forward and backward, of each head."""
    layout = pack(PrefixTree.from_groups([group(prefix, responses)]))
    inputs = random_qkv(layout.num_tokens, 1, 1, HEAD_DIM, torch.float32)
    windows = window is not None
    with CountedPairs() as counted:
        out = prefix_attention(
            *(x.requires_grad_() for x in inputs),
            stages_of(layout, window=window),
            scale=SCALE,
            kernel=select_kernel(
                "torch_cpu", device="cpu", dtype=torch.float32, head_dim=HEAD_DIM, windows=windows
            ),
            windowed=windows,
        )
        out.backward(torch.ones_like(out))
    return counted.total


@pytest.mark.parametrize("window", [4, 63, 300])
def test_a_prefix_twice_as_long_adds_nothing_to_the_work_of_its_responses(window):
    responses = [40, 37, 1, 90]
    # A prompt's last token is an input of the responses. Whole blocks leave none to be padded.
    shorter, longer = 4 * 512 + 1, 8 * 512 + 1
    prompts = [work(length, [1], window) for length in (shorter, longer)]
    groups = [work(length, responses, window) for length in (shorter, longer)]
    assert groups[1] - groups[0] == prompts[1] - prompts[0] > 0
    # Forward and backward: every query of a block has its window and the block.
    block = min(max(window + 1, 32), 256)
    assert prompts[1] - prompts[0] == 2 * (longer - shorter) * (window + block)


def test_without_a_window_a_longer_prefix_adds_work_to_its_responses():
    responses = [40, 37, 1, 90]
    of_responses = [work(n, responses, None) - work(n, [1], None) for n in (2049, 4097)]
    assert of_responses[1] > 1.8 * of_responses[0]


def test_the_same_inputs_give_the_same_gradients_to_the_bit(rng):
    layout = pack(PrefixTree.from_groups([group(40, [9] * 30)]))
    stages = stages_of(layout, window=7)
    inputs = [x.requires_grad_() for x in random_qkv(layout.num_tokens, 4, 2, 16, torch.float32)]
    kernel = select_kernel(None, device="cpu", dtype=torch.float32, head_dim=16, windows=True)
    first, second = (
        torch.autograd.grad(
            prefix_attention(*inputs, stages, scale=SCALE, kernel=kernel, windowed=True).sum(),
            inputs,
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_kernels_without_windows_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(kernels.TorchCpuKernel, "windows", False)
    kernels._reasons.cache_clear()
    try:
        with pytest.raises(
            ValueError, match=r"torch_cpu.*sliding windows: its sliding windows are"
        ):
            select_kernel("torch_cpu", device="cpu", dtype=torch.float32, head_dim=16, windows=True)
    finally:
        kernels._reasons.cache_clear()

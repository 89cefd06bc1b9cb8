"""Each kernel keeps the contract of `kernels/base.py`, and the registry chooses by it."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_prefix.attention import kernels
from megatron_prefix.attention.kernel_names import cpu_kernel_names
from megatron_prefix.attention.kernels import (
    CallOptions,
    MergedAttention,
    kernel_names,
    select_kernel,
    torch_cpu,
)
from tests.attention.oracle import assert_close, rectangles

CAUSAL = [
    [5],
    [7, 7, 7],
    [1, 1, 1, 2, 1],
    [3, 80, 5, 64, 65, 5, 33, 200, 1],
    [800, 20, 20, 600],
]
RECTANGLES = [
    [(5, 9)],
    [(4, 6), (4, 6), (1, 30)],
    [(0, 4), (6, 3), (0, 7), (0, 7)],
    [(0, 4), (0, 2)],
    [(900, 40), (3, 1100), (1, 1)],
]
CALLS = [(True, [(n, n) for n in lengths]) for lengths in CAUSAL]
CALLS += [(False, shapes) for shapes in RECTANGLES]


CPU_KERNELS = [
    name
    for name in kernel_names()
    if kernels._reasons(torch.device("cpu"), torch.float64, 40, True)[name] is None
]


def test_the_names_for_the_cpu_are_those_of_the_kernels_that_compute_there():
    assert sorted(cpu_kernel_names()) == sorted(CPU_KERNELS)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CPU_KERNELS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(("causal", "shapes"), CALLS)
def test_forward_and_backward_of_each_rectangle(
    rng, set_threads, name, heads, kv_heads, causal, shapes, threads
):
    """With more threads than key heads, torch_cpu's backward takes another path."""
    set_threads(threads)
    check_call(name, heads, kv_heads, causal, shapes)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(("causal", "shapes"), CALLS)
def test_torch_cpu_where_the_op_cannot_read_shared_heads(
    rng, monkeypatch, heads, kv_heads, causal, shapes
):
    """The path of torch before 2.9."""
    monkeypatch.setattr(torch_cpu, "_READS_SHARED_HEADS", False)
    check_call("torch_cpu", heads, kv_heads, causal, shapes)


def check_call(
    name: str, heads: int, kv_heads: int, causal: bool, shapes: list[tuple[int, int]]
) -> None:
    """Against autograd through plain attention, with other keys that a second call would see."""
    head_dim, scale, num_others = 40, 0.3, 11
    q_lengths, k_lengths = ([int(n) for n in lengths] for lengths in zip(*shapes, strict=True))
    tq, tk = sum(q_lengths), sum(k_lengths)
    q, dout = (torch.randn(tq, heads, head_dim, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(tk, kv_heads, head_dim, dtype=torch.float64) for _ in range(2))
    other_k, other_v = (torch.randn(num_others, heads, head_dim, dtype=q.dtype) for _ in range(2))

    leaves = tuple(x.clone().requires_grad_() for x in (q, k, v))
    outs, lses, merged_outs, merged_lses = [], [], [], []
    k_start = q_start = 0
    for q_length, k_length in shapes:
        queries, keys = slice(q_start, q_start + q_length), slice(k_start, k_start + k_length)
        q_start, k_start = queries.stop, keys.stop
        q_i = leaves[0][queries]
        k_i, v_i = (x[keys].repeat_interleave(heads // kv_heads, 1) for x in leaves[1:])
        scores = scale * torch.einsum("qhd,khd->qhk", q_i, k_i)
        if causal:
            hidden = torch.ones(q_length, k_length, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden[:, None], -torch.inf)
        other_scores = scale * torch.einsum("qhd,khd->qhk", q_i.detach(), other_k)
        lses.append(scores.logsumexp(-1))
        outs.append(torch.einsum("qhk,khd->qhd", scores.softmax(-1), v_i))
        together = torch.cat([scores, other_scores], -1)
        merged_lses.append(together.logsumexp(-1))
        values = torch.cat([v_i, other_v])
        merged_outs.append(torch.einsum("qhk,khd->qhd", together.softmax(-1), values))
    merged_out, merged_lse = torch.cat(merged_outs), torch.cat(merged_lses)
    expected_grads = torch.autograd.grad(merged_out, leaves, dout)

    kernel = select_kernel(name, device="cpu", dtype=q.dtype, head_dim=head_dim)
    on = rectangles(q_lengths, k_lengths, causal=causal)
    out, lse = kernel.forward(q, k, v, on, CallOptions(scale=scale))
    merged = MergedAttention(dout=dout, q=q, out=merged_out.detach(), lse=merged_lse.detach())
    grads = kernel.backward(merged, k, v, on, CallOptions(scale=scale))
    if tq:
        assert_close(out, torch.cat(outs), 1e-12, "out")
        assert_close(lse, torch.cat(lses), 1e-12, "lse")
    for share, expected in zip(grads, expected_grads, strict=True):
        assert share.shape == expected.shape
        assert torch.allclose(share, expected, rtol=1e-12, atol=1e-12)


def test_half_precision_gradients_are_not_rounded_block_by_block(rng):
    """5,000 queries add up into one key's gradient, as in a prefix that many responses share."""
    q, dout = (torch.randn(5000, 2, 32).bfloat16() for _ in range(2))
    k, v = (torch.randn(8, 2, 32).bfloat16() for _ in range(2))
    shares = {}
    for name, dtype in (("torch_cpu", torch.bfloat16), ("reference", torch.float64)):
        kernel = select_kernel(name, device="cpu", dtype=dtype, head_dim=32)
        on = rectangles([5000], [8], causal=False)
        queries, *keys = (x.to(dtype) for x in (q, k, v))
        out, lse = kernel.forward(queries, *keys, on, CallOptions(scale=0.2))
        merged = MergedAttention(dout=dout.to(dtype), q=queries, out=out, lse=lse)
        shares[name] = kernel.backward(merged, *keys, on, CallOptions(scale=0.2))
    for share, expected in zip(shares["torch_cpu"], shares["reference"], strict=True):
        assert_close(share, expected, 1e-5, "gradient")  # float32: 2^-20 of exp, 5,000 terms


def test_torch_still_has_the_cpu_ops():
    forward, backward = (
        [a.name for a in op.default._schema.arguments]
        for op in (torch_cpu._FORWARD, torch_cpu._BACKWARD)
    )
    assert forward == ["query", "key", "value", "dropout_p", "is_causal", "attn_mask", "scale"]
    assert backward == [
        *("grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p", "is_causal"),
        *("attn_mask", "scale"),
    ]


def test_the_op_reads_shared_heads_since_torch_2_9():
    if not torch_cpu._READS_SHARED_HEADS:
        pytest.skip("torch before 2.9, whose op would read beyond the end of k and v")
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    out, _ = torch_cpu._FORWARD(q, k, v)
    expected = scaled_dot_product_attention(q, *(x.repeat_interleave(2, 1) for x in (k, v)))
    assert_close(out, expected, 1e-6, "out")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_the_cpu_gets_torch_cpu(dtype):
    assert select_kernel(None, device="cpu", dtype=dtype, head_dim=64).name == "torch_cpu"


def test_an_unknown_kernel_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"kernel 'flash'.*torch_cpu, reference"):
        select_kernel("flash", device="cpu", dtype=torch.float32, head_dim=64)


def test_an_unsupported_dtype_is_refused_with_the_kernels_that_can():
    with pytest.raises(ValueError, match=r"float8_e4m3fn.* is none of .*that can: reference"):
        select_kernel("torch_cpu", device="cpu", dtype=torch.float8_e4m3fn, head_dim=64)
    with pytest.raises(ValueError, match=r"int32, head_dim 64 \(.*torch_cpu: .*; reference: "):
        select_kernel(None, device="cpu", dtype=torch.int32, head_dim=64)


def test_the_dense_reference_is_only_chosen_by_name():
    with pytest.raises(ValueError, match=r"device meta is not a CPU; reference: must be named"):
        select_kernel(None, device="meta", dtype=torch.float32, head_dim=64)
    named = select_kernel("reference", device="meta", dtype=torch.float32, head_dim=64)
    assert named.name == "reference"


def test_the_choice_is_logged_once(caplog):
    kernels._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="megatron_prefix"):
        for _ in range(3):
            select_kernel(None, device="cpu", dtype=torch.float32, head_dim=48)
    assert [r.getMessage() for r in caplog.records] == [
        "attention kernel torch_cpu for cpu, torch.float32, head_dim 48"
    ]


def test_attention_needs_no_megatron():
    code = (
        "import sys; from megatron_prefix.attention import row_attention, self_check; "
        "assert not any(m.split('.')[0] == 'megatron' for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

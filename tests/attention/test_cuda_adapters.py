"""What can be known of the CUDA adapters without a GPU: schemas, shapes, layouts, refusals.

torch's ops are called with meta tensors, which binds and checks every argument and returns the
right shapes without data. The numbers are checked in test_kernel_accuracy.py, where there is a GPU.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_prefix.attention import kernels
from megatron_prefix.attention.kernels import (
    CallOptions,
    KernelInputs,
    MergedAttention,
    Rectangles,
    TorchCudaKernel,
    kernel_names,
    select_kernel,
    usable_kernels,
)
from megatron_prefix.attention.kernels import flash_attn as flash_attn_kernels
from megatron_prefix.attention.kernels import torch_cuda as torch_cuda_kernel
from megatron_prefix.attention.kernels.cuda_varlen import (
    lse_from_heads,
    lse_from_padded,
    lse_to_heads,
    lse_to_padded,
)
from megatron_prefix.attention.kernels.flash_attn import (
    FlashAttn2Kernel,
    FlashAttn3Kernel,
    FlashAttn4Kernel,
)
from megatron_prefix.attention.kernels.flash_attn_calls import WINDOW, BoundPackage
from tests.attention.oracle import rectangles

CUDA = torch.device("cuda")
RANDOM_STATE = torch_cuda_kernel._random_state(torch.device("meta"))


def test_torch_still_has_the_cuda_ops():
    forward, backward = (
        [argument.name for argument in op.default._schema.arguments]
        for op in (torch_cuda_kernel._FORWARD, torch_cuda_kernel._BACKWARD)
    )
    assert forward[:11] == [
        *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p"),
        *("is_causal", "return_debug_mask", "scale"),
    ]
    assert backward[:12] == [
        *("grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k"),
        *("max_q", "max_k", "dropout_p", "is_causal"),
    ]
    assert backward[12:14] in (["rng_state", "unused"], ["philox_seed", "philox_offset"])
    assert backward[14] == "scale"


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1)])
@pytest.mark.parametrize("q_lengths", [[5, 7], [1, 0, 1], [0, 0]])
def test_torch_cuda_binds_and_returns_the_contracts_shapes(heads, kv_heads, q_lengths):
    tq, tk, n = sum(q_lengths), 9, len(q_lengths)
    mixed = torch.empty(tk, kv_heads, 3 * 32, device="meta", dtype=torch.bfloat16)
    k, v, _ = mixed.split(32, dim=-1)
    q, dout, out = (
        torch.empty(tq, heads, 32, device="meta", dtype=torch.bfloat16) for _ in range(3)
    )
    cu = torch.empty(n + 1, device="meta", dtype=torch.int32)
    kernel = TorchCudaKernel()
    on = Rectangles(cu_q=cu, cu_k=cu, max_q=max(q_lengths), max_k=9, causal=False)
    found, lse = kernel.forward(q, k, v, on, CallOptions(scale=0.2))
    assert found.shape == q.shape and found.dtype == torch.bfloat16
    assert lse.shape == (tq, heads) and lse.dtype == torch.float32
    for deterministic in (False, True):
        grads = kernel.backward(
            MergedAttention(dout=dout, q=q, out=out, lse=lse),
            *(k, v, on),
            CallOptions(scale=0.2, deterministic=deterministic),
        )
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def test_torch_cuda_hands_windows_to_forward_and_backward(monkeypatch):
    """Bound to the ops of this torch by meta tensors; a window is one-sided."""
    given = []
    for name in ("_FORWARD", "_BACKWARD"):
        op = getattr(torch_cuda_kernel, name)

        def call(*arguments, op=op, **options):
            given.append((options.get("window_size_left"), options.get("window_size_right")))
            return op(*arguments, **options)

        monkeypatch.setattr(torch_cuda_kernel, name, call)
    monkeypatch.setattr(torch_cuda_kernel, "lse_is_padded", lambda: False)
    monkeypatch.setattr(torch_cuda_kernel, "_random_state", lambda _: RANDOM_STATE)
    q, k = (torch.empty(n, 4, 32, device="meta", dtype=torch.bfloat16) for n in (6, 11))
    cu = torch.empty(3, device="meta", dtype=torch.int32)
    kernel, options = TorchCudaKernel(), CallOptions(scale=0.2)
    for window in (5, None):
        on = Rectangles(cu_q=cu, cu_k=cu, max_q=6, max_k=9, causal=True, window=window)
        out, lse = kernel.forward(q, k, k, on, options)
        kernel.backward(MergedAttention(dout=q, q=q, out=out, lse=lse), k, k, on, options)
    assert given == [(5, 0), (5, 0), (None, None), (None, None)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2)])
def test_one_query_per_rectangle_is_not_announced_as_such(monkeypatch, heads, kv_heads):
    """FlashAttention-2 then reads one from every rectangle, also from those that have none."""
    announced = []
    kernel = TorchCudaKernel()
    monkeypatch.setattr(
        kernel,
        "run_forward",
        lambda q, k, v, on, *_: announced.append((on.max_q, on.max_k)) or (q, q[..., 0]),
    )
    q, k = torch.empty(2, heads, 8), torch.empty(3, kv_heads, 8)
    for max_q, max_k, causal in ((1, 1, True), (5, 9, False)):
        on = Rectangles(cu_q=None, cu_k=None, max_q=max_q, max_k=max_k, causal=causal)
        kernel.forward(q, k, k, on, CallOptions(scale=1.0))
    assert announced == [(2, 2), (5, 9)]


def test_calls_without_queries_give_zero_gradients():
    for kernel in (TorchCudaKernel(), FlashAttn2Kernel(), FlashAttn3Kernel(), FlashAttn4Kernel()):
        q, k = torch.empty(0, 4, 8).bfloat16(), torch.empty(3, 2, 8).bfloat16()
        on = rectangles([0], [3], causal=False)
        out, lse = kernel.forward(q, k, k, on, CallOptions(scale=1.0))
        assert out.shape == (0, 4, 8) and lse.shape == (0, 4) and lse.dtype == torch.float32
        merged = MergedAttention(dout=out, q=q, out=out, lse=lse)
        dq, dk, dv = kernel.backward(merged, k, k, on, CallOptions(scale=1.0))
        assert dq.shape == q.shape and not dk.any() and not dv.any() and dk.dtype == k.dtype


def test_the_lse_of_heads_is_a_view_and_comes_back_without_a_copy():
    lse = torch.randn(3, 17)
    ours = lse_from_heads(lse)
    assert torch.equal(ours, lse.T)
    assert ours.data_ptr() == lse.data_ptr() == lse_to_heads(ours).data_ptr()
    part = lse_to_heads(ours[4:9])
    assert part.is_contiguous() and torch.equal(part, lse[:, 4:9])


def test_the_padded_lse_there_and_back():
    lengths = [3, 0, 1, 5, 0]
    cu_q = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    padded = torch.full((5, 2, 6), torch.nan)
    expected = torch.randn(9, 2)
    row = 0
    for i, length in enumerate(lengths):
        for j in range(length):
            padded[i, :, j] = expected[row]
            row += 1
    assert torch.equal(lse_from_padded(padded, cu_q, 9), expected)
    back = lse_to_padded(expected, cu_q, 6)
    assert torch.equal(torch.where(padded.isnan(), 0.0, padded), back)


@pytest.mark.parametrize("name", ["flash_attn_3", "flash_attn_4", "flash_attn_2", "torch_cuda"])
def test_a_cuda_kernel_is_refused_on_the_cpu(name):
    with pytest.raises(ValueError, match=f"{name}.*device cpu is not a CUDA device.*torch_cpu"):
        select_kernel(name, device="cpu", dtype=torch.bfloat16, head_dim=64)


def test_the_order_on_cuda():
    assert kernel_names()[:4] == ("flash_attn_3", "flash_attn_4", "flash_attn_2", "torch_cuda")


@pytest.fixture
def on_gpu(monkeypatch):
    """Lets kernels believe in a GPU of a given compute capability."""

    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        monkeypatch.setattr(flash_attn_kernels, "load", lambda package: object())
        kernels._reasons.cache_clear()

    yield pretend
    kernels._reasons.cache_clear()


@pytest.mark.parametrize(
    ("kernel", "capability", "dtype", "head_dim", "deterministic", "reason"),
    [
        (TorchCudaKernel(), (9, 0), torch.bfloat16, 128, True, None),
        (TorchCudaKernel(), (9, 0), torch.float16, 256, True, None),
        (TorchCudaKernel(), (9, 0), torch.float32, 64, False, "torch.float32 is none of"),
        (TorchCudaKernel(), (9, 0), torch.bfloat16, 84, False, "head_dim 84 is not a multiple"),
        (TorchCudaKernel(), (9, 0), torch.bfloat16, 264, False, "multiple of 8 up to 256"),
        (TorchCudaKernel(), (7, 5), torch.float16, 64, False, "capability 7.5 is below 8.0"),
        (TorchCudaKernel(), (8, 9), torch.float16, 256, False, "head_dim 256 has no backward"),
        (FlashAttn2Kernel(), (8, 0), torch.bfloat16, 256, True, None),
        (FlashAttn2Kernel(), (7, 5), torch.float16, 64, False, "7.5 is not 8.0 or above"),
        (FlashAttn3Kernel(), (9, 0), torch.bfloat16, 256, False, None),
        (FlashAttn3Kernel(), (9, 0), torch.bfloat16, 192, True, None),
        (FlashAttn3Kernel(), (9, 0), torch.bfloat16, 200, True, "ends at head_dim 192"),
        (FlashAttn3Kernel(), (10, 0), torch.bfloat16, 64, False, "10.0 is not 9.x (Hopper)"),
        (FlashAttn4Kernel(), (10, 0), torch.bfloat16, 128, True, None),
        (FlashAttn4Kernel(), (9, 0), torch.bfloat16, 192, False, "multiple of 8 up to 128"),
        (FlashAttn4Kernel(), (12, 0), torch.bfloat16, 64, False, "12.0 is not 9.x, 10.x or 11.x"),
    ],
)
def test_what_a_kernel_cannot_do_on_a_gpu(
    on_gpu, kernel, capability, dtype, head_dim, deterministic, reason
):
    on_gpu(capability)
    found = kernel.unsupported(
        KernelInputs(device=CUDA, dtype=dtype, head_dim=head_dim, deterministic=deterministic)
    )
    if reason is None:
        assert found is None
    else:
        assert reason in found


def test_what_cannot_be_deterministic_is_refused_by_name_and_not_chosen(on_gpu):
    on_gpu((9, 0))
    inputs = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 256}
    assert select_kernel(None, **inputs).name == "flash_attn_3"
    assert select_kernel(None, **inputs, deterministic=True).name == "flash_attn_2"
    with pytest.raises(ValueError, match=r"head_dim 256, deterministic: its deterministic back"):
        select_kernel("flash_attn_3", **inputs, deterministic=True)


def test_the_beta_of_flash_attention_4_is_only_chosen_by_name(on_gpu):
    """On Blackwell it is the first of the kernels that can."""
    on_gpu((10, 0))
    inputs = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 128}
    assert usable_kernels(*inputs.values())[0] == "flash_attn_4"
    assert select_kernel(None, **inputs).name == "flash_attn_2"
    assert select_kernel("flash_attn_4", **inputs).name == "flash_attn_4"


@pytest.mark.parametrize("kernel", [FlashAttn2Kernel(), FlashAttn3Kernel(), FlashAttn4Kernel()])
def test_windows_of_flash_attn_packages(on_gpu, monkeypatch, kernel):
    """They are handed to both calls, and refused where a release does not take them."""
    on_gpu((9, 0))
    inputs = KernelInputs(device=CUDA, dtype=torch.bfloat16, head_dim=64, windows=True)
    given = []

    def call(**values):
        given.append({name: values.get(name, "nothing") for name in WINDOW})
        return values["q"], values["q"][..., 0].T

    def package(windows):
        return BoundPackage(forward=call, backward=call, windows=windows)

    monkeypatch.setattr(flash_attn_kernels, "load", lambda _: package(False))
    assert kernel.unsupported(inputs) == (
        f"this release of {kernel.package.name} takes no window_size_left"
    )
    monkeypatch.setattr(flash_attn_kernels, "load", lambda _: package(True))
    assert kernel.unsupported(inputs) is None
    q = torch.empty(3, 2, 8).bfloat16()
    for window in (4, None):
        on = dataclasses.replace(rectangles([3], [3], causal=True), window=window)
        out, lse = kernel.forward(q, q, q, on, CallOptions(scale=1.0))
        merged = MergedAttention(dout=q, q=q, out=out, lse=lse.float())
        kernel.backward(merged, q, q, on, CallOptions(scale=1.0))
    none = dict.fromkeys(WINDOW, "nothing")
    assert given == [dict(zip(WINDOW, (4, 0), strict=True))] * 2 + [none] * 2


def test_without_packages_torchs_own_kernel_is_chosen(on_gpu, monkeypatch):
    on_gpu((9, 0))
    monkeypatch.setattr(flash_attn_kernels, "load", lambda package: "it is not installed")
    chosen = select_kernel(None, device="cuda", dtype=torch.bfloat16, head_dim=128)
    assert chosen.name == "torch_cuda"


@pytest.mark.parametrize(
    ("flags", "head_dim", "reason"),
    [
        ({"FLASHATTENTION_DISABLE_BACKWARD": True}, 64, "built with FLASHATTENTION_DISABLE_BACK"),
        ({"FLASHATTENTION_DISABLE_VARLEN": True}, 64, "built with FLASHATTENTION_DISABLE_VARLEN"),
        ({"FLASHATTENTION_DISABLE_HDIM256": True}, 256, "for head_dim up to 192, below 256"),
        ({"FLASHATTENTION_DISABLE_HDIM64": True}, 64, None),
        ({"FLASHATTENTION_DISABLE_FP16": True}, 64, None),
    ],
)
def test_what_a_build_of_flash_attention_3_leaves_out(on_gpu, monkeypatch, flags, head_dim, reason):
    on_gpu((9, 0))
    monkeypatch.setattr(flash_attn_kernels, "_build_flags", lambda: flags)
    found = FlashAttn3Kernel().unsupported(
        KernelInputs(device=CUDA, dtype=torch.bfloat16, head_dim=head_dim)
    )
    assert (found is None) if reason is None else (reason in found)

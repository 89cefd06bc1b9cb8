"""A microbatch runs forward and backward without the host waiting for the device.

Without a GPU the device is "meta": its tensors have no data, so whatever would read them on the
host (item, tolist, bool, nonzero, a copy to the CPU) raises. It runs through torch's CUDA flash
attention, whose argument binding and shapes are checked on the way. What this does not cover: MoE,
whose dispatcher reads token counts on the host, the exchange of shapes between pipeline stages, and
the optimizer, all of which are Megatron's; and waits inside CUDA libraries, which the last test
covers where there is a GPU.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_prefix.attention import kernels
from megatron_prefix.attention.kernels import TorchCudaKernel, select_kernel
from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.config import ParallelConfig
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.layout import pack
from megatron_prefix.megatron.cpu_device import disable_cpu_device
from megatron_prefix.model.build import build_gpt_model
from megatron_prefix.model.head import LogProbHead
from megatron_prefix.model.transformer_config import transformer_config
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.training.batch import PackedBatch
from megatron_prefix.training.batch_planning import build_batch
from megatron_prefix.training.entries import TrainedSequence
from megatron_prefix.training.step import _forward_step
from tests.megatron.models import TRAINING, model_config, random_groups, single_process

MODEL = model_config({"kv_channels": 16, "qk_layernorm": True})
OBJECTIVE = ObjectiveConfig(name="gspo", kl_coefficient=0.1, entropy_coefficient=0.1)


def build(device: str, kernel: str | None) -> tuple[GPTModel, LogProbHead]:
    """A model in bfloat16 with the log-probability head."""
    training = dataclasses.replace(TRAINING, dtype="bfloat16", device=device, kernel=kernel)
    config = transformer_config(MODEL, ParallelConfig(), training)
    model = build_gpt_model(MODEL, config).bfloat16()
    head = LogProbHead.of(model, vocab_size=MODEL.vocab_size, chunk_tokens=8)
    return model, head


def batch_on(device: torch.device, kernel: str | None, *, deterministic: bool) -> PackedBatch:
    """Two groups and the log-probabilities that the objective wants."""
    tree = random_groups(np.random.default_rng(0), [(9, [5, 6]), (4, [3, 1])])
    sequences = [
        TrainedSequence(
            first_trained=len(tree.sequence_tokens(i)) - n,
            weight=0.1,
            advantage=(-1.0) ** i,
            old_logprobs=np.full(n, -3.0),
        )
        for i, n in enumerate((5, 6, 3, 1))
    ]
    inputs = {"device": device, "dtype": torch.bfloat16, "head_dim": 16}
    batch = build_batch(
        pack(tree),
        sequences,
        AttentionSetup(
            device=device,
            kernel=select_kernel(kernel, **inputs),
            deterministic=deterministic,
        ),
        trim_last_layer=True,
    )
    assert batch.params.last_layer is not None
    batch.reference_logprobs = batch.old_logprobs - 0.5
    return batch


def run_microbatch(model: GPTModel, head: LogProbHead, batch: PackedBatch) -> torch.Tensor:
    """Forward and backward, by the functions that a train step is made of."""
    chunks = SimpleNamespace(head=head, wrapped=[model], config=model.config)
    output, loss_function = _forward_step(
        iter([batch]),
        model,
        chunks=chunks,
        objective=OBJECTIVE,
        with_gradients=True,
        replays=False,
    )
    loss, _, metrics = loss_function(output)
    loss.backward()
    return metrics.stack()


def on_meta(value: Any) -> Any:
    """Tensors as meta tensors; dataclasses and tuples with such in them."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device="meta"
        ).requires_grad_(value.requires_grad)
    if isinstance(value, tuple):
        return tuple(on_meta(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(result, field.name, on_meta(getattr(value, field.name)))
        return result
    return value


def to_meta_(model: GPTModel) -> None:
    """Parameters, buffers and RoPE frequencies (a plain attribute), in place."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers, module.__dict__):
            for name, value in list(tensors.items()):
                if isinstance(value, torch.nn.Parameter):
                    parameter = torch.nn.Parameter(on_meta(value.detach()))
                    parameter.__dict__.update(value.__dict__)
                    tensors[name] = parameter
                elif isinstance(value, torch.Tensor):
                    tensors[name] = on_meta(value)


class CudaIsMeta(TorchFunctionMode):
    """What is made on CUDA is made on meta."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class Calls(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def meta_model(monkeypatch) -> Iterator[tuple[GPTModel, LogProbHead]]:
    with single_process(float64=False):
        model, head = build("cpu", None)
        disable_cpu_device()
        to_meta_(model)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
        monkeypatch.setattr(TorchCudaKernel, "unsupported", lambda *_, **__: None)
        kernels._reasons.cache_clear()
        yield model, head
    kernels._reasons.cache_clear()


def meta_batch(deterministic: bool = False) -> PackedBatch:
    return on_meta(batch_on(torch.device("cpu"), "torch_cuda", deterministic=deterministic))


def test_a_microbatch_reads_nothing_of_the_device_on_the_host(meta_model):
    model, head = meta_model
    with CudaIsMeta(), Calls() as calls:
        metrics = run_microbatch(model, head, meta_batch())
    assert metrics.device.type == "meta"
    for parameter in model.parameters():
        assert parameter.grad.shape == parameter.shape and parameter.grad.dtype == torch.bfloat16
    # Two layers of two stages each, and not torch's dense attention.
    assert calls.names.count("_flash_attention_backward") == 4


def test_a_read_on_the_host_would_be_noticed(meta_model, monkeypatch):
    """With the RoPE of Megatron given cu_seqlens on the device, as it would be without us."""
    model, head = meta_model
    batch = meta_batch()
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: batch.params.cu_seqlens_q)
    with CudaIsMeta(), pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        run_microbatch(model, head, batch)


def test_deterministic_reaches_the_kernel_and_ends_with_it(meta_model):
    model, head = meta_model
    seen = []

    class Deterministic(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ == "_flash_attention_backward":
                seen.append(torch.are_deterministic_algorithms_enabled())
            return func(*args, **(kwargs or {}))

    for deterministic in (False, True):
        with CudaIsMeta(), Deterministic():
            run_microbatch(model, head, meta_batch(deterministic))
    assert seen == [False] * 4 + [True] * 4
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_reaches_megatron_too():
    for deterministic in (False, True):
        training = dataclasses.replace(TRAINING, deterministic=deterministic)
        config = transformer_config(MODEL, ParallelConfig(), training)
        assert config.deterministic_mode == deterministic


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_microbatch_never_waits_for_the_gpu(deterministic):
    with runtime(ParallelConfig(), device="cuda", seed=3, timeout_minutes=2) as place:
        model, head = build("cuda", None)
        model.cuda()
        # The first run may wait: it compiles kernels and fills caches.
        run_microbatch(model, head, batch_on(place.device, None, deterministic=deterministic))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            batch = batch_on(place.device, None, deterministic=deterministic)
            run_microbatch(model, head, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

"""Steps under `gradient_accumulation_fusion`, whose microbatches are not trimmed alike.

Apex's `fused_weight_gradient_mlp_cuda` is a CUDA kernel that adds a weight's gradient to
`main_grad`. A STUB of it does that on the CPU; all else is Megatron's own.
"""

from __future__ import annotations

import dataclasses
import functools
import types

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import layers

from megatron_prefix.config import ParallelConfig
from megatron_prefix.config.packing import packing_of_run
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layout import PrefixTree, pack
from megatron_prefix.model.build import build_model_chunks, model_shape
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.rollouts.records import RolloutGroup
from megatron_prefix.training.batch import PackedBatch
from megatron_prefix.training.minibatch import build_minibatch
from megatron_prefix.training.step import accumulate_gradients
from tests.megatron.models import ON_CPU, TRAINING, model_config, relative_error, single_process


class _StubOfApex(types.ModuleType):
    """Counts what it does, so that a test sees that it was used."""

    calls = 0

    def wgrad_gemm_accum_fp32(
        self, inputs: torch.Tensor, gradient: torch.Tensor, main_gradient: torch.Tensor
    ) -> None:
        self.calls += 1
        main_gradient.add_(gradient.t() @ inputs)


@pytest.fixture
def stub_of_apex(monkeypatch: pytest.MonkeyPatch) -> _StubOfApex:
    stub = _StubOfApex("fused_weight_gradient_mlp_cuda")
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", stub, raising=False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    return stub


def _group(prompt: int, response: int) -> RolloutGroup:
    rng = np.random.default_rng(prompt)
    return RolloutGroup(
        prompt=tuple(rng.integers(0, 61, prompt).tolist()),
        responses=tuple(tuple(rng.integers(0, 61, response).tolist()) for _ in range(2)),
        rewards=(0.0, 1.0),
        source=f"prompt of {prompt}",
    )


def _gradients(fusion: bool, trimmed: list[bool]) -> dict[str, torch.Tensor]:
    """Of a step; `trimmed` says of its first and last microbatch whether the last layer is."""
    # Apex has no kernel for float64.
    training = dataclasses.replace(TRAINING, dtype="float32", token_budget=40)
    config = model_config({"gradient_accumulation_fusion": fusion}, vocab_size=64)
    chunks = build_model_chunks(config, ParallelConfig(), training, use_distributed_optimizer=False)
    packing = packing_of_run(
        training,
        ParallelConfig(),
        model_shape=model_shape(config, chunks.config),
        data_parallel_size=1,
    )
    batches = build_minibatch(
        # Every row of a one-token prompt's group is trained on, so none can be left out.
        [_group(20, 8), _group(1, 16)],
        ObjectiveConfig(),
        packing,
        attention=ON_CPU,
        data_parallel_rank=0,
    ).batches

    def is_trimmed(batch: PackedBatch) -> bool:
        return batch.params.last_layer is not None

    assert set(map(is_trimmed, batches)) == {False, True}
    batches = sorted(batches, key=is_trimmed, reverse=trimmed[0])
    accumulate_gradients(chunks, batches, ObjectiveConfig())
    return {name: p.main_grad.clone() for name, p in chunks.named_parameters()}


@pytest.mark.parametrize("trimmed", [[True, False], [False, True]], ids=["trimmed first", "last"])
def test_fused_gradients_of_a_step_with_a_trimmed_microbatch_are_whole(
    trimmed: list[bool], stub_of_apex: _StubOfApex
) -> None:
    with single_process(float64=False):
        expected = _gradients(False, trimmed)
        assert stub_of_apex.calls == 0
    with single_process(float64=False):
        found = _gradients(True, trimmed)
    assert stub_of_apex.calls > 0
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    # The stub adds up as autograd does, in another order. A lost microbatch is an error of 0.8.
    assert max(errors.values()) <= 1e-5, errors


def _output_gradient(fusion: bool) -> torch.Tensor:
    """Of the output layer, for a microbatch that asks for logits and one for log-probabilities."""
    config = model_config({"gradient_accumulation_fusion": fusion}, vocab_size=64)
    training = dataclasses.replace(TRAINING, dtype="float32")
    chunks = build_model_chunks(config, ParallelConfig(), training, use_distributed_optimizer=False)
    layout = pack(PrefixTree.from_groups([([1, 2, 3], [[4, 5], [6]])]))
    (model,), head = chunks.wrapped, chunks.head
    assert head is not None
    inputs = (
        torch.from_numpy(layout.input_ids)[None],
        torch.from_numpy(layout.position_ids)[None],
        None,
    )
    params = PrefixPackedSeqParams.from_layout(layout, ON_CPU)
    model.zero_grad_buffer()
    model(*inputs, packed_seq_params=params).square().sum().backward()
    rows = torch.arange(layout.num_tokens)
    labels = torch.from_numpy(layout.labels)
    call = functools.partial(model, *inputs, packed_seq_params=params)
    head.log_probs(call, rows, labels, temperature=1.0, with_entropy=False).sum().backward()
    return head.output_layer.weight.main_grad.clone()


def test_logits_and_log_probabilities_in_one_step_give_the_output_layer_a_whole_gradient(
    stub_of_apex: _StubOfApex,
) -> None:
    with single_process(float64=False):
        expected = _output_gradient(False)
    with single_process(float64=False):
        found = _output_gradient(True)
    assert stub_of_apex.calls > 0
    assert relative_error(found, expected) <= 1e-5

"""What real models hold in memory: tensors kept for backward, peaks, optimizer state."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.layout import pack
from megatron_prefix.model.build import ModelChunks
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.training.batch import PackedBatch
from megatron_prefix.training.batch_planning import build_batch
from megatron_prefix.training.entries import TrainedSequence
from megatron_prefix.training.predicted import PredictionPlan
from megatron_prefix.training.step import _forward_step
from tests.megatron.models import ON_CPU, random_groups


def group_batch(
    prefix: int,
    responses: Sequence[int],
    *,
    pad_to_multiple: int = 1,
    trim_last_layer: bool = True,
    setup: AttentionSetup = ON_CPU,
    depths: int = 0,
    **options: object,
) -> PackedBatch:
    """One group of random tokens, trained on its responses; `depths` of prediction."""
    tree = random_groups(np.random.default_rng(0), [(prefix, list(responses))])
    sequences = [
        TrainedSequence(first_trained=prefix, weight=1.0, advantage=1.0) for _ in responses
    ]
    layout = pack(tree, pad_to_multiple=pad_to_multiple)
    return build_batch(
        layout,
        sequences,
        setup,
        trim_last_layer=trim_last_layer and not depths,
        prediction=PredictionPlan(depths=depths, step_tokens=1) if depths else None,
        **options,
    )


def kept_bytes(chunks: ModelChunks, batch: PackedBatch) -> int:
    """Bytes of all storages that autograd keeps of a forward, parameters and buffers apart."""
    tensors = (*chunks.bare[0].parameters(), *chunks.bare[0].buffers())
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.setdefault(storage.data_ptr(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _output, _loss = _forward_step(
            iter([batch]),
            chunks.wrapped[0],
            chunks=chunks,
            objective=ObjectiveConfig(report_entropy=True),
            with_gradients=True,
            replays=False,
        )
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that is allocated at once by a call, over what was before it."""
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            function()
    finally:
        gc.enable()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(np.cumsum([nbytes for _, nbytes in changes]), default=0)

"""Forward passes that end in drawn tokens, by Megatron's own schedules.

The last pipeline stage draws; then the tokens go to every rank of this copy of the model, so that
all of them know what comes next.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.model.build import ModelChunks
from megatron_prefix.rollouts.embedded.drawing import draw_tokens


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """One row to run, and what to draw from its logits."""

    input_ids: Tensor
    """[1, T] int64"""
    params: PrefixPackedSeqParams
    """Of the row; they hold its position ids."""
    positions: Tensor
    """[N] int64: where in the row the next tokens are drawn."""
    uniforms: Tensor
    """[N, k] float64 in [0, 1): for k draws at each of them."""


Draws = np.ndarray
"""[2, N, k] float64: the tokens drawn for one request, and their log-probabilities."""


@contextlib.contextmanager
def sampling_mode(chunks: ModelChunks) -> Iterator[None]:
    """Within the block the model is in evaluation mode and nothing is kept for gradients.

    Sequence parallelism is off: what it saves is activation memory, of which there is little, and
    it costs a step of a few tokens twice the collectives. Models with experts keep it, since
    Megatron's token dispatchers rely on it.
    """
    training = [chunk.training for chunk in chunks.wrapped]
    switched_off = _sequence_parallel_switches(chunks) if not _has_experts(chunks) else []
    for owner, name in switched_off:
        setattr(owner, name, False)
    for chunk in chunks.wrapped:
        chunk.eval()
    try:
        # Not inference_mode: Megatron caches rotary tables, which training uses again.
        with torch.no_grad():
            yield
    finally:
        for owner, name in switched_off:
            setattr(owner, name, True)
        for chunk, mode in zip(chunks.wrapped, training, strict=True):
            chunk.train(mode)


def row_multiple(chunks: ModelChunks) -> int:
    """What rows have to be a multiple of in sampling mode."""
    config = chunks.config
    keeps_sequence_parallel = config.sequence_parallel and _has_experts(chunks)
    return config.tensor_model_parallel_size if keeps_sequence_parallel else 1


def _has_experts(chunks: ModelChunks) -> bool:
    return chunks.config.num_moe_experts is not None


def _sequence_parallel_switches(chunks: ModelChunks) -> list[tuple[Any, str]]:
    """The attributes, all True, by which the model's modules know of sequence parallelism."""
    switches = {}
    for chunk in chunks.wrapped:
        for module in chunk.modules():
            for owner, name in (
                (module, "sequence_parallel"),
                (module, "reduce_scatter_embeddings"),
                (getattr(module, "config", None), "sequence_parallel"),
            ):
                if getattr(owner, name, None) is True:
                    switches[id(owner), name] = (owner, name)
    return list(switches.values())


def draw(
    chunks: ModelChunks, requests: Sequence[DrawRequest], *, temperature: float, top_p: float
) -> list[Draws]:
    """Run rows through the pipeline and draw tokens behind them.

    Args:
        requests: as many as on the other ranks of this copy of the model, and the same; under
            interleaved pipelining a multiple of the pipeline size.
        temperature, top_p: see `draw_tokens`.

    Returns:
        For each request what was drawn, the same on all ranks of this copy of the model.
    """
    iterators: list[Iterator[DrawRequest]] = [iter(requests) for _ in chunks.wrapped]
    drawn = get_forward_backward_func()(
        forward_step_func=functools.partial(
            _forward_step, chunks=chunks, temperature=temperature, top_p=top_p
        ),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=chunks.wrapped if len(chunks.wrapped) > 1 else chunks.wrapped[0],
        num_microbatches=len(requests),
        seq_length=max(request.input_ids.shape[1] for request in requests),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return _from_last_stage(drawn, requests)


def _forward_step(
    data_iterator: Iterator[DrawRequest],
    model: torch.nn.Module,
    *,
    chunks: ModelChunks,
    temperature: float,
    top_p: float,
) -> tuple[Tensor, Any]:
    request = next(data_iterator)

    def draw_block(logits: Tensor, rows: slice) -> Tensor:
        tokens, logprobs = draw_tokens(
            logits, request.uniforms[rows], temperature=temperature, top_p=top_p
        )
        # Token ids are exact in float64.
        return torch.stack((tokens.to(logprobs.dtype), logprobs), dim=-1)

    call = functools.partial(
        model,
        request.input_ids,
        request.params.position_ids[None],
        attention_mask=None,
        packed_seq_params=request.params,
    )
    if chunks.head is not None and model is chunks.wrapped[-1]:
        output = chunks.head.from_logits(call, request.positions, draw_block)
    else:
        output = call()
    return output, _as_it_is


def _as_it_is(output: Tensor, non_loss_data: bool = False) -> Tensor:
    """[1, N, k, 2] -> [N, k, 2]"""
    assert non_loss_data
    return output[0]


def _from_last_stage(drawn: list[Tensor], requests: Sequence[DrawRequest]) -> list[Draws]:
    """Of every request, from where they were drawn."""
    shapes = [request.uniforms.shape for request in requests]
    total = sum(shape.numel() for shape in shapes)
    values = requests[0].uniforms.new_empty(total, 2)
    if drawn:
        values = torch.cat([request.reshape(-1, 2) for request in drawn])
    # Ranks of a tensor-parallel group have drawn from the same logits; should they differ in the
    # last bit of a sum, they must go on with the same tokens nevertheless.
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    if drawn and tensor_group.size() > 1:
        dist.broadcast(values, dist.get_global_rank(tensor_group, 0), group=tensor_group)
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    if pipeline_group.size() > 1:
        last = dist.get_global_rank(pipeline_group, pipeline_group.size() - 1)
        dist.broadcast(values, last, group=pipeline_group)
    ends = np.cumsum([shape.numel() for shape in shapes])
    parts = np.split(values.cpu().numpy().T, ends[:-1], axis=1)
    return [part.reshape(2, *shape) for part, shape in zip(parts, shapes, strict=True)]

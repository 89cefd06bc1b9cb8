"""What a framework does, in few lines: it builds a GPTModel, packs sequences, runs Megatron's
schedule, and makes its loss of the logits.

Megatron's own attention for the CPU refuses packed rows, which Transformer Engine's takes. So the
models here have a core attention that runs one sequence after the other by torch; everything else
is Megatron's. That model on the row with all repetitions is the reference.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_prefix.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_prefix.integrations import log_probs_of_rows
from megatron_prefix.megatron.norms import IN_PLACE_OF
from megatron_prefix.model.transformer_config import transformer_config
from tests.megatron.models import TRAINING, randomise

TEMPERATURE = 0.7


class PackedAttention(DotProductAttention):
    """Causal attention within each sequence of a packed row; zeros on padding."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """query [t, heads, dim] -> [t, heads * dim]."""
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, attn_mask_type=attn_mask_type)
        out = torch.zeros_like(query)
        for rows in _sequences(packed_seq_params):
            one = [x[rows].transpose(0, 1)[None] for x in (query, key, value)]
            found = torch.nn.functional.scaled_dot_product_attention(
                *one, is_causal=True, enable_gqa=True
            )
            out[rows] = found[0].transpose(0, 1)
        return out.reshape(len(out), -1)


def _sequences(params: PackedSeqParams) -> list[slice]:
    lengths = params.cu_seqlens_q.diff().tolist()
    offsets = params.cu_seqlens_q_padded
    starts = (params.cu_seqlens_q if offsets is None else offsets).tolist()
    return [slice(a, a + n) for a, n in zip(starts, lengths, strict=False) if n]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """A microbatch as a framework hands it to the model."""

    input_ids: Tensor
    """[1, T]"""
    params: PackedSeqParams
    labels: Tensor
    """[1, T]: the next token of each sequence; of its last token, and of padding, another."""

    @property
    def real(self) -> Tensor:
        """[T] bool: rows of sequences."""
        found = torch.zeros(self.input_ids.shape[1], dtype=torch.bool)
        for rows in _sequences(self.params):
            found[rows] = True
        return found

    def arguments(self) -> dict[str, Any]:
        return {
            "input_ids": self.input_ids,
            "position_ids": None,
            "attention_mask": None,
            "packed_seq_params": self.params,
        }


def pack_batch(
    sequences: Sequence[Sequence[int]],
    *,
    pad_each_to: int = 1,
    pad_sequence_to: int = 1,
    tail: int = 0,
) -> Batch:
    """The sequences one behind the other.

    Args:
        pad_each_to: each begins at a multiple of this.
        pad_sequence_to: a last sequence of zeros fills the row up to a multiple of this.
        tail: tokens behind the last sequence.
    """
    lengths = [len(s) for s in sequences]
    spaces = [-(-n // pad_each_to) * pad_each_to for n in lengths]
    tokens = [[*s, *[0] * (space - len(s))] for s, space in zip(sequences, spaces, strict=True)]
    filling = -sum(spaces) % pad_sequence_to
    if filling:
        tokens.append([0] * filling)
        lengths.append(filling)
        spaces.append(filling)
    flat = torch.tensor([t for s in tokens for t in s] + [0] * tail)
    true, padded = (torch.tensor(np.cumsum([0, *x]), dtype=torch.int32) for x in (lengths, spaces))
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=true,
        cu_seqlens_kv=true,
        max_seqlen_q=max(spaces),
        max_seqlen_kv=max(spaces),
        **{f"cu_seqlens_{x}_padded": padded for x in ("q", "kv") if pad_each_to > 1},
    )
    labels = torch.roll(flat, -1)
    return Batch(input_ids=flat[None], params=params, labels=labels[None])


def build_model(
    model: ModelConfig, config: TransformerConfig, vp_stage: int | None = None
) -> GPTModel:
    """A chunk of the framework's model."""
    stage = {} if vp_stage is None else {"vp_stage": vp_stage}
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, **stage)
    for layer in spec.layer_specs:
        parts = layer.submodules
        parts.self_attention.submodules.core_attention = PackedAttention
        if config.sequence_parallel:
            # Torch's norms refuse it, Transformer Engine's do not.
            for name in ("input_layernorm", "pre_mlp_layernorm"):
                norm = getattr(parts, name)
                setattr(parts, name, IN_PLACE_OF.get(norm, norm))
    if config.sequence_parallel:
        spec.layer_norm = IN_PLACE_OF.get(spec.layer_norm, spec.layer_norm)
    built = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=model.padded_vocab_size(config.tensor_model_parallel_size),
        max_sequence_length=model.max_sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, **stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, **stage),
        parallel_output=True,
        position_embedding_type=model.position_embedding_type,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        **stage,
    )
    randomise(built)
    return built


def build_chunks(
    model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig = TRAINING
) -> tuple[list[DistributedDataParallel], TransformerConfig]:
    """This rank's chunks in Megatron's data-parallel wrapper."""
    config = transformer_config(model, parallel, training)
    config.calculate_per_token_loss = False
    config.finalize_model_grads_func = finalize_model_grads
    stages = range(parallel.num_model_chunks) if parallel.num_model_chunks > 1 else [None]
    wrapped = [
        DistributedDataParallel(
            config,
            DistributedDataParallelConfig(check_for_nan_in_grad=False),
            build_model(model, config, stage),
            disable_bucketing=bool(stage),
        )
        for stage in stages
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped, config


Output = Callable[[torch.nn.Module, Batch], Tensor]
"""Runs the model on a batch; on the last stage its output is what `train` makes a loss of."""


def logits_of(model: torch.nn.Module, batch: Batch) -> Tensor:
    return model(**batch.arguments())


def losses_of(model: torch.nn.Module, batch: Batch) -> Tensor:
    return model(**batch.arguments(), labels=batch.labels)


def scores_of(model: torch.nn.Module, batch: Batch) -> Tensor:
    """[1, T, 2] log-probability of the label and entropy, made of logits; zeros at some rows."""
    output = model(**batch.arguments())
    if not model.module.post_process:
        return output
    rows, labels = _scored(batch)
    logits = gather_from_tensor_model_parallel_region(output)[0, rows] / TEMPERATURE
    log_p = torch.log_softmax(logits, dim=-1)
    found = torch.stack((log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)), 1)
    return _spread(found[None], rows, batch)


def lean_scores_of(model: torch.nn.Module, batch: Batch) -> Tensor:
    """The same of a model that shares prefixes, without logits of the whole row."""
    rows, labels = _scored(batch)
    arguments = batch.arguments()
    found = log_probs_of_rows(
        model, rows=rows, labels=labels, temperature=TEMPERATURE, train_entropy=True, **arguments
    )
    return _spread(found, rows, batch) if model.module.post_process else found


def _scored(batch: Batch) -> tuple[Tensor, Tensor]:
    """Two of three rows of sequences, and the labels there."""
    rows = batch.real.nonzero()[:, 0]
    rows = rows[rows % 3 > 0]
    return rows, batch.labels[0, rows]


def _spread(found: Tensor, rows: Tensor, batch: Batch) -> Tensor:
    """[1, n, ...] of rows -> [1, T, ...], zeros elsewhere."""
    everywhere = found.new_zeros(1, batch.input_ids.shape[1], *found.shape[2:])
    return everywhere.index_copy(1, rows, found)


def train(
    chunks: list[DistributedDataParallel], batches: Sequence[Batch], output: Output = logits_of
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run all microbatches forward and backward.

    The framework's loss is linear in the outputs of all rows of sequences, the last one of each
    included, after it has divided them in place.

    Returns:
        The outputs, on the last stage; the reduced gradients of this rank's parameters.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    outputs: list[Tensor] = []

    def loss(found: Tensor, *, batch: Batch, seed: int) -> tuple[Tensor, dict[str, Any]]:
        found.div_(TEMPERATURE)
        real = batch.real
        outputs.append(found.detach().clone()[:, real])
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(found.shape, generator=generator, dtype=found.dtype)
        return (found * weights)[:, real].sum(), {}

    def step(iterator: Iterator[tuple[int, Batch]], model: torch.nn.Module) -> tuple[Tensor, Any]:
        seed, batch = next(iterator)
        return output(model, batch), functools.partial(loss, batch=batch, seed=seed)

    iterators = [iter(enumerate(batches)) for _ in chunks]
    several = len(chunks) > 1
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if several else iterators[0],
        model=chunks if several else chunks[0],
        num_microbatches=len(batches),
        seq_length=batches[0].input_ids.shape[1],
        micro_batch_size=1,
        forward_only=False,
    )
    gradients = {
        f"{i}.{name}": parameter.main_grad.clone()
        for i, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }
    return outputs, gradients


def worst_error(found: dict[Any, Tensor], expected: dict[Any, Tensor]) -> float:
    """The largest relative L2 error of any tensor, those that are zero but for rounding aside."""
    assert found.keys() == expected.keys()
    whole = max((float(x.norm()) for x in expected.values()), default=0.0)
    return max(
        (
            float((found[name] - expected[name]).norm())
            / max(float(expected[name].norm()), 1e-6 * whole)
            for name in expected
        ),
        default=0.0,
    )


def random_sequences(
    rng: np.random.Generator, groups: Sequence[tuple[int, Sequence[int]]], vocab_size: int = 61
) -> list[list[int]]:
    """Groups of (prompt length, response lengths), each sequence whole; 0 stays for padding."""
    found = []
    for prompt_length, response_lengths in groups:
        prompt = rng.integers(1, vocab_size, prompt_length).tolist()
        found += [[*prompt, *rng.integers(1, vocab_size, n).tolist()] for n in response_lengths]
    return found

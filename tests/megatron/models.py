"""Small real GPTModels for tests, unmodified and with shared prefixes, from the same weights."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import megatron.core
import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_prefix.attention.kernels import select_kernel
from megatron_prefix.attention.row_attention import AttentionSetup, recurrence_width
from megatron_prefix.attention.windows import model_window
from megatron_prefix.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layout import PackedLayout, PrefixTree, pack
from megatron_prefix.megatron.gated_delta_net import GatedDeltaNet
from megatron_prefix.megatron.hybrid_model import HybridModel
from megatron_prefix.model.build import ModelChunks, build_gpt_model
from megatron_prefix.model.full_tensors import full_gradients
from megatron_prefix.model.transformer_config import transformer_config

HAS_YARN = tuple(int(x) for x in megatron.core.__version__.split(".")[:2]) >= (0, 15)
HAS_WINDOWS = HAS_YARN
"""Sliding windows and sinks, in the local layer spec."""
HAS_PREDICTIONS = tuple(int(x) for x in megatron.core.__version__.split(".")[:2]) >= (0, 16)
"""Multi-token prediction over shared prefixes."""
ON_CPU = AttentionSetup(
    device=torch.device("cpu"),
    kernel=select_kernel(None, device="cpu", dtype=torch.float32, head_dim=16),
)
"""Of any model here: on the CPU the kernel is the same for every dtype and head size."""
TRAINING = TrainingConfig(steps=1, token_budget=1024, dtype="float64", device="cpu")

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "gated_linear_unit": True,
}
LATENT: dict[str, Any] = {
    "num_query_groups": None,
    "multi_latent_attention": True,
    "q_lora_rank": 20,
    "kv_lora_rank": 14,
    "qk_head_dim": 10,
    "qk_pos_emb_head_dim": 6,
    "v_head_dim": 12,
    "qk_layernorm": True,
}
"""Changes of `BASE` for multi-latent attention."""
HAS_GATED_DELTA_NET = GatedDeltaNet is not None
HAS_HYBRID_MODEL = HybridModel is not None
DELTA_NET: dict[str, Any] = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
"""Sizes of gated delta nets."""
MAMBA: dict[str, Any] = {
    "mamba_state_dim": 6,
    "mamba_head_dim": 8,
    "mamba_num_groups": 2,
    "mamba_num_heads": 4,
}
"""Sizes of Mamba's layers."""
HYBRID: dict[str, Any] = {
    "experimental_attention_variant": "gated_delta_net",
    "linear_attention_freq": 2,
    **DELTA_NET,
}
"""Changes of `BASE`: every other layer attends, the first one does not."""


def model_config(transformer: dict[str, Any] | None = None, **options: Any) -> ModelConfig:
    """A small model; `transformer` and `options` change it."""
    values = {"vocab_size": 61, "max_sequence_length": 64, **options}
    transformer = {**BASE, **(transformer or {})}
    if values.get("hybrid_layer_pattern") is not None:
        del transformer["num_layers"]
    return ModelConfig(**values, transformer=transformer)


@contextlib.contextmanager
def single_process(float64: bool = True) -> Iterator[None]:
    """Megatron's state for one process on the CPU."""
    with runtime(ParallelConfig(), device="cpu", seed=3, timeout_minutes=2, float64=float64):
        yield


def model_pair(
    config: ModelConfig, training: TrainingConfig = TRAINING
) -> tuple[GPTModel, GPTModel]:
    """An unmodified model without recompute, and one with shared prefixes, of equal weights."""
    plain = dataclasses.replace(training, recompute="none")
    reference = build_gpt_model(
        config, transformer_config(config, ParallelConfig(), plain), shared_prefixes=False
    )
    grouped = build_gpt_model(config, transformer_config(config, ParallelConfig(), training))
    randomise(reference)
    grouped.load_state_dict(reference.state_dict())
    return reference, grouped


@torch.no_grad()
def randomise(model: GPTModel) -> None:
    """Norms and biases too: at their initial ones and zeros errors could hide."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.add_(torch.randn_like(buffer), alpha=0.2)


def random_groups(
    rng: np.random.Generator, shapes: list[tuple[int, list[int]]], vocab_size: int = 61
) -> PrefixTree:
    """Groups of random tokens; a shape is (prefix length, response lengths)."""
    return PrefixTree.from_groups(
        [
            (rng.integers(0, vocab_size, prefix), [rng.integers(0, vocab_size, n) for n in lengths])
            for prefix, lengths in shapes
        ]
    )


def packed_logits(
    model: GPTModel, layout: PackedLayout, needed: np.ndarray | None = None
) -> Tensor:
    """[T, vocab] logits of a packed row; with `needed` rows, of others only NaN.

    These then come from a last layer that computes no other rows than it must.
    """
    setup = dataclasses.replace(
        ON_CPU,
        window=model_window(model.config),
        recurrence_width=recurrence_width(model.config),
    )
    params = PrefixPackedSeqParams.from_layout(layout, setup, needed=needed)
    logits = model(
        torch.from_numpy(layout.input_ids)[None],
        torch.from_numpy(layout.position_ids)[None],
        None,
        packed_seq_params=params,
    )[0]
    rows = params.output_rows
    assert len(logits) == len(rows)
    if needed is None:
        return logits
    all_rows = logits.new_full((layout.num_tokens, logits.shape[1]), torch.nan)
    return all_rows.index_copy(0, torch.from_numpy(rows), logits)


def sequence_logits(model: GPTModel, tokens: np.ndarray) -> Tensor:
    """[len - 1, vocab] logits of one whole sequence, unpacked."""
    inputs = torch.from_numpy(tokens)[None, :-1]
    length = inputs.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    return model(inputs, torch.arange(length)[None], causal)[0]


def assert_equal_training(
    reference: GPTModel,
    grouped: GPTModel,
    tree: PrefixTree,
    tolerance: float,
    *,
    trim_last_layer: bool = False,
) -> None:
    """Logits of every sequence, and gradients of every parameter for a random linear loss.

    Args:
        tolerance: of relative L2 errors.
        trim_last_layer: only of the tokens that no other sequence has; others are not computed.
    """
    layout = pack(tree)
    needed = np.flatnonzero(layout.multiplicity == 1) if trim_last_layer else None
    logits = packed_logits(grouped, layout, needed)
    loss, expected_loss = logits.new_zeros(()), logits.new_zeros(())
    for i in range(tree.num_sequences):
        expected = sequence_logits(reference, tree.sequence_tokens(i))
        positions = layout.sequence_positions(i)
        if needed is not None:
            own = np.isin(positions, needed)
            if not own.any():  # another sequence begins like this one
                continue
            positions, expected = positions[own], expected[torch.from_numpy(own)]
        found = logits[torch.from_numpy(positions)]
        assert relative_error(found, expected) <= tolerance
        weights = torch.randn_like(expected)
        loss = loss + (found * weights).sum()
        expected_loss = expected_loss + (expected * weights).sum()
    loss.backward()
    expected_loss.backward()
    whole = sum(float(p.grad.norm()) ** 2 for p in reference.parameters()) ** 0.5
    for (name, parameter), expected in zip(
        grouped.named_parameters(), reference.parameters(), strict=True
    ):
        assert expected.grad is not None, name
        error = float((parameter.grad - expected.grad).norm())
        # A gradient that is zero in exact arithmetic has no relative error.
        scale = max(float(expected.grad.norm()), 1e-6 * whole)
        assert error <= tolerance * scale, f"{name}: {error / scale:.1e}"


def relative_error(found: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of the expected."""
    return float((found - expected).norm() / expected.norm())


def whole_gradients(
    chunks: ModelChunks,
    logits: Tensor,
    params: PrefixPackedSeqParams,
    layout: PackedLayout,
    needed: np.ndarray | None = None,
) -> dict[str, Tensor] | None:
    """On rank 0 the gradients of all parameters, gathered from the ranks of a row.

    The loss is linear in the logits of the `needed` positions, or of all, with the same weights in
    every layout.
    """
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(layout.num_tokens, logits.shape[1] * tensor, generator=generator)
    weights[layout.num_tokens - layout.num_padding :] = 0
    if needed is not None:
        weights[np.setdiff1d(np.arange(layout.num_tokens), needed)] = 0
    weights = params.own(weights.numpy())[params.output_rows]
    (logits * weights.tensor_split(tensor, dim=1)[rank]).sum().backward()
    for parameter in chunks.bare[0].parameters():
        if params.shards is not None:
            dist.all_reduce(parameter.grad, group=parallel_state.get_context_parallel_group())
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
        parameter.main_grad = parameter.grad
    return full_gradients(chunks)

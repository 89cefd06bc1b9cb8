"""The rollouts and the model that all sides of a benchmark share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_prefix.config import ModelConfig, TrainingConfig
from megatron_prefix.layout import PrefixTree, pack
from megatron_prefix.planning import shapes

if TYPE_CHECKING:
    from megatron_prefix.attention.row_attention import AttentionSetup
    from megatron_prefix.training.batch import PackedBatch


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One group."""

    prefix: int
    responses: tuple[int, ...]

    @property
    def group_size(self) -> int:
        """G."""
        return len(self.responses)

    @property
    def response(self) -> str:
        """The responses' length, or shortest-longest."""
        shortest, longest = min(self.responses), max(self.responses)
        return str(shortest) if shortest == longest else f"{shortest}-{longest}"

    def __str__(self) -> str:
        return f"{self.group_size},{self.prefix},{self.response}"


def parse_case(text: str) -> Shape:
    """An argument G,prefix,response; see `megatron_prefix.planning.shapes.parse_case`."""
    try:
        shape = shapes.parse_case(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Shape(prefix=shape["prefix"], responses=tuple(shape["responses"]))


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Of the benchmark's decoder: RMSNorm, SwiGLU, RoPE, grouped-query attention."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    qkv_bias: bool = False
    """As in Qwen2."""
    attends_every: int | None = None
    """One in so many layers attends, and the others are gated delta nets; None: all attend."""

    def config(self) -> ModelConfig:
        """As a run's config has it."""
        return ModelConfig(
            vocab_size=self.vocab,
            max_sequence_length=1 << 20,
            activation="silu",
            transformer={
                "num_layers": self.layers,
                "hidden_size": self.hidden,
                "num_attention_heads": self.heads,
                "num_query_groups": self.kv_heads,
                "ffn_hidden_size": self.ffn,
                "gated_linear_unit": True,
                "add_qkv_bias": self.qkv_bias,
                **self._gated_delta_nets(),
            },
        )

    def _gated_delta_nets(self) -> dict[str, Any]:
        """With keys as wide as the hidden size and values twice that, as in Qwen3-Next."""
        if self.attends_every is None:
            return {}
        return {
            "experimental_attention_variant": "gated_delta_net",
            "linear_attention_freq": self.attends_every,
            "linear_num_key_heads": self.heads // 2,
            "linear_num_value_heads": self.heads,
            "linear_key_head_dim": 2 * self.hidden // self.heads,
            "linear_value_head_dim": 2 * self.hidden // self.heads,
        }


def training_config(
    *, device: str = "cpu", dtype: str = "float32", recompute: str = "none"
) -> TrainingConfig:
    """What builds the model and says how a run packs, by its own defaults."""
    return TrainingConfig(
        steps=1, token_budget=1 << 30, dtype=dtype, device=device, recompute=recompute
    )


def rollouts(shape: Shape, vocab: int, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Random tokens: the prompt, and the responses."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, vocab, shape.prefix)
    return prompt, [rng.integers(0, vocab, n) for n in shape.responses]


def trees(shape: Shape, vocab: int, seed: int) -> dict[str, PrefixTree]:
    """The same rollouts with the prompt shared, and with the prompt repeated."""
    prompt, responses = rollouts(shape, vocab, seed)
    return {
        "grouped": PrefixTree.from_groups([(prompt, responses)]),
        "ungrouped": _repeated(prompt, responses),
    }


def _repeated(prompt: np.ndarray, responses: Sequence[np.ndarray]) -> PrefixTree:
    return PrefixTree.concat(
        [PrefixTree.from_sequences([np.concatenate([prompt, r])]) for r in responses]
    )


def ungrouped_rows(shape: Shape, vocab: int, seed: int) -> list[tuple[PrefixTree, tuple[int, ...]]]:
    """The same rollouts with the prompt repeated, in rows of at most the grouped row's tokens.

    Returns:
        Each row, and which responses are in it.
    """
    prompt, responses = rollouts(shape, vocab, seed)
    budget = PrefixTree.from_groups([(prompt, responses)]).grouped_tokens
    rows: list[tuple[int, ...]] = []
    free = 0
    for i, response in enumerate(responses):
        length = len(prompt) + len(response) - 1
        if length > free:
            rows.append(())
            free = budget
        rows[-1] += (i,)
        free -= length
    return [(_repeated(prompt, [responses[i] for i in row]), row) for row in rows]


def advantages(shape: Shape) -> list[float]:
    """Of each response; what they are does not matter."""
    return [(-1.0) ** i for i in range(shape.group_size)]


def make_batch(
    tree: PrefixTree,
    shape: Shape,
    setup: AttentionSetup,
    *,
    sequences: Sequence[int] | None = None,
    trim_last_layer: bool = training_config().trim_last_layer,
) -> PackedBatch:
    """One packed row whose response tokens are trained on, or this rank's part of it.

    The tree is packed as it is: what is measured is sharing, also where it does not pay.

    Args:
        sequences: which of the group's responses the tree has; None: all.
    """
    # Here, so that a tool's help and its arguments' errors need not wait for them.
    from megatron_prefix.training.batch_planning import build_batch
    from megatron_prefix.training.entries import TrainedSequence

    weight = 1.0 / sum(shape.responses)
    of_group = advantages(shape)
    sequences = range(shape.group_size) if sequences is None else sequences
    return build_batch(
        pack(tree.merge_chains(), pad_to_multiple=setup.num_ranks),
        [
            TrainedSequence(first_trained=shape.prefix, weight=weight, advantage=of_group[i])
            for i in sequences
        ],
        setup,
        trim_last_layer=trim_last_layer,
    )

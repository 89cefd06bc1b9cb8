"""verl's batches, and the sizes of a model for the cost of sharing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict

from megatron_prefix.integrations.verl.samples import Samples
from megatron_prefix.layout import ModelShape

SHAPE = ModelShape(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=128,
    gated_linear_unit=True,
)


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 128, (count,), generator=generator).tolist()


def nested(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.tensor(r) for r in rows], layout=torch.jagged)


def batch(groups: Sequence[tuple[int, Sequence[int]]], *, seed: int = 0) -> TensorDict:
    """Groups of a prompt's length and of responses' lengths, as a worker has them."""
    prompts, responses = [], []
    for number, (prompt, lengths) in enumerate(groups):
        for length in lengths:
            prompts.append(tokens(prompt, seed + number))
            responses.append(tokens(length, seed + 1000 + len(responses)))
    ids = [p + r for p, r in zip(prompts, responses, strict=True)]
    return TensorDict(
        {"input_ids": nested(ids), "prompts": nested(prompts), "responses": nested(responses)},
        batch_size=[len(ids)],
    )


def samples(groups: Sequence[tuple[int, Sequence[int]]], *, seed: int = 0) -> Samples:
    return Samples.of_batch(batch(groups, seed=seed), SHAPE)

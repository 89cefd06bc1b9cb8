"""Microbatches that keep groups together, for frameworks that would split them by length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_prefix.layout import ModelShape, TreeShape, plan_microbatches
from megatron_prefix.layout.padding import padded_tokens

SEVEN_B = ModelShape(
    num_layers=28,
    hidden_size=3584,
    ffn_hidden_size=18944,
    num_attention_heads=28,
    num_query_groups=4,
    kv_channels=128,
    vocab_size=152064,
    gated_linear_unit=True,
)
"""Sizes of a model of 7 billion parameters, by which work is balanced unless others are given."""


def whole_groups(
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    token_budget: int,
    data_parallel_size: int = 1,
    microbatch_multiple: int = 1,
    pad_to_multiple: int = 1,
    model: ModelShape = SEVEN_B,
    prompt_keys: Sequence[Sequence[int]] | None = None,
) -> list[list[list[int]]]:
    """Assign sequences to microbatches so that those of one prompt run together.

    The budget counts what runs: each prompt once in a microbatch, and every response. A group is
    split where it is over the budget, or where there are too few groups to give every rank its
    microbatches. Work is balanced over ranks. A function of the arguments alone.

    Args:
        prompts: the prompt's tokens of each sequence. Sequences of equal ones are a group.
        lengths: tokens of each sequence, its prompt's included.
        token_budget: tokens of a microbatch that run, at most. A sequence that is longer raises it
            to its own length, since it must run somewhere.
        data_parallel_size: ranks.
        microbatch_multiple: the number of microbatches of a rank is a multiple of this, as
            interleaved pipelining wants.
        pad_to_multiple: as `share_prefixes` was given it, times the tensor-parallel size under
            sequence parallelism.
        model: the sizes that work is measured by.
        prompt_keys: for each prompt a key for each of its tokens, if ids leave something open, such
            as which image they stand for. Prompts are equal where their keys are too.

    Returns:
        [rank][microbatch] the indices of its sequences; none is empty, and every rank has as many.

    Raises:
        ValueError: fewer sequences than microbatches that all ranks need together, a sequence
            shorter than its prompt, a prompt without tokens, or keys that do not fit the prompts.
    """
    if len(prompts) != len(lengths):
        raise ValueError(f"{len(prompts)} prompts for {len(lengths)} sequences: give one for each")
    if prompt_keys is not None and [*map(len, prompt_keys)] != [*map(len, prompts)]:
        raise ValueError("prompt_keys: give one key for each token of each prompt")
    if len(lengths) < data_parallel_size * microbatch_multiple:
        raise ValueError(
            f"{len(lengths)} sequences for data_parallel_size={data_parallel_size} and "
            f"microbatch_multiple={microbatch_multiple}: each rank needs {microbatch_multiple} or "
            "more. Give more sequences"
        )
    groups: dict[tuple[bytes, bytes], list[int]] = {}
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        if not 1 <= len(prompt) <= length:
            raise ValueError(
                f"sequence {i} has {length} tokens and its prompt {len(prompt)}: a prompt has at "
                "least one token, and the sequence no fewer"
            )
        keys = () if prompt_keys is None else prompt_keys[i]
        identity = (
            np.asarray(prompt, dtype=np.int64).tobytes(),
            np.asarray(keys, dtype=np.int64).tobytes(),
        )
        groups.setdefault(identity, []).append(i)
    members = list(groups.values())
    # A token more for each sequence: its last token runs too, though it predicts nothing.
    trees = [
        TreeShape.of_group(len(prompts[own[0]]), [lengths[i] - len(prompts[i]) + 1 for i in own])
        for own in members
    ]
    longest = padded_tokens(max(lengths), pad_to_multiple)
    plan = plan_microbatches(
        trees,
        token_budget=max(token_budget, longest),
        data_parallel_size=data_parallel_size,
        cost=model,
        pad_to_multiple=pad_to_multiple,
        microbatch_multiple=microbatch_multiple,
    )
    found = [
        [[members[part.group][i] for part in slices for i in part.sequences] for slices in rank]
        for rank in plan.microbatches
    ]
    if not all(own for rank in found for own in rank):
        raise ValueError(
            f"{len(lengths)} sequences need {plan.num_microbatches} microbatches on each of "
            f"{data_parallel_size} ranks (microbatch_multiple={microbatch_multiple}), which are "
            "more than there are sequences. Give more sequences or raise token_budget"
        )
    return found

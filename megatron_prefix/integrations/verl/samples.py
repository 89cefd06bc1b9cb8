"""The samples of a verl batch on this data-parallel rank, and the groups that they form.

A sample is a prompt with a response. verl says nowhere which samples belong together, once they are
on a worker: samples with the same prompt, token by token, are a group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from megatron_prefix.layout import ModelShape, PrefixTree, share_where_it_pays


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Tokens of all samples, on the host."""

    tokens: tuple[np.ndarray, ...]
    """int64: prompt and response of each."""
    prompt_lengths: np.ndarray
    """[samples] int64, at least 1."""
    has_prompts: bool
    """Whether the batch says which tokens are the prompt."""
    shape: ModelShape
    """Of the model, for where sharing pays."""

    @classmethod
    def of_batch(cls, data: Any, shape: ModelShape) -> Samples:
        """Read a batch as verl hands it to its engine.

        Args:
            data: TensorDict with `input_ids`, nested and jagged. Without `prompts`, as for
                supervised training, all but the first token count as the response.
            shape: of the model.

        Raises:
            ValueError: a sample of fewer than two tokens, or without a prompt.
        """
        input_ids = data["input_ids"]
        values = input_ids.values().cpu().numpy().astype(np.int64)
        offsets = input_ids.offsets().cpu().numpy()
        lengths = np.diff(offsets)
        prompts = _prompt_lengths(data, len(lengths))
        for i in np.flatnonzero((lengths < 2) | (prompts < 1)).tolist():
            raise ValueError(
                f"sample {i} of the batch has {lengths[i]} tokens, {prompts[i]} of them prompt: "
                "there is nothing to predict; leave it out"
            )
        return cls(
            tokens=tuple(np.split(values, offsets[1:-1])),
            prompt_lengths=prompts,
            has_prompts=data.get("prompts", None) is not None,
            shape=shape,
        )

    @property
    def num_tokens(self) -> int:
        """Of all samples, prompts repeated."""
        return sum(map(len, self.tokens))

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Samples with the same prompt, by the first of each group."""
        members: dict[bytes, list[int]] = {}
        for i, name in enumerate(self.prompt_names):
            members.setdefault(name, []).append(i)
        return tuple(tuple(group) for group in members.values())

    @cached_property
    def prompt_names(self) -> tuple[bytes, ...]:
        """A digest of each sample's prompt, the same on every rank."""
        return tuple(
            hashlib.sha256(tokens[:length].astype("<i8").tobytes()).digest()
            for tokens, length in zip(self.tokens, self.prompt_lengths.tolist(), strict=True)
        )

    def tree(self, chosen: Sequence[int], *, token_budget: int | None = None) -> PrefixTree:
        """What these samples share, wherever that pays, in the order given.

        Args:
            chosen: samples.
            token_budget: where not sharing would pack to more tokens than this, all is shared.
        """
        tree = PrefixTree.from_sequences([self.tokens[i] for i in chosen])
        return share_where_it_pays(tree, self.shape, token_budget=token_budget)


def temperature_of(data: Any) -> float:
    """The one temperature of all samples.

    Args:
        data: TensorDict with `temperature`, a number or one for each sample.

    Raises:
        ValueError: there are several.
    """
    values = torch.as_tensor(data["temperature"], dtype=torch.float32)
    low, high = float(values.min()), float(values.max())
    if low != high:
        raise ValueError(
            f"the samples of a batch have temperatures from {low} to {high}, and positions that "
            "samples share have one: set rollout.temperature, and no other per sample"
        )
    # As verl's engine has it where a batch is padding alone.
    return max(low, 1e-8)


def _prompt_lengths(data: Any, num_samples: int) -> np.ndarray:
    """[samples] int64, from nested prompts or from padded ones."""
    prompts = data.get("prompts", None)
    if prompts is None:
        return np.ones(num_samples, dtype=np.int64)
    if prompts.is_nested:
        lengths = prompts.offsets().diff()
    else:
        lengths = data["attention_mask"][:, : prompts.shape[1]].sum(dim=1)
    return lengths.cpu().numpy().astype(np.int64)


def part_of_groups_split(prompts_of_ranks: Iterable[Sequence[bytes]]) -> float:
    """Which part of the groups of several samples has samples on more than one rank.

    Args:
        prompts_of_ranks: of each data-parallel rank, the prompt of each of its samples.
    """
    ranks_of_prompt: dict[bytes, list[int]] = {}
    for rank, prompts in enumerate(prompts_of_ranks):
        for prompt in prompts:
            ranks_of_prompt.setdefault(prompt, []).append(rank)
    groups = [ranks for ranks in ranks_of_prompt.values() if len(ranks) > 1]
    return sum(len(set(ranks)) > 1 for ranks in groups) / max(1, len(groups))

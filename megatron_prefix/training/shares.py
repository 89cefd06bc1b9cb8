"""Which tokens a process holds: those of the responses that its data-parallel rank runs.

Rank 0 has the whole rollout batch. Every rank knows the lengths of all of it, so all come to the
same plan, and each knows how much it will get: the responses that its data-parallel rank runs, and
the prompts of their groups, in the order of the batch. Prompts, responses, and what there is of
log-probabilities, masks, advantages, keys, positions and routes of tokens are sent one after the
other, each to all ranks in one scatter, for which shorter shares are padded. The plan has made the
ranks' work, and so nearly their lengths, even. Ranks of one model replica get the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_prefix.layout.routes import hashed_keys
from megatron_prefix.rollouts.kinds import offsets_of
from megatron_prefix.rollouts.records import RolloutBatch, RolloutSummary


@dataclass(frozen=True, kw_only=True, eq=False)
class ShareSizes:
    """What a share holds, known from the batch's lengths alone."""

    groups: NDArray[np.int64]
    """[g] ascending: the groups whose prompts are there, as indices into the batch."""
    responses: NDArray[np.int64]
    """[r] ascending: the responses that are there, as indices into the batch."""
    prompt_offsets: NDArray[np.int64]
    """[g + 1]"""
    response_offsets: NDArray[np.int64]
    """[r + 1]"""
    sequence_offsets: NDArray[np.int64]
    """[r + 1] into the inputs of the sequences."""
    no_routes: NDArray | None
    """See `RolloutSummary`."""
    optional: frozenset[str]
    """Which of the fields are there that a batch may have or not."""

    @classmethod
    def of(cls, summary: RolloutSummary, responses: NDArray[np.int64]) -> ShareSizes:
        """The sizes of a share of these responses."""
        responses = np.unique(responses)
        group_of = np.searchsorted(summary.group_offsets, responses, side="right") - 1
        groups = np.unique(group_of)
        lengths = summary.response_lengths[responses]
        return cls(
            groups=groups,
            responses=responses,
            prompt_offsets=offsets_of(summary.prompt_lengths[groups]),
            response_offsets=offsets_of(lengths),
            sequence_offsets=offsets_of(summary.prompt_lengths[group_of] + lengths - 1),
            no_routes=summary.no_routes,
            optional=frozenset(
                name
                for name, is_there in (
                    ("old_logprobs", summary.has_old_logprobs),
                    ("loss_mask", summary.has_loss_mask),
                    ("advantages", summary.largest_advantages is not None),
                    ("prompt_keys", summary.has_prompt_keys),
                    ("keys", summary.has_keys),
                    ("prompt_position_shifts", summary.has_position_shifts),
                    ("position_shifts", summary.has_position_shifts),
                    ("routes", summary.no_routes is not None),
                )
                if is_there
            ),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Share:
    """The tokens of some responses of a batch, and of their prompts."""

    sizes: ShareSizes
    prompt_tokens: NDArray[np.int32]
    response_tokens: NDArray[np.int32]
    old_logprobs: NDArray[np.float32] | None
    loss_mask: NDArray[np.bool_] | None
    advantages: NDArray[np.float64] | None
    """NaN where they come from the response's reward; None: all do."""
    prompt_keys: NDArray[np.int64] | None = None
    keys: NDArray[np.int64] | None = None
    prompt_position_shifts: NDArray[np.int32] | None = None
    position_shifts: NDArray[np.int32] | None = None
    routes: NDArray | None = None
    """[inputs, layers with experts, topk] of the sequences."""

    def sequence(self, group: int, response: int) -> NDArray[np.int32]:
        """Prompt and response as one array.

        Args:
            group: of the response.
            response: both are indices into the batch.
        """
        sizes = self.sizes
        prompt = _part(self.prompt_tokens, sizes.prompt_offsets, sizes.groups, group)
        own = _part(self.response_tokens, sizes.response_offsets, sizes.responses, response)
        return np.concatenate([prompt, own])

    def sequence_keys(self, group: int, response: int) -> NDArray[np.int64] | None:
        """The keys of what `sequence` returns, in which positions and routes are; None where there
        is nothing of these."""
        keys = self._sequence_keys(group, response)
        shifts = self.position_shifts_of(group, response)
        if shifts is None and self.routes is None:
            return keys
        routes = None if self.routes is None else self.routes_of(response)
        values = [of for of in (keys, shifts, routes) if of is not None]
        return hashed_keys(len(self.sequence(group, response)), values)

    def position_shifts_of(self, group: int, response: int) -> NDArray[np.int32] | None:
        """[tokens, 3] of what `sequence` returns; None where all are 0."""
        if self.position_shifts is None or self.prompt_position_shifts is None:
            return None
        sizes = self.sizes
        prompt = _part(self.prompt_position_shifts, sizes.prompt_offsets, sizes.groups, group)
        own = self._of(self.position_shifts, response)
        return np.concatenate([prompt, own])

    def routes_of(self, response: int) -> NDArray:
        """[inputs, layers with experts, topk] of a response's sequence, where there are routes."""
        assert self.routes is not None
        sizes = self.sizes
        return _part(self.routes, sizes.sequence_offsets, sizes.responses, response)

    def _sequence_keys(self, group: int, response: int) -> NDArray[np.int64] | None:
        if self.prompt_keys is None and self.keys is None:
            return None
        sizes = self.sizes
        of_prompts = self.prompt_keys
        if of_prompts is None:
            of_prompts = np.zeros(len(self.prompt_tokens), dtype=np.int64)
        own = self.keys
        if own is None:
            own = np.zeros(len(self.response_tokens), dtype=np.int64)
        return np.concatenate(
            [
                _part(of_prompts, sizes.prompt_offsets, sizes.groups, group),
                _part(own, sizes.response_offsets, sizes.responses, response),
            ]
        )

    def old_logprobs_of(self, response: int) -> NDArray[np.float32] | None:
        """[tokens] of a response; None where they are not known."""
        return self._of(self.old_logprobs, response)

    def loss_mask_of(self, response: int) -> NDArray[np.bool_] | None:
        """[tokens] whether each is trained on; None where all are."""
        return self._of(self.loss_mask, response)

    def advantages_of(self, response: int) -> NDArray[np.float64] | None:
        """[tokens] of a response; None where they are that of the response."""
        found = self._of(self.advantages, response)
        return None if found is None or np.isnan(found[0]) else found

    def _of(self, values: NDArray | None, response: int) -> NDArray | None:
        if values is None:
            return None
        sizes = self.sizes
        return _part(values, sizes.response_offsets, sizes.responses, response)


def take_share(batch: RolloutBatch, sizes: ShareSizes) -> Share:
    """The share of a batch that is here."""
    arrays = {
        field.name: _taken(values, field.offsets_of(batch), field.items_of(sizes))
        for field in _FIELDS
        if (values := getattr(batch, field.name)) is not None
    }
    return Share(**{**dict.fromkeys(_OPTIONAL), **arrays, "sizes": sizes})


class Distribution:
    """Sends each rank its share. Collective over all ranks."""

    def __init__(self, data_parallel_rank: int, device: torch.device) -> None:
        """Learn which ranks run the same microbatches.

        Args:
            data_parallel_rank: of this rank.
            device: that collectives take tensors of.
        """
        self._device = device
        self._data_parallel_rank = data_parallel_rank
        self._rank_of: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(self._rank_of, data_parallel_rank)

    def scatter(self, batch: RolloutBatch | None, sizes: Sequence[ShareSizes]) -> Share:
        """This rank's share of rank 0's batch.

        Args:
            batch: on rank 0.
            sizes: [data-parallel ranks] of all shares.
        """
        own = sizes[self._data_parallel_rank]
        if len(self._rank_of) == 1:
            assert batch is not None
            return take_share(batch, own)
        arrays = {
            field.name: self._scatter(field, batch, sizes)
            for field in _FIELDS
            if field.name not in _OPTIONAL or field.name in own.optional
        }
        return Share(**{**dict.fromkeys(_OPTIONAL), **arrays, "sizes": own})

    def _scatter(
        self, field: _Field, batch: RolloutBatch | None, sizes: Sequence[ShareSizes]
    ) -> NDArray:
        counts = [int(field.offsets_of(share)[-1]) for share in sizes]
        like = field.empty(sizes[0])
        empty = np.zeros((max(counts), *like.shape[1:]), dtype=like.dtype)
        received = self._bytes(empty)
        sent = None
        if dist.get_rank() == 0:
            assert batch is not None
            values, offsets = getattr(batch, field.name), field.offsets_of(batch)
            padded = []
            for share, count in zip(sizes, counts, strict=True):
                of_rank = np.zeros_like(empty)
                of_rank[:count] = _taken(values, offsets, field.items_of(share))
                padded.append(self._bytes(of_rank))
            sent = [padded[rank] for rank in self._rank_of]
        dist.scatter(received, sent, src=0)
        values = received.cpu().numpy().view(empty.dtype).reshape(empty.shape)
        return values[: counts[self._data_parallel_rank]]

    def _bytes(self, values: NDArray) -> torch.Tensor:
        """What is sent of an array of any type, not all of which collectives know."""
        return torch.from_numpy(values.reshape(-1).view(np.uint8)).to(self._device)


@dataclass(frozen=True, kw_only=True)
class _Field:
    """An array of a batch, and of a share of it."""

    name: str
    dtype: type | None
    """None: that of routes."""
    of: Literal["prompt", "response", "sequence"] = "response"
    """What has so many values as tokens, or as inputs."""
    of_item: tuple[int, ...] = ()
    """Shape of a value; but for routes, which say so themselves."""

    @property
    def of_groups(self) -> bool:
        """Whether there is one item for each group, not for each response."""
        return self.of == "prompt"

    def offsets_of(self, batch: RolloutBatch | ShareSizes) -> NDArray[np.int64]:
        return getattr(batch, f"{self.of}_offsets")

    def empty(self, sizes: ShareSizes) -> NDArray:
        """[0, ...] of the field's type and shape."""
        if self.dtype is not None:
            return np.zeros((0, *self.of_item), dtype=self.dtype)
        assert sizes.no_routes is not None
        return sizes.no_routes

    def items_of(self, sizes: ShareSizes) -> NDArray[np.int64]:
        return sizes.groups if self.of_groups else sizes.responses


_FIELDS = (
    _Field(name="prompt_tokens", dtype=np.int32, of="prompt"),
    _Field(name="response_tokens", dtype=np.int32),
    _Field(name="old_logprobs", dtype=np.float32),
    _Field(name="loss_mask", dtype=np.bool_),
    _Field(name="advantages", dtype=np.float64),
    _Field(name="prompt_keys", dtype=np.int64, of="prompt"),
    _Field(name="keys", dtype=np.int64),
    _Field(name="prompt_position_shifts", dtype=np.int32, of="prompt", of_item=(3,)),
    _Field(name="position_shifts", dtype=np.int32, of_item=(3,)),
    _Field(name="routes", dtype=None, of="sequence"),
)

_OPTIONAL = tuple(
    field.name for field in _FIELDS if field.name not in ("prompt_tokens", "response_tokens")
)


def _part(values: NDArray, offsets: NDArray, indices: NDArray, index: int) -> NDArray:
    """The values of one item, which is there."""
    at = int(np.searchsorted(indices, index))
    assert indices[at] == index
    return values[offsets[at] : offsets[at + 1]]


def _taken(values: NDArray, offsets: NDArray, indices: NDArray) -> NDArray:
    """The values of these items one behind the other."""
    bounds = zip(offsets[indices].tolist(), offsets[indices + 1].tolist(), strict=True)
    return np.concatenate([values[:0], *(values[start:stop] for start, stop in bounds)])

"""A microbatch as one packed row, and what the model makes of it in verl's order.

Legend: C tokens of the row on this rank, N rows of the model's output whose label is asked for,
E entries (a response token of one sample that this rank computes), J tokens of the microbatch's
samples, prompts repeated.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.device_copy import record_to_device
from megatron_prefix.integrations.verl.samples import Samples
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layout import ModelRow, RankRow, pack, rank_row
from megatron_prefix.layout.stages import Array
from megatron_prefix.model.head import LogProbHead


@dataclass(frozen=True, kw_only=True, eq=False)
class Responses(Generic[Array]):
    """The response tokens that this rank computes, and their places in verl's output."""

    label_rows: Array
    """[N] int64: rows of the model's output, ascending."""
    labels: Array
    """[N] int64"""
    entry_labels: Array
    """[E] int64: index into the N labels."""
    targets: Array
    """[E] int64: which of the J values each entry is. verl has the log-probability of a sample's
    token t + 1 at its position t."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedRow:
    """A microbatch on the host."""

    row: RankRow
    responses: Responses[np.ndarray]
    num_tokens: int
    """Of the packed row on all context-parallel ranks, padding included."""
    num_values: int
    """J"""


def plan_row(
    samples: Samples,
    chosen: Sequence[int],
    setup: AttentionSetup,
    *,
    pad_to_multiple: int,
    token_budget: int | None,
) -> PlannedRow:
    """Plan a microbatch.

    Args:
        samples: of this data-parallel rank.
        chosen: those of the microbatch, in verl's order.
        setup: of the model.
        pad_to_multiple: of the row's length; by the context-parallel size, it is that of the
            model's output, too.
        token_budget: as it was planned for; None if it was not.
    """
    layout = pack(samples.tree(chosen, token_budget=token_budget), pad_to_multiple=pad_to_multiple)
    none = np.zeros(0, dtype=np.int64)
    positions, targets, start = [none], [none], 0
    for i, sample in enumerate(chosen):
        prompt, length = int(samples.prompt_lengths[sample]), len(samples.tokens[sample])
        positions.append(layout.sequence_positions(i)[prompt - 1 :])
        targets.append(np.arange(start + prompt - 1, start + length - 1))
        start += length
    needed = np.concatenate(positions)
    row = rank_row(
        layout,
        rank=setup.rank,
        num_ranks=setup.num_ranks,
        comm_types=setup.comm_types,
        window=setup.window,
        needed=needed,
        multiple=pad_to_multiple // setup.num_ranks,
    )
    return PlannedRow(
        row=row,
        responses=_responses(row, layout.num_tokens, needed, np.concatenate(targets)),
        num_tokens=layout.num_tokens,
        num_values=start,
    )


def _responses(
    row: RankRow, num_tokens: int, positions: np.ndarray, targets: np.ndarray
) -> Responses[np.ndarray]:
    """Those of the whole row that this rank computes."""
    places = np.full(num_tokens, -1, dtype=np.int64)
    places[row.rows[row.rows >= 0]] = np.flatnonzero(row.rows >= 0)
    here = places[positions] >= 0
    label_tokens, entry_labels = np.unique(places[positions[here]], return_inverse=True)
    return Responses(
        label_rows=np.searchsorted(row.output_rows, label_tokens),
        labels=row.labels[label_tokens],
        entry_labels=entry_labels.reshape(-1),
        targets=targets[here],
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceRow:
    """A microbatch on the device."""

    model: ModelRow[Tensor]
    params: PrefixPackedSeqParams
    responses: Responses[Tensor]
    num_values: int
    """J"""

    @classmethod
    def of(cls, planned: PlannedRow, setup: AttentionSetup) -> DeviceRow:
        """Copy a planned microbatch, all at once."""
        model, responses = record_to_device((planned.row.model, planned.responses), setup.device)
        return cls(
            model=model,
            params=PrefixPackedSeqParams.from_row(planned.row, model, setup),
            responses=responses,
            num_values=planned.num_values,
        )

    def hidden(self, model: Any) -> Tensor:
        """What a chunk of the model that is not the last one sends on."""
        return self._call(model)()

    def log_probs(
        self,
        model: Any,
        head: LogProbHead,
        *,
        temperature: float,
        with_entropy: bool,
        context_parallel_group: Any,
    ) -> list[Tensor]:
        """[J] log-probabilities, and [J] entropies if they are asked for; 0 at prompts.

        Args:
            model: the last chunk, wrapped as verl has it.
            head: of the model.
            temperature: logits are divided by it.
            with_entropy: gradients flow to the entropies, too.
            context_parallel_group: whose ranks hold the row's parts; None: all of it is here.
        """
        responses = self.responses
        output = head.log_probs(
            self._call(model),
            responses.label_rows,
            responses.labels,
            temperature=temperature,
            with_entropy=with_entropy,
            train_entropy=with_entropy,
        )
        # Plain indexing: on CUDA its backward adds shared positions up in a fixed order.
        entries = output[0][responses.entry_labels]
        values = entries.new_zeros(self.num_values, entries.shape[-1])
        values = values.index_put((responses.targets,), entries)
        if context_parallel_group is not None:
            # The sum of all ranks' parts, whose gradient goes to each rank's own: every rank
            # computes the whole loss from it, as verl's own engine does.
            values = reduce_from_tensor_model_parallel_region(values, group=context_parallel_group)
        return list(values.unbind(-1))

    def _call(self, model: Any) -> Any:
        return functools.partial(
            model,
            input_ids=self.model.input_ids[None],
            position_ids=self.model.position_ids[None],
            attention_mask=None,
            packed_seq_params=self.params,
        )


def nested_like(values: Tensor, input_ids: Tensor) -> Tensor:
    """[J] values as verl's nested tensor, a row for each sample."""
    return torch.nested.nested_tensor_from_jagged(values, offsets=input_ids.offsets())

"""What the layers hold of one batch of prompts and of the responses that are being sampled.

All prompts run once, as one packed row; what each layer computes as their keys and values stays
here. Then every response grows by one token per step: its query attends to its prompt's keys, which
all responses of the prompt share, and to its own earlier tokens, merged by log-sum-exp as in
training. If the prompts begin alike (instructions, shots), that beginning is shared by all of them.
In layers with a sliding window the query sees the last of these keys only.
Recurrent layers have states instead (see `recurrent_states`).

Legend: P prompts; n responses in the cache, those of a prompt adjacent and in the prompts' order;
H query heads, Hk key/value heads, D head dimension.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.attention.row_attention import AttentionLayer, AttentionSetup, CoreAttention
from megatron_prefix.attention.sinks import merge_sink
from megatron_prefix.attention.stage_compute import StageCompute
from megatron_prefix.device_copy import record_to_device
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layout import AttentionStage, PackedLayout, PrefixTree, pack
from megatron_prefix.layout.stages import attention_stage
from megatron_prefix.rollouts.embedded.recurrent_states import (
    DecodeStates,
    PrefillStates,
    RecurrentStates,
)

_SHORTEST_COMMON = 16
"""A common beginning of fewer tokens is not worth an attention stage of its own."""


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """Prompts as one packed row: every token of every prompt is an input."""

    layout: PackedLayout
    common: int
    """Positions at the beginning of the row that belong to all prompts."""
    bounds: np.ndarray
    """[P + 1]: prompt i's own positions are bounds[i] to bounds[i + 1]; bounds[0] is `common`."""

    @property
    def last_positions(self) -> np.ndarray:
        """[P]: the position of each prompt's last token, which predicts the first to sample."""
        return self.bounds[1:] - 1


def prompt_row(prompts: Sequence[Sequence[int]], *, pad_to_multiple: int = 1) -> PromptRow:
    """Lay prompts out as one row; what they all begin with is there once."""
    alike = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*prompts, strict=False))
    common = sum(1 for _ in alike) if len(prompts) > 1 else 0
    common = common if common >= _SHORTEST_COMMON else 0
    prompts = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
    # A packed row holds what predicts its labels: one more token behind each prompt makes the
    # prompt's last token an input.
    tokens = [np.append(prompt[common:], 0) for prompt in prompts]
    beginning = [prompts[0][:common]] if common else []
    own = range(len(beginning), len(beginning) + len(prompts))
    tree = PrefixTree(
        parents=(*[-1 for _ in beginning], *(0 if common else -1 for _ in prompts)),
        tokens=(*beginning, *tokens),
        sequences=tuple((0, i) if common else (i,) for i in own),
    )
    layout = pack(tree, pad_to_multiple=pad_to_multiple)
    starts = [layout.segments[i].start for i in own]
    end = layout.num_tokens - layout.num_padding
    return PromptRow(
        layout=layout, common=starts[0] if starts else 0, bounds=np.array([*starts, end])
    )


@dataclass
class _LayerCache:
    """One layer's keys and values; the responses' are allocated with their first token."""

    prompt_keys: Tensor
    """[tokens of the prompts, Hk, D]"""
    prompt_values: Tensor
    keys: Tensor | None = None
    """[n, Hk, slots, D]"""
    values: Tensor | None = None


class KeyValueCache:
    """Keys and values, or states, of this rank's layers, for a row of prompts and its responses."""

    def __init__(
        self, row: PromptRow, setup: AttentionSetup, *, num_responses: int, slots: int
    ) -> None:
        """An empty cache for so many responses to each prompt.

        Of a response `slots` tokens are inputs at most, all but its last. There is no context
        parallelism: a row is whole on its rank.
        """
        self._setup = setup
        self._row = row
        self._slots = slots
        self._layers: dict[int, _LayerCache] = {}
        self.states = RecurrentStates()
        self._counts = np.full(len(row.last_positions), num_responses)
        """Of each prompt."""
        self._stages: tuple[AttentionStage[Tensor], ...] | None = None
        self._windowed: tuple[int, tuple[AttentionStage[Tensor], ...]] | None = None
        """The newest of `_windowed_stages`, and its `count`."""

    @property
    def num_responses(self) -> int:
        """n, over all prompts."""
        return int(self._counts.sum())

    def prefill_params(self, *, max_seqlen: int) -> PrefixPackedSeqParams:
        """The params with which the row of prompts fills the cache; `max_seqlen` is that of the
        whole responses, so that one table of rotary embeddings does."""
        params = PrefixPackedSeqParams.from_layout(self._row.layout, self._setup)
        recurrence = params.recurrence
        if recurrence is not None:
            recurrence = PrefillStates.of(self.states, recurrence, self._row.last_positions)
        return dataclasses.replace(
            params,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
            attention=partial(self._attend_prompts, params.attention),
            recurrence=recurrence,
        )

    def decode_params(
        self, position_ids: Tensor, *, slot: int, max_seqlen: int
    ) -> PrefixPackedSeqParams:
        """The params of a step that runs one token of each response, behind `slot` others. The
        tokens' positions are [n or more]; rows from n on are padding."""
        self.states.hand_over(self._counts)
        cu_seqlens = torch.tensor([0, len(position_ids)], dtype=torch.int32).to(
            position_ids.device, non_blocking=True
        )
        return PrefixPackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
            attention=partial(self._attend, slot),
            recurrence=DecodeStates(states=self.states),
            position_ids=position_ids,
            own_rows=np.arange(len(position_ids)),
        )

    def keep(self, rows: np.ndarray) -> None:
        """Drop all responses but these, by ascending indices into the n."""
        prompts = np.repeat(np.arange(len(self._counts)), self._counts)
        self._counts = np.bincount(prompts[rows], minlength=len(self._counts))
        self._stages = self._windowed = None
        self.states.keep(rows)
        for layer in self._layers.values():
            if layer.keys is not None:
                index = torch.from_numpy(rows).to(layer.keys.device)
                layer.keys = layer.keys.index_select(0, index)
                layer.values = layer.values.index_select(0, index)

    def _prompt_stages(self) -> tuple[AttentionStage[Tensor], ...]:
        """One rectangle for the common beginning, and one for the rest of each prompt."""
        if self._stages is None:
            row = self._row
            stages = [_stage(row.bounds, self._counts)]
            if row.common:
                everyone = np.array([self.num_responses])
                stages.insert(0, _stage(np.array([0, row.common]), everyone))
            self._stages = record_to_device(tuple(stages), self._setup.device)
        return self._stages

    def _windowed_stages(self, count: int) -> tuple[AttentionStage[Tensor], ...]:
        """One rectangle for the last `count` keys of each prompt, or all there are."""
        if count <= 0:
            return ()
        if self._windowed is None or self._windowed[0] != count:
            common, keys = self._row.common, []
            for first, end in itertools.pairwise(self._row.bounds.tolist()):
                missing = max(0, count - (end - first))
                keys.append(np.arange(max(0, common - missing), common))
                keys[-1] = np.append(keys[-1], np.arange(max(first, end - count), end))
            stage = attention_stage(
                slice(0, self.num_responses),
                np.concatenate(keys),
                self._counts,
                np.array([len(of_prompt) for of_prompt in keys]),
                causal=False,
            )
            self._windowed = count, record_to_device((stage,), self._setup.device)
        return self._windowed[1]

    def _attend_prompts(
        self, attend: CoreAttention, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer
    ) -> Tensor:
        """`CoreAttention` of the row of prompts, whose keys and values stay here."""
        end = int(self._row.bounds[-1])
        # Copies: they may be views of a projection that holds the queries too.
        keys, values = (x[:end].clone(memory_format=torch.contiguous_format) for x in (k, v))
        self._layers[layer.number] = _LayerCache(prompt_keys=keys, prompt_values=values)
        return attend(q, k, v, layer)

    def _attend(self, slot: int, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        """`CoreAttention` of one token of each response, behind `slot` others; 0 for padding."""
        n = self.num_responses
        padded = q.new_zeros(*q.shape[:2], v.shape[2])
        if not n:
            return padded
        q, k, v = q[:n], k[:n], v[:n]
        cached = self._layers[layer.number]
        if cached.keys is None:
            cached.keys, cached.values = (
                x.new_empty(x.shape[0], x.shape[1], self._slots, x.shape[2]) for x in (k, v)
            )
        cached.keys[:, :, slot] = k
        cached.values[:, :, slot] = v
        if layer.window is None:
            seen, stages = slice(0, slot + 1), self._prompt_stages()
        else:
            seen = slice(max(0, slot - layer.window), slot + 1)
            stages = self._windowed_stages(layer.window - slot)
        out, lse = _attend_own(q, cached.keys[:, :, seen], cached.values[:, :, seen], layer.scale)
        compute = StageCompute(self._setup.kernel, layer.scale)
        prompts = (cached.prompt_keys, cached.prompt_values)
        compute.merge(stages, q, *prompts, out, lse)
        if layer.sink is not None:
            out, _ = merge_sink(out, lse, layer.sink)
        padded[:n] = out
        return padded


def _stage(key_bounds: np.ndarray, counts: np.ndarray) -> AttentionStage[np.ndarray]:
    """The prompts' keys between `key_bounds`, each run of them for so many of the queries."""
    return attention_stage(
        slice(0, int(counts.sum())),
        slice(int(key_bounds[0]), int(key_bounds[-1])),
        counts,
        np.diff(key_bounds),
        causal=False,
    )


def _attend_own(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One query per response against its own keys, which are equally many for all.

    Args:
        q: [n, H, D]; keys: [n, Hk, length, D]; values: [n, Hk, length, Dv].

    Returns:
        out [n, H, Dv] and lse [n, H], in float32 or wider.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    # Query heads that read the same key/value head are rows of one product.
    grouped = q.to(wide).unflatten(1, (keys.shape[1], -1))
    scores = torch.matmul(grouped, keys.to(wide).transpose(-1, -2)).mul_(scale)
    lse = scores.logsumexp(dim=-1)
    out = torch.matmul(scores.sub_(lse.unsqueeze(-1)).exp_(), values.to(wide))
    return out.flatten(1, 2), lse.flatten(1, 2)

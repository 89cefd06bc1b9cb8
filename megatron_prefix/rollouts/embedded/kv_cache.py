"""The keys and values of one batch of prompts and of the responses that are being sampled.

All prompts run once, as one packed row; what each layer computes as their keys and values stays
here. Then every response grows by one token per step: its query attends to its prompt's keys, which
all responses of the prompt share, and to its own earlier tokens, merged by log-sum-exp as in
training. If the prompts begin alike (instructions, shots), that beginning is shared by all of them.

Legend: P prompts; n responses in the cache, those of a prompt adjacent and in the prompts' order;
H query heads, Hk key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.attention.comm_types import CommType
from megatron_prefix.attention.kernels import select_kernel
from megatron_prefix.attention.merge import merge_
from megatron_prefix.attention.stages import StageTensors
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layout import PackedLayout, PrefixTree, pack

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
    prompts = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
    common = _common_length(prompts) if len(prompts) > 1 else 0
    common = common if common >= _SHORTEST_COMMON else 0
    # A packed row holds what predicts its labels: one more token behind each prompt makes the
    # prompt's last token an input.
    tokens = [np.append(prompt[common:], 0) for prompt in prompts]
    if common:
        tree = PrefixTree(
            parents=(-1, *(0 for _ in prompts)),
            tokens=(prompts[0][:common], *tokens),
            sequences=tuple((0, i + 1) for i in range(len(prompts))),
        )
    else:
        tree = PrefixTree(
            parents=tuple(-1 for _ in prompts),
            tokens=tuple(tokens),
            sequences=tuple((i,) for i in range(len(prompts))),
        )
    layout = pack(tree, pad_to_multiple=pad_to_multiple)
    own = layout.segments[len(layout.segments) - len(prompts) :]
    starts = [segment.start for segment in own]
    end = layout.num_tokens - layout.num_padding
    return PromptRow(layout=layout, common=starts[0] if own else 0, bounds=np.array([*starts, end]))


def _common_length(prompts: list[np.ndarray]) -> int:
    """Tokens with which all prompts begin."""
    shortest = min(map(len, prompts))
    beginnings = np.stack([prompt[:shortest] for prompt in prompts])
    differs = (beginnings != beginnings[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else shortest


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
    """Keys and values of the layers of this rank, for one row of prompts and their responses."""

    def __init__(
        self, row: PromptRow, *, num_responses: int, slots: int, kernel: str | None = None
    ) -> None:
        """An empty cache.

        Args:
            row: the prompts.
            num_responses: to each prompt.
            slots: tokens of a response that are inputs at most (all but its last).
            kernel: attention kernel by name; None takes the best for the device.
        """
        self.kernel = kernel
        self._row = row
        self._slots = slots
        self._layers: dict[int, _LayerCache] = {}
        self._stages: tuple[StageTensors, ...] = ()
        self._set_counts(np.full(len(row.last_positions), num_responses))

    @property
    def num_responses(self) -> int:
        """n, over all prompts."""
        return int(self._counts.sum())

    def prefill_params(self, device: torch.device, *, max_seqlen: int) -> PrefillSeqParams:
        """The params with which the row of prompts fills the cache.

        Args:
            device: of the model.
            max_seqlen: of the whole responses, so that one table of rotary embeddings does.
        """
        params = PrefillSeqParams.from_layout(self._row.layout, device, kernel=self.kernel)
        params.max_seqlen_q = params.max_seqlen_kv = max_seqlen
        params.cache = self
        return params

    def decode_params(self, position_ids: Tensor, *, slot: int, max_seqlen: int) -> DecodeSeqParams:
        """The params of a step that runs one token of each response.

        Args:
            position_ids: [n or more] the tokens' positions; rows from n on are padding.
            slot: how many tokens of each response are in the cache already.
            max_seqlen: as for `prefill_params`.
        """
        cu_seqlens = torch.tensor([0, len(position_ids)], dtype=torch.int32).to(
            position_ids.device, non_blocking=True
        )
        return DecodeSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
            position_ids=position_ids,
            kernel=self.kernel,
            cache=self,
            slot=slot,
        )

    def keep(self, rows: np.ndarray) -> None:
        """Drop all responses but these.

        Args:
            rows: ascending indices into the n responses.
        """
        prompts = np.repeat(np.arange(len(self._counts)), self._counts)
        self._set_counts(np.bincount(prompts[rows], minlength=len(self._counts)))
        for layer in self._layers.values():
            if layer.keys is not None:
                index = torch.from_numpy(rows).to(layer.keys.device)
                layer.keys = layer.keys.index_select(0, index)
                layer.values = layer.values.index_select(0, index)

    def _set_counts(self, counts: np.ndarray) -> None:
        """Responses of each prompt; the stages to the prompts' keys follow from them."""
        self._counts = counts
        self._stages = ()

    def _prompt_stages(self, device: torch.device) -> tuple[StageTensors, ...]:
        """One rectangle for the common beginning, and one for the rest of each prompt."""
        if not self._stages and self.num_responses:
            row, n = self._row, self.num_responses
            own = _stage(n, row.bounds, np.append(0, self._counts.cumsum()), device)
            if row.common:
                common = np.array([0, row.common])
                self._stages = (_stage(n, common, np.array([0, n]), device), own)
            else:
                self._stages = (own,)
        return self._stages

    def store_prompts(self, layer_number: int, keys: Tensor, values: Tensor) -> None:
        """Keep a layer's keys and values [row, Hk, D] of the prompts."""
        end = int(self._row.bounds[-1])
        self._layers[layer_number] = _LayerCache(
            # Copies: they may be views of a projection that holds the queries too.
            prompt_keys=keys[:end].clone(memory_format=torch.contiguous_format),
            prompt_values=values[:end].clone(memory_format=torch.contiguous_format),
        )

    def attend(
        self, layer_number: int, slot: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float
    ) -> Tensor:
        """Put k and v into a slot, and let the queries see it and everything before it.

        Args:
            q: [n, H, D]; k and v: [n, Hk, D], of the responses' current tokens.

        Returns:
            [n, H, D] in float32 or wider.
        """
        layer = self._layers[layer_number]
        if layer.keys is None:
            n, num_key_heads, head_dim = k.shape
            shape = (n, num_key_heads, self._slots, head_dim)
            layer.keys, layer.values = k.new_empty(shape), v.new_empty(shape)
        layer.keys[:, :, slot] = k
        layer.values[:, :, slot] = v
        out, lse = _attend_own(
            q, layer.keys[:, :, : slot + 1], layer.values[:, :, : slot + 1], scale
        )
        kernel = select_kernel(self.kernel, device=q.device, dtype=q.dtype, head_dim=q.shape[-1])
        for stage in self._prompt_stages(q.device):
            stage_out, stage_lse = kernel.forward(
                q,
                layer.prompt_keys[stage.keys],
                layer.prompt_values[stage.keys],
                stage.cu_q,
                stage.cu_k,
                stage.max_q,
                stage.max_k,
                causal=False,
                scale=scale,
            )
            merge_(out, lse, stage_out, stage_lse)
        return out


def _stage(
    n: int, key_bounds: np.ndarray, query_bounds: np.ndarray, device: torch.device
) -> StageTensors:
    """Rectangles of all n queries against the prompts' keys between `key_bounds`."""

    def on_device(bounds: np.ndarray) -> Tensor:
        return torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True)

    return StageTensors(
        causal=False,
        queries=slice(0, n),
        keys=slice(int(key_bounds[0]), int(key_bounds[-1])),
        cu_q=on_device(query_bounds),
        cu_k=on_device(key_bounds - key_bounds[0]),
        max_q=int(np.diff(query_bounds).max()),
        max_k=int(np.diff(key_bounds).max()),
    )


def _attend_own(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One query per response against its own keys, which are equally many for all.

    Args:
        q: [n, H, D]; keys and values: [n, Hk, length, D].

    Returns:
        out [n, H, D] and lse [n, H], in float32 or wider.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    # Query heads that read the same key/value head are rows of one product.
    grouped = q.to(wide).unflatten(1, (keys.shape[1], -1))
    scores = torch.matmul(grouped, keys.to(wide).transpose(-1, -2)).mul_(scale)
    lse = scores.logsumexp(dim=-1)
    out = torch.matmul(scores.sub_(lse.unsqueeze(-1)).exp_(), values.to(wide))
    return out.flatten(1, 2), lse.flatten(1, 2)


@dataclass
class PrefillSeqParams(PrefixPackedSeqParams):
    """A row of prompts whose keys and values stay in a cache."""

    cache: KeyValueCache = None

    def attend(
        self,
        layer_number: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        comm_type: CommType,
    ) -> Tensor:
        """Attention within the row, as in training."""
        self.cache.store_prompts(layer_number, k, v)
        return super().attend(layer_number, q, k, v, scale=scale, comm_type=comm_type)


@dataclass
class DecodeSeqParams(PrefixPackedSeqParams):
    """One token of each response, and padding behind them; it has no plan."""

    cache: KeyValueCache = None
    slot: int = 0
    """Tokens of each response that come before."""

    def attend(
        self,
        layer_number: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        comm_type: CommType,
    ) -> Tensor:
        """Attention to the cache; 0 for padding."""
        n = self.cache.num_responses
        out = torch.zeros_like(q)
        if n:
            out[:n] = self.cache.attend(layer_number, self.slot, q[:n], k[:n], v[:n], scale=scale)
        return out

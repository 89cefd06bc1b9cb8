"""The states of recurrent layers, of one batch of prompts and of the responses being sampled.

All prompts run once, as one packed row; what each recurrent layer holds behind their last tokens
stays here: the state of its rule, and the last inputs of the convolution. Every response begins
with its prompt's, and replaces its own with each token.

Legend: P prompts; n responses in the cache, those of a prompt adjacent and in the prompts' order; H
value heads; K and V the sizes of keys and values; d channels and w inputs of the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.attention.chunks import Chunks
from megatron_prefix.attention.convolution import causal_convolution
from megatron_prefix.attention.delta_rules import TorchRule
from megatron_prefix.attention.layer_kinds import MAMBA_CONVOLUTION_WIDTH
from megatron_prefix.attention.recurrent_rule import VALUES, SteppedRule
from megatron_prefix.attention.row_attention import attention_dtype, head_dim
from megatron_prefix.attention.row_recurrence import LayerPaths, RowRecurrence
from megatron_prefix.layout import Recurrence
from megatron_prefix.megatron.gated_delta_net import attending_layers, delta_net_layers
from megatron_prefix.megatron.mamba import mamba_heads, mamba_layers

_TORCH = TorchRule()


@dataclass
class _LayerStates:
    """Of one layer: of P prompts, then of n responses."""

    inputs: Tensor
    """[P or n, w - 1, d] of the convolution."""
    state: Tensor | None = None
    """[P or n, H, K, V] of the rule, in float32 or wider."""


class RecurrentStates:
    """States of the recurrent layers of this rank."""

    def __init__(self) -> None:
        """Nothing is held yet."""
        self.layers: dict[int, _LayerStates] = {}
        self._is_of_prompts = True

    def hand_over(self, counts: np.ndarray) -> None:
        """Give each response its prompt's states, if that has not happened yet.

        Args:
            counts: [P] responses of each prompt.
        """
        if self._is_of_prompts:
            self._select(np.repeat(np.arange(len(counts)), counts))
        self._is_of_prompts = False

    def keep(self, rows: np.ndarray) -> None:
        """Drop all responses but these, by ascending indices into the n."""
        if not self._is_of_prompts:
            self._select(rows)

    def _select(self, rows: np.ndarray) -> None:
        for layer in self.layers.values():
            index = torch.from_numpy(rows).to(layer.inputs.device)
            layer.inputs = layer.inputs.index_select(0, index)
            assert layer.state is not None
            layer.state = layer.state.index_select(0, index)


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefillStates:
    """`RowPaths` of a row of prompts, behind whose last tokens the states stay."""

    states: RecurrentStates
    row: Recurrence[Tensor]
    last: Tensor
    """[P] the place in the row of each prompt's last token."""
    last_chunks: np.ndarray
    """[P] the number of the chunk that this token is in."""

    @classmethod
    def of(cls, states: RecurrentStates, paths: RowRecurrence, last: np.ndarray) -> PrefillStates:
        """Fill `states` with those behind the tokens at `last`, [P], of a whole row."""
        row = paths.own
        assert row is not None
        on_device = torch.from_numpy(last).to(row.place.device)
        chunks = row.place[on_device].cpu().numpy() // row.chunks.shape[1]
        return cls(states=states, row=row, last=on_device, last_chunks=chunks)

    def of_layer(self, number: int, *, by_heads: bool) -> LayerPaths:
        """See `RowPaths`; the row is whole, so no heads are exchanged."""
        return _PrefillLayer(number=number, prefill=self)


@dataclass(frozen=True, kw_only=True, eq=False)
class _PrefillLayer:
    """`LayerPaths` of a row of prompts."""

    number: int
    prefill: PrefillStates
    whole_row: None = None
    exchange: None = None
    delta_rule: TorchRule = _TORCH

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As in training."""
        row, last = self.prefill.row, self.prefill.last
        with_zeros = torch.cat((x, x.new_zeros(1, x.shape[1])))
        layer = _LayerStates(inputs=with_zeros[row.inputs[last, 1:]])
        self.prefill.states.layers[self.number] = layer
        return causal_convolution(x, weight, bias, row)

    def apply(self, rule: SteppedRule, *inputs: Tensor) -> Tensor:
        """As in training."""
        row, values = self.prefill.row, inputs[VALUES]
        layer, last_chunks = (
            self.prefill.states.layers[self.number],
            self.prefill.last_chunks.tolist(),
        )
        computed = rule.of(*inputs, row)
        assert isinstance(computed, Chunks)
        if not last_chunks:
            heads, keys, size = *computed.keys.shape[1::2], values.shape[-1]
            layer.state = computed.keys.new_zeros(0, heads, keys, size)
            return torch.zeros_like(values)
        states = dict.fromkeys(last_chunks)
        out, *_ = computed.read(row, None, states)
        layer.state = torch.stack([states[chunk] for chunk in last_chunks])
        return out.to(values.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeStates:
    """`RowPaths` of one token of each response, and padding behind them."""

    states: RecurrentStates

    def of_layer(self, number: int, *, by_heads: bool) -> LayerPaths:
        """See `RowPaths`."""
        return _DecodeLayer(layer=self.states.layers[number])


@dataclass(frozen=True, kw_only=True, eq=False)
class _DecodeLayer:
    """`LayerPaths` of one token of each response."""

    layer: _LayerStates
    whole_row: None = None
    exchange: None = None
    delta_rule: TorchRule = _TORCH

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of each response's last inputs; without meaning for padding."""
        n = len(self.layer.inputs)
        window = torch.cat((self.layer.inputs, x[:n, None]), dim=1)
        self.layer.inputs = window[:, 1:]
        out = torch.zeros_like(x)
        last = window[:, window.shape[1] - weight.shape[1] :]
        out[:n] = sum(last[:, i] * weight[:, i] for i in range(weight.shape[1]))
        return out if bias is None else out + bias

    def apply(self, rule: SteppedRule, *inputs: Tensor) -> Tensor:
        """One step of each response; 0 for padding."""
        state = self.layer.state
        assert state is not None
        out = torch.zeros_like(inputs[VALUES])
        if n := len(state):
            out[:n] = rule.step(*(x[:n] for x in inputs), state)
        return out


def state_tokens(config: Any) -> int:
    """How many tokens' keys and values take as much memory as the states of one sequence.

    Args:
        config: Megatron's `TransformerConfig`.
    """
    dtype = attention_dtype(config)
    wide = torch.promote_types(dtype, torch.float32)
    size = 0
    if delta_nets := sum(delta_net_layers(config)):
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        inputs = (config.linear_conv_kernel_dim - 1) * (2 * keys + values) * dtype.itemsize
        size += delta_nets * (inputs + config.linear_key_head_dim * values * wide.itemsize)
    if mamba := sum(mamba_layers(config)):
        values = mamba_heads(config) * config.mamba_head_dim
        channels = values + 2 * config.mamba_num_groups * config.mamba_state_dim
        inputs = (MAMBA_CONVOLUTION_WIDTH - 1) * channels * dtype.itemsize
        size += mamba * (inputs + config.mamba_state_dim * values * wide.itemsize)
    of_token = 2 * config.num_query_groups * head_dim(config) * dtype.itemsize
    return -(-size // (max(1, sum(attending_layers(config))) * of_token))

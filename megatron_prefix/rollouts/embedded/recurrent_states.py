"""The states of recurrent layers, of one batch of prompts and of the responses being sampled.

All prompts run once, as one packed row; what each recurrent layer holds behind their last tokens
stays here: the state of the delta rule, and the last inputs of the convolution. Every response
begins with its prompt's, and replaces its own with each token.

Legend: P prompts; n responses in the cache, those of a prompt adjacent and in the prompts' order; H
value heads; K and V the sizes of keys and values; d channels and w inputs of the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.attention.delta_rule import (
    causal_convolution,
    delta_rule_step,
    rule_and_states,
)
from megatron_prefix.attention.row_attention import attention_dtype, head_dim
from megatron_prefix.layout import Recurrence
from megatron_prefix.megatron.gated_delta_net import recurrent_layers


@dataclass
class _LayerStates:
    """Of one layer: of P prompts, then of n responses."""

    inputs: Tensor
    """[P or n, w - 1, d] of the convolution."""
    state: Tensor | None = None
    """[P or n, H, K, V] of the delta rule, in float32 or wider."""


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
    """`SampledStates` of a row of prompts, behind whose last tokens they stay."""

    states: RecurrentStates
    row: Recurrence[Tensor]
    last: Tensor
    """[P] the place in the row of each prompt's last token."""
    last_chunks: np.ndarray
    """[P] the number of the chunk that this token is in."""

    @classmethod
    def of(
        cls, states: RecurrentStates, row: Recurrence[Tensor], last: np.ndarray
    ) -> PrefillStates:
        """Fill `states` with those behind the tokens at `last`, [P]."""
        on_device = torch.from_numpy(last).to(row.place.device)
        chunks = row.place[on_device].cpu().numpy() // row.chunks.shape[1]
        return cls(states=states, row=row, last=on_device, last_chunks=chunks)

    def convolve(self, layer_number: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The row's convolution, as in training."""
        with_zeros = torch.cat((x, x.new_zeros(1, x.shape[1])))
        inputs = with_zeros[self.row.inputs[self.last, 1:]]
        self.states.layers[layer_number] = _LayerStates(inputs=inputs)
        return causal_convolution(x, weight, bias, self.row)

    def delta_rule(
        self, layer_number: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
    ) -> Tensor:
        """The row's outputs, as in training."""
        layer = self.states.layers[layer_number]
        if not len(self.last):
            wide = torch.promote_types(v.dtype, torch.float32)
            layer.state = v.new_zeros(0, *k.shape[1:], v.shape[-1], dtype=wide)
            return torch.zeros_like(v)
        out, layer.state = rule_and_states(q, k, v, g, beta, self.row, behind=self.last_chunks)
        return out


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeStates:
    """`SampledStates` of one token of each response, and padding behind them."""

    states: RecurrentStates

    def convolve(self, layer_number: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of each response's last inputs; without meaning for padding."""
        layer = self.states.layers[layer_number]
        n = len(layer.inputs)
        window = torch.cat((layer.inputs, x[:n, None]), dim=1)
        layer.inputs = window[:, 1:]
        out = torch.zeros_like(x)
        out[:n] = sum(window[:, i] * weight[:, i] for i in range(weight.shape[1]))
        return out if bias is None else out + bias

    def delta_rule(
        self, layer_number: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
    ) -> Tensor:
        """One step of each response; 0 for padding."""
        state = self.states.layers[layer_number].state
        assert state is not None
        n = len(state)
        out = torch.zeros_like(v)
        if n:
            out[:n] = delta_rule_step(*(x[:n] for x in (q, k, v, g, beta)), state)
        return out


def state_tokens(config: Any) -> int:
    """How many tokens' keys and values take as much memory as the states of one sequence.

    Args:
        config: Megatron's `TransformerConfig`.
    """
    recurrent = sum(recurrent_layers(config))
    if not recurrent:
        return 0
    dtype = attention_dtype(config)
    wide = torch.promote_types(dtype, torch.float32)
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    inputs = (config.linear_conv_kernel_dim - 1) * (2 * keys + values) * dtype.itemsize
    states = (
        config.linear_num_value_heads
        * config.linear_key_head_dim
        * (config.linear_value_head_dim * wide.itemsize)
    )
    of_token = 2 * config.num_query_groups * head_dim(config) * dtype.itemsize
    return -(-recurrent * (inputs + states) // (max(1, config.num_layers - recurrent) * of_token))

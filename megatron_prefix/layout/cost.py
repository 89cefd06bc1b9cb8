"""The sizes of a decoder, and its forward FLOPs per token, pair and label.

A multiply-add counts as two FLOPs. Counted are the matrix products of the layers and of the output
layer, attention's two products over the visible (query, key) pairs only, and a recurrent layer's
convolution and the products of its chunks. Not counted: embedding look-ups, norms, activations,
softmax, rotary embedding. A backward pass costs twice the forward pass, so ratios are the same for
both.

All counts are Python integers, hence exact and equal on every machine: ranks that plan from them
cannot come to differ.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from megatron_prefix.layout.hybrid_pattern import ATTENTION, DENSE, EXPERTS
from megatron_prefix.layout.layer_shapes import LatentShape, PredictionShape, RecurrentShape
from megatron_prefix.layout.pairs import Count, attention_pairs_of, windowed_pairs_of


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder that its FLOPs depend on.

    Of `num_layers` layers, `num_moe_layers` have experts instead of the dense MLP.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Of the dense layers."""
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads."""
    kv_channels: int
    """Size of one head; with `latent` of queries and keys."""
    vocab_size: int
    gated_linear_unit: bool
    """Three matrix products in the MLP, else two."""
    num_moe_layers: int = 0
    num_experts: int = 0
    num_experts_per_token: int = 0
    moe_ffn_hidden_size: int = 0
    """Of one expert."""
    moe_shared_expert_ffn_hidden_size: int = 0
    """Of the shared expert that every token runs; 0 for none."""
    windowed_layers: tuple[bool, ...] = ()
    """[num_layers] whether each has a sliding window; (): none has."""
    window: int = 0
    """Keys before its own that a query sees in these layers."""
    latent: LatentShape | None = None
    """Of multi-latent attention, which every layer that attends then has."""
    recurrent_layers: tuple[RecurrentShape | None, ...] = ()
    """[num_layers] of each layer that is recurrent, and does not attend; (): none is."""
    kinds: str = ""
    """[num_layers] of a HybridModel, what each layer is, see `hybrid_pattern`; "": each layer has
    an MLP or experts, behind attention or a recurrence."""
    num_trimmed_layers: int = 1
    """Layers at the end that go on with fewer rows where the model is trimmed."""
    whole_last_layer: bool = False
    """The last layer's experts collect statistics of all tokens, or multi-token prediction reads
    them, so it is never trimmed."""
    predictions: PredictionShape | None = None
    """Of multi-token prediction; None: the model has none."""

    def __post_init__(self) -> None:
        positive: tuple[str, ...] = (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "vocab_size",
        )
        if self.num_moe_layers:
            positive += ("num_experts", "num_experts_per_token", "moe_ffn_hidden_size")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_query_groups={self.num_query_groups}"
            )
        if not 0 <= self.num_moe_layers <= self.num_layers:
            raise ValueError(
                f"num_moe_layers={self.num_moe_layers} must be between 0 and "
                f"num_layers={self.num_layers}"
            )
        assert len(self.windowed_layers) in (0, self.num_layers) and self.window >= 0
        assert len(self.recurrent_layers) in (0, self.num_layers)
        assert len(self.kinds) in (0, self.num_layers)
        assert 0 <= self.num_trimmed_layers <= self.num_layers

    @property
    def num_attending_layers(self) -> int:
        """Layers with attention."""
        if self.kinds:
            return self.kinds.count(ATTENTION)
        return self.num_layers - sum(map(bool, self.recurrent_layers))

    @property
    def num_dense_layers(self) -> int:
        """Layers with a dense MLP."""
        if self.kinds:
            return self.kinds.count(DENSE)
        return self.num_layers - self.num_moe_layers

    def attends(self, layer: int) -> bool:
        """Whether a layer, from 0, has attention."""
        if self.kinds:
            return self.kinds[layer] == ATTENTION
        return self.recurrent_of(layer) is None

    def recurrent_of(self, layer: int) -> RecurrentShape | None:
        """The sizes of a layer, from 0, that is recurrent; None: it is not."""
        return next(iter(self.recurrent_layers[layer : layer + 1]), None)

    @property
    def recurrence_width(self) -> int:
        """Inputs of a token that a row's paths have at hand for convolutions; 0: there are none."""
        return max((r.width for r in self.recurrent_layers if r is not None), default=0)

    def mixes(self, layer: int) -> bool:
        """Whether a layer, from 0, has attention or is recurrent."""
        return self.attends(layer) or self.recurrent_of(layer) is not None

    def has_mlp(self, layer: int) -> bool:
        """Whether a layer, from 0, has a dense MLP or experts."""
        return not self.kinds or not self.mixes(layer)

    @property
    def first_trimmed(self) -> int:
        """The first of the layers at the end that may go on with fewer rows, from 0."""
        return self.num_layers - self.num_trimmed_layers

    @property
    def value_channels(self) -> int:
        """Size of a value's head."""
        return self.kv_channels if self.latent is None else self.latent.value_channels

    @property
    def query_weights(self) -> int:
        """Weights of a layer that make queries."""
        width = self.num_attention_heads * self.kv_channels
        if self.latent is None or not self.latent.query_rank:
            return self.hidden_size * width
        return self.latent.query_rank * (self.hidden_size + width)

    @property
    def key_weights(self) -> int:
        """Weights of a layer that make keys and values."""
        if self.latent is None:
            return 2 * self.hidden_size * self.num_query_groups * self.kv_channels
        shared = self.latent.shared_channels
        expanded = self.kv_channels - shared + self.latent.value_channels
        down = self.hidden_size * (self.latent.rank + shared)
        return down + self.latent.rank * self.num_attention_heads * expanded

    @property
    def projection_weights(self) -> int:
        """Weights of a layer's projection of the attention's output."""
        return self.num_attention_heads * self.value_channels * self.hidden_size

    def linear_flops_per_token(self) -> int:
        """QKV, attention projection, MLP, experts and router of all layers, for one token."""
        h = self.hidden_size
        attention = 2 * (self.query_weights + self.key_weights + self.projection_weights)
        matmuls = 3 if self.gated_linear_unit else 2
        dense = matmuls * 2 * h * self.ffn_hidden_size
        expert_width = (
            self.num_experts_per_token * self.moe_ffn_hidden_size
            + self.moe_shared_expert_ffn_hidden_size
        )
        moe = matmuls * 2 * h * expert_width + 2 * h * self.num_experts
        return (
            self.num_attending_layers * attention
            + self._recurrent_flops_per_token()
            + self.num_dense_layers * dense
            + self.num_moe_layers * moe
        )

    def _recurrent_flops_per_token(self) -> int:
        """Projections, convolution and chunks of all recurrent layers, for one token."""
        numbers = sum(r.projected + r.values for r in self.recurrent_layers if r is not None)
        return 2 * self.hidden_size * numbers + self.mixing_flops_per_token()

    def mixing_flops_per_token(self) -> int:
        """The convolution and chunks of all recurrent layers, for one token."""
        return sum(r.mixing_flops_per_token() for r in self.recurrent_layers if r is not None)

    def attention_flops_per_pair(self, *, windowed: bool = False) -> int:
        """QK^T and PV of all heads, for one query that sees one key.

        Args:
            windowed: of all layers that have a sliding window, else of all that have none.
        """
        num_windowed = sum(self.windowed_layers)
        layers = num_windowed if windowed else self.num_attending_layers - num_windowed
        return layers * 2 * self.num_attention_heads * (self.kv_channels + self.value_channels)

    def windowed_pairs(self, queries: Count, keys_before: Count | int) -> Count:
        """The same as `attention_pairs_of` in the layers with a sliding window, 0 without them."""
        if not any(self.windowed_layers):
            return queries * 0
        return windowed_pairs_of(queries, keys_before, self.window)

    @property
    def prediction_depths(self) -> int:
        """Of multi-token prediction; 0: the model has none."""
        return 0 if self.predictions is None else self.predictions.depths

    def is_windowed(self, layer: int) -> bool:
        """Whether a layer, from 0, has a sliding window; depths of prediction are behind the last
        layer."""
        if layer >= self.num_layers and self.predictions is not None:
            return any(self.predictions.windowed[layer - self.num_layers :][:1])
        return any(self.windowed_layers[layer : layer + 1])

    def visible_pairs(self, queries: Count, keys_before: Count | int, *, windowed: bool) -> Count:
        """The same as `attention_pairs_of` in a layer with a sliding window or without one."""
        if windowed:
            return windowed_pairs_of(queries, keys_before, self.window)
        return attention_pairs_of(queries, keys_before)

    def last_layer_pairs(self, queries: Count, keys_before: Count | int) -> Count:
        """The same as `attention_pairs_of` in the layer that is trimmed first, which may have a
        sliding window or not attend at all."""
        if not self._trimmed.num_attending_layers:
            return queries * 0
        windowed = any(self.windowed_layers[self.first_trimmed :])
        return self.visible_pairs(queries, keys_before, windowed=windowed)

    def head_flops_per_label(self) -> int:
        """The output layer, for one position whose label is scored."""
        return 2 * self.hidden_size * self.vocab_size

    def flops(self, *, tokens: int, pairs: int, labels: int, windowed_pairs: int = 0) -> int:
        """Forward FLOPs of so many tokens, visible (query, key) pairs and scored labels.

        Args:
            tokens, labels: of all layers, and of the output layer.
            pairs: in layers without a sliding window.
            windowed_pairs: in layers with one.
        """
        return (
            int(tokens) * self.linear_flops_per_token()
            + int(pairs) * self.attention_flops_per_pair()
            + int(windowed_pairs) * self.attention_flops_per_pair(windowed=True)
            + int(labels) * self.head_flops_per_label()
        )

    def last_layer_flops(self, *, tokens: int, pairs: int) -> int:
        """What trimmed last layers save: all of them but keys and values, or what makes and reads
        a state, in the first one, for so many tokens.

        Args:
            tokens: that it computes no query for.
            pairs: keys that these would see, from `last_layer_pairs`.
        """
        per_token, per_pair = self._last_layer
        return int(tokens) * per_token + int(pairs) * per_pair

    @cached_property
    def _trimmed(self) -> ModelShape:
        """The layers that are trimmed, as a model; at most the first of them mixes tokens."""
        kinds = self.kinds[self.first_trimmed :]
        return dataclasses.replace(
            self,
            num_layers=self.num_trimmed_layers,
            num_moe_layers=kinds.count(EXPERTS) if kinds else min(self.num_moe_layers, 1),
            windowed_layers=(),
            recurrent_layers=self.recurrent_layers[self.first_trimmed :],
            kinds=kinds,
        )

    @cached_property
    def _last_layer(self) -> tuple[int, int]:
        """FLOPs of the trimmed layers for a token, without the first one's keys and values, and for
        a pair."""
        last = self._trimmed
        weights = self.key_weights
        if (recurrent := last.recurrent_of(0)) is not None:
            kept = 2 * self.hidden_size * recurrent.projected + last.mixing_flops_per_token()
            return last.linear_flops_per_token() - kept, 0
        if not last.num_attending_layers:
            return last.linear_flops_per_token(), 0
        if self.latent is not None:  # whose queries are all expanded
            weights += self.query_weights
        return last.linear_flops_per_token() - 2 * weights, last.attention_flops_per_pair()

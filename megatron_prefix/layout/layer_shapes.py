"""Sizes of layers that are not plain softmax attention, for counts of FLOPs and bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LatentShape:
    """The sizes of multi-latent attention beside those of its heads."""

    query_rank: int
    """Of compressed queries; 0: they are not compressed."""
    rank: int
    """Of the latents that keys and values are expanded from."""
    shared_channels: int
    """Channels of a key that all heads share, which are not expanded."""
    value_channels: int
    """Size of a value's head."""


@dataclass(frozen=True, kw_only=True)
class PredictionShape:
    """The layers of multi-token prediction: each is as the model's last one, behind a projection of
    two norms' outputs side by side."""

    depths: int
    """D"""
    repeated: bool = False
    """Whether one layer runs for every depth."""
    experts: bool = False
    """Whether a layer has experts instead of the dense MLP."""
    windowed: tuple[bool, ...] = ()
    """[depths] whether each attends with the model's sliding window; (): none does."""


@dataclass(frozen=True, kw_only=True)
class RecurrentShape:
    """The sizes of a gated delta net."""

    num_key_heads: int
    num_value_heads: int
    """A state of each runs along every sequence."""
    key_channels: int
    """Size of a key's head."""
    value_channels: int
    """Size of a value's head."""
    width: int
    """Inputs that the convolution reads."""
    chunk_tokens: int
    """That are computed together, at most."""

    @property
    def keys(self) -> int:
        """Numbers of all heads' keys of a token; queries have as many."""
        return self.num_key_heads * self.key_channels

    @property
    def values(self) -> int:
        """Numbers of all heads' values of a token; the gate has as many."""
        return self.num_value_heads * self.value_channels

    @property
    def convolved(self) -> int:
        """Numbers of a token that the convolution runs over: queries, keys and values."""
        return 2 * self.keys + self.values

    @property
    def projected(self) -> int:
        """Numbers of a token that the first projection makes."""
        return self.convolved + self.values + 2 * self.num_value_heads

    def rule_flops_per_token(self) -> int:
        """Matrix products of the delta rule for one token, in whole chunks."""
        k, v = self.key_channels, self.value_channels
        # Two products of keys, a triangular solution and a product of values; three with a state.
        within = self.chunk_tokens * (5 * k + 3 * v)
        return self.num_value_heads * (within + 6 * k * v)

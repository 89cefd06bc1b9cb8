"""Sizes of layers that are not plain softmax attention, for counts of FLOPs and bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar


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
class RecurrentShape(ABC):
    """The sizes of a layer with a state of each head that runs along every sequence.

    One projection makes what a token gives to the states and reads them with, some of it through a
    short convolution, and a gate; another one takes what is read.
    """

    width: int
    """Inputs that the convolution reads."""
    chunk_tokens: int
    """That are computed together, at most."""
    reads_wide: ClassVar[bool] = False
    """What tokens read stays in float32 or wider until it is gated."""

    @property
    @abstractmethod
    def num_states(self) -> int:
        """Heads with a state of their own."""

    @property
    @abstractmethod
    def state_size(self) -> int:
        """Numbers of one state."""

    @property
    @abstractmethod
    def factor_size(self) -> int:
        """Numbers of what a run of tokens multiplies a state by."""

    @property
    @abstractmethod
    def values(self) -> int:
        """Numbers that a token reads from all states; the gate has as many."""

    @property
    @abstractmethod
    def convolved(self) -> int:
        """Numbers of a token that the convolution runs over."""

    @property
    @abstractmethod
    def projected(self) -> int:
        """Numbers of a token that the first projection makes."""

    @abstractmethod
    def rule_flops_per_token(self) -> int:
        """Matrix products of the states for one token, in whole chunks."""

    def convolution_flops_per_token(self) -> int:
        """The convolution, for one token."""
        return 2 * self.width * self.convolved

    def mixing_flops_per_token(self) -> int:
        """What reads other tokens: the convolution and the states, for one token."""
        return self.convolution_flops_per_token() + self.rule_flops_per_token()


@dataclass(frozen=True, kw_only=True)
class DeltaNetShape(RecurrentShape):
    """The sizes of a gated delta net."""

    num_key_heads: int
    num_value_heads: int
    """A state of each runs along every sequence."""
    key_channels: int
    """Size of a key's head."""
    value_channels: int
    """Size of a value's head."""

    @property
    def num_states(self) -> int:
        """See `RecurrentShape`."""
        return self.num_value_heads

    @property
    def state_size(self) -> int:
        """See `RecurrentShape`."""
        return self.key_channels * self.value_channels

    @property
    def factor_size(self) -> int:
        """See `RecurrentShape`."""
        return self.key_channels**2

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
        """Queries, keys and values."""
        return 2 * self.keys + self.values

    @property
    def projected(self) -> int:
        """What is convolved, the gate, and of each head a decay and how much is written."""
        return self.convolved + self.values + 2 * self.num_value_heads

    def rule_flops_per_token(self) -> int:
        """Matrix products of the delta rule for one token, in whole chunks."""
        k, v = self.key_channels, self.value_channels
        # Two products of keys, a triangular solution and a product of values; three with a state.
        within = self.chunk_tokens * (5 * k + 3 * v)
        return self.num_value_heads * (within + 6 * k * v)


@dataclass(frozen=True, kw_only=True)
class MambaShape(RecurrentShape):
    """The sizes of a Mamba-2 layer."""

    reads_wide = True
    num_heads: int
    """A state of each runs along every sequence."""
    num_groups: int
    """Of heads that write and read with the same B and C."""
    head_channels: int
    """Size of a head's inputs, x."""
    state_channels: int
    """Size of a group's B and C."""

    @property
    def num_states(self) -> int:
        """See `RecurrentShape`."""
        return self.num_heads

    @property
    def state_size(self) -> int:
        """See `RecurrentShape`."""
        return self.head_channels * self.state_channels

    @property
    def factor_size(self) -> int:
        """See `RecurrentShape`."""
        return self.state_channels

    @property
    def values(self) -> int:
        """Numbers of all heads' inputs of a token; the gate z has as many, and what is read."""
        return self.num_heads * self.head_channels

    @property
    def groups(self) -> int:
        """Numbers of all groups' B of a token; C has as many."""
        return self.num_groups * self.state_channels

    @property
    def convolved(self) -> int:
        """x, B and C."""
        return self.values + 2 * self.groups

    @property
    def projected(self) -> int:
        """What is convolved, the gate, and a step of each head."""
        return self.convolved + self.values + self.num_heads

    def rule_flops_per_token(self) -> int:
        """Matrix products of the chunks (arXiv 2405.21060, section 6) for one token."""
        n, p, c = self.state_channels, self.head_channels, self.chunk_tokens
        # C with B of a chunk's tokens, and of each head that with its inputs; two with a state.
        return 2 * c * self.num_groups * n + self.num_heads * (2 * c * p + 4 * n * p)

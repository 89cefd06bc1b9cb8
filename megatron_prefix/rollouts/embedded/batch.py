"""The state of one batch while it is being sampled: what runs next, and what has come out.

A finished response keeps its row for a while: its further tokens are drawn and forgotten. Rows are
dropped, and the cache copied, when a quarter of them has finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.rollouts.embedded.kv_cache import KeyValueCache, prompt_row
from megatron_prefix.rollouts.embedded.pipeline import DrawRequest, Draws

_KEPT_PART = 0.75
"""Rows are dropped when no more than this part of them is unfinished."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How responses are sampled."""

    max_response_length: int
    """Tokens at most."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Tokens come from the smallest set of most likely ones that holds so much probability."""
    stop_tokens: tuple[int, ...] = ()
    """A response ends with the first of these, which it keeps."""

    def __post_init__(self) -> None:
        if self.max_response_length < 1:
            raise ValueError(f"max_response_length={self.max_response_length}: set at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: set 0 or a number above it")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: set a number above 0, at most 1")


class ResponseBatch:
    """Prompts that run as one row, and their responses, which then run together."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: np.ndarray,
        options: SamplingOptions,
        *,
        setup: AttentionSetup,
        pad_to_multiple: int,
    ) -> None:
        """Lay out the prompts.

        Args:
            prompts: may be none; the batch then runs padding for as long as it is asked to.
            uniforms: [prompts, responses to each, max_response_length] random numbers.
            options: of the sampling.
            setup: of the model, see `KeyValueCache`.
            pad_to_multiple: rows become a multiple of this.
        """
        self._options = options
        self._num_responses = uniforms.shape[1]
        self._device = setup.device
        self._pad_to_multiple = pad_to_multiple
        self._uniforms = uniforms
        self._row = prompt_row(prompts, pad_to_multiple=pad_to_multiple)
        self._cache = KeyValueCache(
            self._row,
            setup,
            num_responses=self._num_responses,
            slots=options.max_response_length - 1,
        )
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        self._max_seqlen = int(lengths.max(initial=1)) + options.max_response_length
        # Per response: where its first token stands, its tokens, and how many (0: not ended yet).
        self._first_positions = np.repeat(lengths, self._num_responses)
        total = len(self._first_positions)
        self._tokens = np.zeros((total, options.max_response_length), dtype=np.int64)
        self._logprobs = np.zeros((total, options.max_response_length))
        self._lengths = np.zeros(total, dtype=np.int64)
        # The responses that have a row in the cache.
        self._rows = np.arange(total)
        self._num_drawn = 0

    @property
    def unfinished(self) -> bool:
        """Whether some response goes on."""
        return bool((self._lengths == 0).any())

    def prefill(self) -> DrawRequest:
        """Run the prompts and draw the first token of every response."""
        return DrawRequest(
            input_ids=self._on_device(self._row.layout.input_ids)[None],
            params=self._cache.prefill_params(max_seqlen=self._max_seqlen),
            positions=self._on_device(self._row.last_positions),
            uniforms=self._on_device(self._uniforms[:, :, 0]),
        )

    def decode(self) -> DrawRequest:
        """Run the last token of every response and draw the next one."""
        n, slot = len(self._rows), self._num_drawn - 1
        num_tokens = max(1, -(-n // self._pad_to_multiple)) * self._pad_to_multiple
        input_ids = np.zeros(num_tokens, dtype=np.int64)
        position_ids = np.zeros(num_tokens, dtype=np.int64)
        uniforms = np.zeros((n, 1))
        if n:
            input_ids[:n] = self._tokens[self._rows, slot]
            position_ids[:n] = self._first_positions[self._rows] + slot
            prompts, responses = np.divmod(self._rows, self._num_responses)
            uniforms[:, 0] = self._uniforms[prompts, responses, self._num_drawn]
        return DrawRequest(
            input_ids=self._on_device(input_ids)[None],
            params=self._cache.decode_params(
                self._on_device(position_ids), slot=slot, max_seqlen=self._max_seqlen
            ),
            positions=torch.arange(n, device=self._device),
            uniforms=self._on_device(uniforms),
        )

    def accept(self, draws: Draws) -> None:
        """Take in what was drawn for the last request."""
        rows, options = self._rows, self._options
        if len(rows) == 0:
            return
        tokens = draws.tokens.reshape(-1)
        self._tokens[rows, self._num_drawn] = tokens
        self._logprobs[rows, self._num_drawn] = draws.logprobs.reshape(-1)
        self._num_drawn += 1
        ended = np.isin(tokens, options.stop_tokens)
        if self._num_drawn == options.max_response_length:
            ended[:] = True
        ended_now = rows[ended & (self._lengths[rows] == 0)]
        self._lengths[ended_now] = self._num_drawn
        going_on = np.flatnonzero(self._lengths[rows] == 0)
        if len(going_on) <= _KEPT_PART * len(rows):
            self._cache.keep(going_on)
            self._rows = rows[going_on]

    def responses(self) -> list[list[tuple[NDArray[np.int32], NDArray[np.float64]]]]:
        """Tokens and log-probabilities of the responses to each prompt."""
        flat = [
            (tokens[:length].astype(np.int32), logprobs[:length].copy())
            for tokens, logprobs, length in zip(
                self._tokens, self._logprobs, self._lengths, strict=True
            )
        ]
        count = self._num_responses
        return [flat[start : start + count] for start in range(0, len(flat), count)]

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device, non_blocking=True)

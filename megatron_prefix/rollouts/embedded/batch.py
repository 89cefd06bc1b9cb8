"""The state of one batch while it is being sampled: what runs next, and what has come out.

A finished response keeps its row for a while: its further tokens are drawn and forgotten. Rows are
dropped, and the cache copied, when a quarter of them has finished.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.rollouts.embedded.kv_cache import KeyValueCache, prompt_row
from megatron_prefix.rollouts.embedded.pipeline import DrawRequest, Draws
from megatron_prefix.rollouts.sampling.sampler import Response, SamplingSpec

_KEPT_PART = 0.75
"""Rows are dropped when no more than this part of them is unfinished."""


class ResponseBatch:
    """Prompts that run as one row, and their responses, which then run together."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: np.ndarray,
        spec: SamplingSpec,
        *,
        setup: AttentionSetup,
        pad_to_multiple: int,
    ) -> None:
        """Lay out the prompts, in rows whose length is a multiple of `pad_to_multiple`.

        Without any the batch runs padding for as long as it is asked to. `uniforms` are random
        numbers, [prompts, responses to each, max_response_length].
        """
        self._spec = spec
        self._num_responses = uniforms.shape[1]
        self._device = setup.device
        self._pad_to_multiple = pad_to_multiple
        self._uniforms = uniforms
        self._row = prompt_row(prompts, pad_to_multiple=pad_to_multiple)
        self._cache = KeyValueCache(
            self._row,
            setup,
            num_responses=self._num_responses,
            slots=spec.max_response_length - 1,
        )
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        self._max_seqlen = int(lengths.max(initial=1)) + spec.max_response_length
        # Per response: where its first token stands, its tokens, and how many (0: not ended yet).
        self._first_positions = np.repeat(lengths, self._num_responses)
        total = len(self._first_positions)
        self._tokens = np.zeros((total, spec.max_response_length), dtype=np.int64)
        self._logprobs = np.zeros((total, spec.max_response_length))
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
        input_ids, position_ids = np.zeros((2, num_tokens), dtype=np.int64)
        input_ids[:n] = self._tokens[self._rows, slot]
        position_ids[:n] = self._first_positions[self._rows] + slot
        # A batch without unfinished responses runs on while others do.
        number = min(self._num_drawn, self._spec.max_response_length - 1)
        prompts, responses = np.divmod(self._rows, self._num_responses)
        uniforms = self._uniforms[prompts, responses, number, None]
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
        rows, spec = self._rows, self._spec
        if len(rows) == 0:
            return
        tokens, logprobs = draws.reshape(2, -1)
        self._tokens[rows, self._num_drawn] = tokens
        self._logprobs[rows, self._num_drawn] = logprobs
        self._num_drawn += 1
        ended = np.isin(tokens, spec.stop_tokens) | (self._num_drawn == spec.max_response_length)
        self._lengths[rows[ended & (self._lengths[rows] == 0)]] = self._num_drawn
        going_on = np.flatnonzero(self._lengths[rows] == 0)
        if len(going_on) <= _KEPT_PART * len(rows):
            self._cache.keep(going_on)
            self._rows = rows[going_on]

    def responses(self) -> list[list[Response]]:
        """The responses to each prompt."""
        rows = zip(self._tokens, self._logprobs, self._lengths, strict=True)
        flat = [
            Response(
                tokens=tokens[:length].astype(np.int32),
                logprobs=logprobs[:length].copy(),
                finished=bool(tokens[length - 1] in self._spec.stop_tokens),
            )
            for tokens, logprobs, length in rows
        ]
        count = self._num_responses
        return [flat[start : start + count] for start in range(0, len(flat), count)]

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device, non_blocking=True)

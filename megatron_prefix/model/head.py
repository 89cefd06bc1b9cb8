"""Log-probabilities or samples in place of logits, at chosen positions only.

GPTModel's own output layer becomes a `LogProbHead` (same object, same parameters, same checkpoint
keys). While log-probabilities of labels are requested it returns these and entropies instead of
logits; while something else is to be made of logits, such as samples, what was made. Both go in
chunks, so that logits of the whole row never exist. Without a request it is Megatron's output
layer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor

from megatron_prefix.objective.log_probs import vocab_parallel_log_probs


class LogProbHead(ColumnParallelLinear):
    """Megatron's vocabulary-parallel output layer with requests for what becomes of logits."""

    vocab_size: int
    chunk_tokens: int
    _request: Callable[[Tensor, Tensor], Tensor] | None = None
    """Hidden states [T, h] and the weight's shard -> the output [N, ...]."""

    @classmethod
    def install(cls, model: GPTModel, *, vocab_size: int, chunk_tokens: int) -> LogProbHead | None:
        """Turn the model's output layer into a head; None on stages that have no output layer."""
        if not model.post_process:
            return None
        head = model.output_layer
        assert type(head) is ColumnParallelLinear, type(head)
        head.__class__ = cls
        head.vocab_size = vocab_size
        head.chunk_tokens = chunk_tokens
        return head

    @contextlib.contextmanager
    def request(
        self,
        label_positions: Tensor,
        labels: Tensor,
        *,
        temperature: float,
        train_entropy: bool,
    ) -> Iterator[None]:
        """Within the block the model returns [1, N, 2]: log-probability and entropy per label.

        Args:
            label_positions: [N] rows of the output layer's input.
            labels: [N] token ids.
            temperature: logits are divided by it.
            train_entropy: let gradients flow to the entropies.
        """
        with self._answering(
            functools.partial(
                self._log_probs,
                positions=label_positions,
                labels=labels,
                temperature=temperature,
                train_entropy=train_entropy,
            )
        ):
            yield

    @contextlib.contextmanager
    def request_from_logits(
        self, positions: Tensor, make: Callable[[Tensor, slice], Tensor]
    ) -> Iterator[None]:
        """Within the block the model returns [1, N, ...]: what `make` makes of logits.

        Args:
            positions: [N] rows of the packed row.
            make: called with logits [n, vocab_size] in float32 or wider, gathered over
                tensor-parallel ranks, and with the slice of the N positions that they are of;
                returns a tensor [n, ...].
        """
        with self._answering(functools.partial(self._from_logits, positions=positions, make=make)):
            yield

    @contextlib.contextmanager
    def _answering(self, request: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
        self._request = request
        try:
            yield
        finally:
            self._request = None

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """input_ [T or T/tp, 1, h] -> logits, or [N, 1, ...] during a request."""
        if self._request is None:
            return super().forward(input_, weight, *args, **kwargs)
        # Each rank's vocabulary shard contributes a part of the hidden states' gradient: both
        # mappings add these up in backward.
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(input_)
        output = self._request(hidden[:, 0], self.weight if weight is None else weight)
        return output[:, None], None

    def _log_probs(
        self,
        hidden: Tensor,
        weight: Tensor,
        *,
        positions: Tensor,
        labels: Tensor,
        temperature: float,
        train_entropy: bool,
    ) -> Tensor:
        logprobs, entropy = vocab_parallel_log_probs(
            hidden.index_select(0, positions),
            weight,
            labels,
            group=self.tp_group,
            temperature=temperature,
            chunk_size=self.chunk_tokens,
            vocab_size=self.vocab_size,
            with_entropy=True,
        )
        if not train_entropy:
            entropy = entropy.detach()
        return torch.stack((logprobs, entropy), dim=-1)

    def _from_logits(
        self,
        hidden: Tensor,
        weight: Tensor,
        *,
        positions: Tensor,
        make: Callable[[Tensor, slice], Tensor],
    ) -> Tensor:
        hidden = hidden.index_select(0, positions)
        made = []
        for start in range(0, max(1, len(positions)), self.chunk_tokens):
            rows = slice(start, min(start + self.chunk_tokens, len(positions)))
            logits = gather_from_tensor_model_parallel_region(
                hidden[rows] @ weight.t(), group=self.tp_group
            )
            logits = logits[:, : self.vocab_size]
            made.append(make(logits.to(torch.promote_types(logits.dtype, torch.float32)), rows))
        return torch.cat(made)

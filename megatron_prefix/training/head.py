"""Log-probabilities in place of logits, at labelled positions only.

GPTModel's own output layer becomes a `LogProbHead` (same object, same parameters, same checkpoint
keys). While labels are requested it returns their log-probabilities and entropies instead of
logits, chunked, so that logits of the whole row never exist; without a request it is Megatron's
output layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, stack

from megatron_prefix.objective.log_probs import vocab_parallel_log_probs


class LogProbHead(ColumnParallelLinear):
    """Megatron's vocabulary-parallel output layer with a request for log-probabilities."""

    vocab_size: int
    chunk_tokens: int
    _request: tuple[Tensor, Tensor, float, bool] | None = None

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
            label_positions: [N] rows of the packed row.
            labels: [N] token ids.
            temperature: logits are divided by it.
            train_entropy: let gradients flow to the entropies.
        """
        self._request = (label_positions, labels, temperature, train_entropy)
        try:
            yield
        finally:
            self._request = None

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """input_ [T or T/tp, 1, h] -> logits, or [N, 1, 2] while labels are requested."""
        if self._request is None:
            return super().forward(input_, weight, *args, **kwargs)
        positions, labels, temperature, train_entropy = self._request
        weight = self.weight if weight is None else weight
        # Each rank's vocabulary shard contributes a part of the hidden states' gradient: both
        # mappings add these up in backward.
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(input_)
        logprobs, entropy = vocab_parallel_log_probs(
            hidden[:, 0].index_select(0, positions),
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
        return stack((logprobs, entropy), dim=-1)[:, None], None

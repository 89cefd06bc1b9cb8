"""Log-probabilities or samples in place of logits, at chosen positions only.

Both are made in chunks of the positions, so that logits of the whole row never exist.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor

from megatron_prefix.layers.predictions import PredictionDepth
from megatron_prefix.megatron.output import all_rows, output_made_by
from megatron_prefix.objective.log_probs import output_logits, vocab_parallel_log_probs


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PredictedLabels:
    """Labels of one depth of multi-token prediction."""

    depth: PredictionDepth
    """Of the batch."""
    positions: Tensor
    """[M] rows of its output."""
    labels: Tensor
    """[M] token ids."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LogProbHead:
    """What becomes of the final hidden states of a model on the last pipeline stage.

    Its methods run the model's forward pass, given as a function, and return what that returns.
    """

    output_layer: ColumnParallelLinear
    """The model's own, vocabulary-parallel."""
    vocab_size: int
    """Tokens of the vocabulary, without padding."""
    chunk_tokens: int
    """Rows of logits that exist at once."""
    wide_products: bool
    """See `vocab_parallel_log_probs`."""
    of_gpt_model: bool = True
    """See `output_made_by`."""
    detach_predictions: bool = False
    """Whether predictions leave the output weight as it is, see `prefix_gpt_model`."""

    @classmethod
    def of(
        cls,
        model: LanguageModule,
        *,
        vocab_size: int,
        chunk_tokens: int,
        wide_products: bool = False,
    ) -> LogProbHead | None:
        """The head of a GPTModel or HybridModel; None on stages that have no output layer."""
        if not model.post_process:
            return None
        return cls(
            output_layer=model.output_layer,
            vocab_size=vocab_size,
            chunk_tokens=chunk_tokens,
            wide_products=wide_products,
            of_gpt_model=isinstance(model, GPTModel),
            detach_predictions=getattr(model, "detach_predictions", False),
        )

    def log_probs(
        self,
        call: Callable[..., Tensor],
        positions: Tensor,
        labels: Tensor,
        *,
        temperature: float,
        with_entropy: bool,
        train_entropy: bool = False,
        predictions: Sequence[PredictedLabels] = (),
    ) -> Tensor:
        """[1, N, 2]: the log-probability of each label and the entropy there; [1, N, 1] without.

        Behind them come the M of each depth of prediction, without entropies (0).

        Args:
            call: runs the model; hands keyword arguments on to its forward.
            positions: [N] rows of the output layer's input.
            labels: [N] token ids.
            temperature: logits are divided by it.
            with_entropy: compute entropies; they cost a second chunk of logits and an exp.
            train_entropy: let gradients flow to the entropies.
            predictions: what each depth predicts, at temperature 1.
        """
        assert with_entropy or not train_entropy

        def make(hidden: Tensor, weight: Tensor) -> Tensor:
            logprobs, entropy = vocab_parallel_log_probs(
                hidden.index_select(0, positions),
                weight,
                labels,
                group=self.output_layer.tp_group,
                temperature=temperature,
                chunk_size=self.chunk_tokens,
                vocab_size=self.vocab_size,
                with_entropy=with_entropy,
                wide_products=self.wide_products,
            )
            if entropy is None:
                found = logprobs[:, None]
            else:
                entropy = entropy if train_entropy else entropy.detach()
                found = torch.stack((logprobs, entropy), dim=-1)
            if not predictions:
                return found
            predicted = torch.cat([self._predicted(of, weight) for of in predictions])[:, None]
            return torch.cat((found, F.pad(predicted, (0, found.shape[1] - 1))))

        return output_made_by(make, call, self.output_layer, of_gpt_model=self.of_gpt_model)

    def _predicted(self, predicted: PredictedLabels, weight: Tensor) -> Tensor:
        """[M] log-probabilities of one depth's labels."""
        hidden = all_rows(predicted.depth.taken(), self.output_layer)
        logprobs, _ = vocab_parallel_log_probs(
            hidden.index_select(0, predicted.positions),
            weight.detach() if self.detach_predictions else weight,
            predicted.labels,
            group=self.output_layer.tp_group,
            chunk_size=self.chunk_tokens,
            vocab_size=self.vocab_size,
            wide_products=self.wide_products,
        )
        return logprobs

    def from_logits(
        self,
        call: Callable[..., Tensor],
        positions: Tensor,
        make_of: Callable[[Tensor, slice], Tensor],
    ) -> Tensor:
        """[1, N, ...]: what `make_of` makes of logits.

        Args:
            call: runs the model; hands keyword arguments on to its forward.
            positions: [N] rows of the output layer's input.
            make_of: called with logits [n, vocab_size] in float32 or wider, gathered over
                tensor-parallel ranks, and with the slice of the N positions that they are of;
                returns a tensor [n, ...].
        """

        def make(hidden: Tensor, weight: Tensor) -> Tensor:
            hidden = hidden.index_select(0, positions)
            made = []
            for start in range(0, max(1, len(positions)), self.chunk_tokens):
                rows = slice(start, min(start + self.chunk_tokens, len(positions)))
                logits = gather_from_tensor_model_parallel_region(
                    output_logits(hidden[rows], weight, wide_products=self.wide_products),
                    group=self.output_layer.tp_group,
                )[:, : self.vocab_size]
                wide = torch.promote_types(logits.dtype, torch.float32)
                made.append(make_of(logits.to(wide), rows))
            return torch.cat(made)

        return output_made_by(make, call, self.output_layer, of_gpt_model=self.of_gpt_model)

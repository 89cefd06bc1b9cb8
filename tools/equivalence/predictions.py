"""Multi-token prediction of the reference: Megatron's own, on whole sequences."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

from equivalence.case import Case, trained_tokens
from equivalence.objectives import response_terms
from megatron_prefix.rollouts.records import RolloutGroup


class OwnPredictions:
    """Runs a model's own multi-token prediction beside its logits, and adds up its loss.

    Its gradients come with those of the logits: Megatron hangs them in.
    """

    def __init__(self, model: torch.nn.Module, case: Case) -> None:
        """Nothing has run.

        Args:
            model: with `mtp_num_layers`; Megatron sums over a sequence's tokens, since the config
                has `calculate_per_token_loss`.
            case: its prompts are longer than the depth, so that no trained token is rolled out.
        """
        self.loss = 0.0
        """Mean over trained tokens and depths, without the coefficient."""
        self._model, self._depths = model, model.config.mtp_num_layers
        self._vocab_size = case.model.vocab_size
        terms = response_terms(case)
        self._tokens = sum(
            len(trained_tokens(group, i))
            for group, of_group in zip(case.groups, terms, strict=True)
            for i, of in enumerate(of_group)
            if of.weight
        )
        MTPLossAutoScaler.set_loss_scale(torch.tensor(1 / self._tokens, dtype=torch.float64))

    def logits(self, tokens: torch.Tensor, group: RolloutGroup, index: int, **how: Any) -> Any:
        """[1, length - 1, vocab] of a whole sequence, whose backward has that of its predictions.

        Args:
            tokens: [length] of the sequence.
            group: of the sequence.
            index: of its response.
            how: what else the model is called with.
        """
        labels, mask = tokens[1:], torch.zeros(len(tokens) - 1)
        mask[len(group.prompt) - 1 + torch.from_numpy(trained_tokens(group, index))] = 1
        with self._outputs() as outputs:
            self._model(tokens[None, :-1], labels=labels[None], loss_mask=mask[None], **how)
        *predicted, logits = outputs
        for depth, of_depth in enumerate(predicted, start=1):
            chosen = torch.log_softmax(of_depth[:-depth, 0], -1).gather(1, labels[depth:, None])
            loss = -(chosen[:, 0] * mask[depth:]).sum() / self._tokens / self._depths
            self.loss += float(loss.detach())
        return logits.transpose(0, 1)

    @contextlib.contextmanager
    def _outputs(self) -> Iterator[list[torch.Tensor]]:
        """What the output layer puts out: for each depth, then of the model itself."""
        found: list[torch.Tensor] = []

        def keep(_module: Any, _inputs: Any, output: Any) -> Any:
            logits, *others = output
            # Megatron's loss of predictions would count rows that pad the vocabulary.
            logits = logits.clone()
            logits[..., self._vocab_size :] = -torch.inf
            found.append(logits)
            # Megatron's loss takes the logits for its own.
            return logits.clone(), *others

        handle = self._model.output_layer.register_forward_hook(keep)
        try:
            yield found
        finally:
            handle.remove()

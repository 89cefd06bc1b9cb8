"""Megatron's GPTModel and its MTP layers, that predict further tokens of shared prefixes.

    depth k:  h'  = layer(norm(h), norm(embedding of the token k behind))      row of shift k
              h   = h' moved                                                    row of shift k + 1
              logits of the token k + 1 behind = output layer(h)

`prefix_gpt_model(GPTModel)` is built with an MTP block spec that went through `prefix_grouped`.
Parameters and checkpoint keys are Megatron's. For batches with `PrefixPackedSeqParams` its forward
leaves the hidden states of each depth in the params' `predictions`, and computes no loss of them:
Megatron's own rolls labels, over the borders of segments. Params without `predictions` skip these
layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from torch import Tensor

from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layers.predictions import PredictionDepth
from megatron_prefix.layers.subclass import prefix_subclass
from megatron_prefix.megatron.borrowed import without_prediction_loss
from megatron_prefix.megatron.options.layers import MARK_OF_PREDICTING_MODELS
from megatron_prefix.megatron.releases import option


class _PrefixPredictionLayer:
    """An MTP layer on the rows of a depth."""

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: Any = None,
        embedding: Callable[..., Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """See Megatron's `MultiTokenPredictionLayer.forward`.

        With a `PredictionDepth` it is given and returns hidden states alone: [C, 1, h] of the rows
        it attends to -> [C, 1, h] of those of its loss.
        """
        if not isinstance(packed_seq_params, PredictionDepth):
            return super().forward(
                input_ids,
                position_ids,
                hidden_states,
                attention_mask,
                *args,
                packed_seq_params=packed_seq_params,
                embedding=embedding,
                **kwargs,
            )
        assert not args and embedding is not None
        depth = packed_seq_params
        run = functools.partial(
            self._proj_and_transformer_layer,
            attention_mask=attention_mask,
            packed_seq_params=depth.params,
            **kwargs,
        )
        embedded = embedding(input_ids=depth.tokens, position_ids=depth.token_positions)
        if self.config.recompute_granularity == "full" and self.training:
            # Megatron's own way hands the params to autograd, which takes tensors only.
            hidden = checkpoint(
                lambda states, tokens: run(hidden_states=states, decoder_input=tokens),
                self.config.distribute_saved_activations,
                hidden_states,
                embedded,
            )
        else:
            hidden = run(hidden_states=hidden_states, decoder_input=embedded)
        return depth.moved(hidden, sequence_parallel=self.config.sequence_parallel)


class _PrefixGPTModel:
    """A GPTModel whose MTP layers run on the depths of a batch."""

    detach_predictions = False
    """Whether the predictions train the MTP layers alone: neither the decoder, whose output and
    embeddings they read, nor, where the loss heeds it, the output layer."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        setattr(config, MARK_OF_PREDICTING_MODELS, True)
        spec = kwargs.get("mtp_block_spec")
        for layer in () if spec is None else spec.layer_specs:
            if not issubclass(layer.module, _PrefixPredictionLayer):
                raise ValueError(
                    f"mtp_block_spec: {layer.module.__name__} cannot share prefixes; pass "
                    "prefix_grouped(mtp_block_spec)"
                )
        super().__init__(config, *args, **kwargs)

    def _postprocess(
        self,
        *,
        hidden_states: Tensor,
        packed_seq_params: Any = None,
        mtp_in_postprocess: bool | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """See Megatron's `GPTModel._postprocess`."""
        if not isinstance(packed_seq_params, PrefixPackedSeqParams):
            return super()._postprocess(
                hidden_states=hidden_states,
                packed_seq_params=packed_seq_params,
                mtp_in_postprocess=mtp_in_postprocess,
                **kwargs,
            )
        if mtp_in_postprocess and packed_seq_params.predictions is not None:
            tables = ("rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin")
            self._predict(
                hidden_states,
                packed_seq_params.predictions,
                **{name: kwargs[name] for name in tables},
            )
        with without_prediction_loss(self):
            return super()._postprocess(
                hidden_states=hidden_states,
                packed_seq_params=packed_seq_params,
                mtp_in_postprocess=False,
                **kwargs,
            )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> Any:
        """See Megatron's `GPTModel.sharded_state_dict`.

        On a last stage with an embedding of its own Megatron reads a group in the metadata.
        """
        if metadata is None:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            metadata = {"dp_cp_group": group}
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)

    def _predict(
        self, hidden: Tensor, depths: tuple[PredictionDepth, ...], **tables: Tensor | None
    ) -> None:
        """Leave what each depth predicts from in it."""
        if len(depths) != self.config.mtp_num_layers:
            raise ValueError(
                f"predictions of {len(depths)} depths for a model with mtp_num_layers="
                f"{self.config.mtp_num_layers}: give the params as many"
            )
        embedding: Callable[..., Tensor] = self.embedding
        if self.detach_predictions:
            # Recompute needs an input that has a gradient.
            hidden = hidden.detach().requires_grad_()
            embedding = self._detached_embedding
        for index, depth in enumerate(depths):
            repeated = option(self.config, "mtp_use_repeated_layer")
            layer = self.mtp.layers[0 if repeated else index]
            hidden = layer(
                None,
                None,
                hidden,
                None,
                packed_seq_params=depth,
                embedding=embedding,
                **tables,
            )
            depth.hidden = hidden
            if option(self.config, "mrope_section") is not None:
                # A table of the tokens, not of positions: its rows move as the hidden states do.
                tables = {
                    name: table if table is None else depth.moved(table, sequence_parallel=False)
                    for name, table in tables.items()
                }

    def _detached_embedding(self, **tokens: Tensor) -> Tensor:
        return self.embedding(**tokens).detach()


def prefix_prediction_layer(base: type) -> type:
    """The subclass of a Megatron MTP layer class that takes a depth of shared prefixes."""
    return prefix_subclass(_PrefixPredictionLayer, base)


def is_prediction_layer(module: Any) -> bool:
    """Whether a spec's module is an MTP layer."""
    return isinstance(module, type) and issubclass(module, MultiTokenPredictionLayer)


def prefix_gpt_model(base: type = GPTModel) -> type:
    """The subclass of a GPTModel class that predicts further tokens of shared prefixes.

    A class that already is one is returned as it is.
    """
    return prefix_subclass(_PrefixGPTModel, base)

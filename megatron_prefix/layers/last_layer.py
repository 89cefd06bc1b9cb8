"""A decoder layer that, as the model's last one, goes on only with the rows that are needed.

Where a batch's params have `last_layer` set, the last layer computes keys and values of all T
tokens, but queries, attention output, projection and MLP of N rows only. Its output, hence the
model's, is [N, 1, h], or [N/tp, 1, h] on each rank under sequence parallelism. Experts that collect
statistics of all tokens are given all T; then the layer's output is trimmed, and nothing in it.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Literal

import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_prefix.layers.dropout import refuse_dropout
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layers.replay import replaying
from megatron_prefix.layers.router import collects_statistics, counting_by_multiplicity
from megatron_prefix.layers.subclass import prefix_subclass
from megatron_prefix.megatron.borrowed import residual_through
from megatron_prefix.megatron.fused_gradients import gradient_by_autograd
from megatron_prefix.megatron.releases import option

Trimming = Literal["before", "here", "behind"]
"""Whether a layer takes and puts out all rows, puts out the needed ones only, or takes these."""


class _PrefixTransformerLayer:
    prefix_trimming: Trimming | None = None
    """Of a HybridModel, whose last layers are trimmed; None: the model's last layer is."""
    prefix_dropout_refused = False
    """Whether this layer was searched for dropout, which may come in after it was built."""

    def forward(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> Any:
        """See Megatron's `TransformerLayer.forward`."""
        context: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        shares_prefixes = isinstance(packed_seq_params, PrefixPackedSeqParams)
        if shares_prefixes and self.training and not self.prefix_dropout_refused:
            refuse_dropout(self, f"layer {self.layer_number}")
            self.prefix_dropout_refused = True
        last_params = None
        trimming = self._trimming()
        if shares_prefixes and trimming != "before":
            last_params = packed_seq_params.last_layer
        # Tokens that are sampled have no multiplicity, and nothing is learnt from them.
        counts = (
            shares_prefixes
            and packed_seq_params.multiplicity is not None
            and collects_statistics(self)
        )
        if counts:
            context = counting_by_multiplicity(self, packed_seq_params)
        elif last_params is not None:
            packed_seq_params = last_params
            if trimming == "here":
                if isinstance(self.self_attention, IdentityOp):
                    hidden_states = needed_rows(hidden_states, last_params, self.config)
                else:
                    context = residual_through(
                        self, functools.partial(needed_rows, params=last_params, config=self.config)
                    )
        replay: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if shares_prefixes:
            replay = replaying(self, packed_seq_params)
        with context, replay:
            output = super().forward(
                hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs
            )
        if counts and last_params is not None:
            hidden, *rest = output
            output = (needed_rows(hidden, last_params, self.config), *rest)
        return output

    def _trimming(self) -> Trimming:
        if self.prefix_trimming is not None:
            return self.prefix_trimming
        return "here" if self.layer_number == self.config.num_layers else "before"


def prefix_transformer_layer(base: type) -> type:
    """The subclass of a Megatron transformer layer class that can be a trimmed last layer.

    A class that already is one is returned as it is.
    """
    return prefix_subclass(_PrefixTransformerLayer, base)


def needed_rows(hidden: Tensor, params: PrefixPackedSeqParams, config: TransformerConfig) -> Tensor:
    """[T, 1, h] -> [N, 1, h]; under sequence parallelism [T/tp, 1, h] -> [N/tp, 1, h].

    There each rank contributes the rows that lie in its part, and all get theirs from the sum.
    """
    if not config.sequence_parallel:
        return hidden.index_select(0, params.query_rows)
    size = hidden.shape[0]
    start = parallel_state.get_tensor_model_parallel_rank() * size
    first, last = params.query_rows_host.searchsorted([start, start + size]).tolist()
    own = hidden.index_select(0, params.query_rows[first:last] - start)
    spread = F.pad(own, (0, 0, 0, 0, first, len(params.query_rows_host) - last))
    return reduce_scatter_to_sequence_parallel_region(spread)


def query_key_value(
    attention: Any, hidden_states: Tensor, params: PrefixPackedSeqParams
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Queries of the params' rows, and keys and values of all, without computing other queries.

    Args:
        attention: a Megatron self attention.
        hidden_states: [T, 1, h], or [T/tp, 1, h] under sequence parallelism.
        params: with `query_rows`.

    Returns:
        query [N, 1, heads, dim], key and value [T, 1, kv heads, dim] of this tensor-parallel rank,
        normalised as the layer does; None where its projection can only be computed whole: it is
        no plain linear layer (Transformer Engine's holds the norm too), or has no whole groups.
    """
    linear, config = attention.linear_qkv, attention.config
    if (
        type(linear) is not ColumnParallelLinear
        or option(config, "attention_output_gate")
        # A rank's shard of the weight is then less than a group of queries, key and value.
        or config.num_query_groups < config.tensor_model_parallel_size
    ):
        return None
    if linear.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=True
        )
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden_states)
    groups, dim = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
    heads_of_group = attention.num_attention_heads_per_partition // groups

    whole_weight = gradient_by_autograd(linear.weight)

    def project(x: Tensor, heads: slice) -> Tensor:
        """[n, 1, h] -> [n, 1, groups, heads of the slice, dim]; a group is queries, key, value."""
        weight, bias = (
            None if w is None else w.unflatten(0, (groups, heads_of_group + 2, dim))[:, heads]
            for w in (whole_weight, linear.bias)
        )
        out = F.linear(x, weight.flatten(0, 2), None if bias is None else bias.flatten())
        return out.unflatten(-1, (groups, -1, dim))

    query = project(hidden.index_select(0, params.query_rows), slice(0, heads_of_group))
    query = query.flatten(2, 3)
    key, value = project(hidden, slice(heads_of_group, None)).unbind(3)
    if attention.q_layernorm is not None:
        query = attention.q_layernorm(query)
    if attention.k_layernorm is not None:
        key = attention.k_layernorm(key)
    return query, key, value

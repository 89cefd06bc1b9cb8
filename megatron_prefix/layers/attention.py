"""The two Megatron modules that share prefixes, as layers over the user's own classes.

`prefix_self_attention(C)` and `prefix_core_attention(C)` return subclasses of the Megatron classes
C that a layer spec names (local or Transformer Engine). Parameters, checkpoint keys and behaviour
are those of C, until a batch carries `PrefixPackedSeqParams`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from typing import Any, Literal

from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from megatron_prefix.attention.comm_types import layer_comm_type
from megatron_prefix.attention.context_parallel.latents import LatentKeys
from megatron_prefix.attention.row_attention import AttentionLayer
from megatron_prefix.attention.windows import layer_window
from megatron_prefix.layers.last_layer import query_key_value
from megatron_prefix.layers.latent_attention import prefix_latent_attention
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layers.subclass import prefix_subclass
from megatron_prefix.megatron.borrowed import row_as_one_sequence
from megatron_prefix.megatron.latent_attention import is_latent
from megatron_prefix.megatron.options import refuse_unsupported
from megatron_prefix.megatron.releases import option

RopeTable = Literal["by position", "by token"]
"""What the rows of a model's RoPE table are: positions from 0, as GPTModel makes it, or the tokens
of the packed row, where a subclass has taken the positions' rows already."""


class _PrefixSelfAttention:
    """Turns GPTModel's RoPE table into one row per token of the packed row."""

    prefix_params: Any = None
    """Of the batch that runs."""
    prefix_rope_table: RopeTable | None = None
    """Of the model; None: as Megatron's own models make it."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """See Megatron's `Attention.forward`."""
        if not isinstance(packed_seq_params, PrefixPackedSeqParams):
            context: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        else:
            context = row_as_one_sequence(
                self,
                packed_seq_params,
                query_rows=packed_seq_params.query_rows,
                rows=packed_seq_params.position_ids,
            )
            if rotary_pos_emb is not None:
                # Megatron takes a table of exactly T rows token by token, in every release.
                tables = rotary_pos_emb
                if not isinstance(tables, tuple):
                    tables = (tables, tables)
                queries = packed_seq_params.query_rows
                of_keys = self._table_of_row(tables[1], packed_seq_params)
                of_queries = (
                    of_keys
                    if tables[0] is tables[1]
                    else self._table_of_row(tables[0], packed_seq_params)
                )
                if queries is not None:
                    of_queries = of_queries[queries]
                rotary_pos_emb = (of_queries, of_keys)
        # `get_query_key_value_tensors` is not given the params.
        self.prefix_params = packed_seq_params
        with context:
            return super().forward(
                hidden_states,
                attention_mask,
                *args,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
                **kwargs,
            )

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        """See Megatron's `SelfAttention`; in a trimmed last layer, queries of some rows only."""
        params = self.prefix_params
        if not isinstance(params, PrefixPackedSeqParams) or params.query_rows is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        found = query_key_value(self, hidden_states, params)
        if found is not None:
            return found
        query, key, value, *gate = super().get_query_key_value_tensors(
            hidden_states, *args, **kwargs
        )
        query, *gate = (x.index_select(0, params.query_rows) for x in (query, *gate))
        return query, key, value, *gate

    def _table_of_row(self, table: Tensor, params: PrefixPackedSeqParams) -> Tensor:
        """[positions or T, ...] -> [T, ...] the row of each token, as mRoPE's table has it."""
        num_tokens = len(params.position_ids)
        if params.mrope_position_ids is not None:
            return table
        if self.prefix_rope_table == "by token":
            if len(table) != num_tokens:
                raise ValueError(
                    f"rope_table='by token', but the model's RoPE table has {len(table)} rows for "
                    f"{num_tokens} tokens. Leave rope_table out if the model does not take the "
                    "rows of the table by position_ids"
                )
            return table
        if self.prefix_rope_table is None and len(table) == num_tokens != params.max_seqlen_kv:
            raise ValueError(
                f"the model's RoPE table has {num_tokens} rows, which are the row's tokens or as "
                f"many positions; Megatron's own has {params.max_seqlen_kv}. Give share_prefixes "
                "rope_table='by token' or rope_table='by position'"
            )
        return table[params.position_ids]


class _PrefixCoreAttention:
    """Attention in stages over a packed row with shared prefixes."""

    prefix_latents: LatentKeys | None = None
    """Of the batch that runs, left here by a multi-latent self attention."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = kwargs["config"] if "config" in kwargs else args[0]
        refuse_unsupported(config)
        prefix_only = config.context_parallel_size > 1 and isinstance(self, DotProductAttention)
        if prefix_only:
            # Megatron's own dot-product attention refuses context parallelism; ours never asks it.
            base_config = copy.copy(config)
            base_config.context_parallel_size = 1
            if "config" in kwargs:
                kwargs = {**kwargs, "config": base_config}
            else:
                args = (base_config, *args[1:])
        super().__init__(*args, **kwargs)
        self.config = config
        self.prefix_only = prefix_only
        number = kwargs["layer_number"] if "layer_number" in kwargs else args[1]
        self.prefix_layer = _attention_layer(config, number, kwargs.get("softmax_scale"))
        _require_sink(self, config)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """[T or N, heads * value dim] of query [T or N, heads, dim], key [T, kv heads, dim] and
        value [T, kv heads, value dim]."""
        if not isinstance(packed_seq_params, PrefixPackedSeqParams):
            if self.prefix_only:
                raise ValueError(
                    f"context_parallel_size={self.config.context_parallel_size}: batches without "
                    "PrefixPackedSeqParams need Transformer Engine's attention; give the batch "
                    "these params, or use a Transformer Engine layer spec"
                )
            return super().forward(
                query,
                key,
                value,
                attention_mask,
                attn_mask_type=attn_mask_type,
                attention_bias=attention_bias,
                packed_seq_params=packed_seq_params,
                **kwargs,
            )
        if attention_bias is not None:
            raise ValueError(
                "attention_bias cannot be combined with shared prefixes: leave it None for batches "
                "that carry PrefixPackedSeqParams"
            )
        layer = dataclasses.replace(
            self.prefix_layer,
            sink=getattr(self, "softmax_offset", None),
            latents=self.prefix_latents,
        )
        self.prefix_latents = None
        out = packed_seq_params.attention(query, key, value, layer)
        return out.reshape(out.shape[0], -1)


def _attention_layer(config: Any, number: int, scale: float | None) -> AttentionLayer:
    return AttentionLayer(
        number=number,
        scale=1.0 / math.sqrt(config.kv_channels) if scale is None else scale,
        comm_type=layer_comm_type(config, number),
        window=layer_window(config, number),
    )


def _require_sink(core_attention: Any, config: Any) -> None:
    """Raise a ValueError where the config asks for a sink that the core attention does not hold."""
    kind = option(config, "softmax_type")
    if kind not in (None, "vanilla") and getattr(core_attention, "softmax_offset", None) is None:
        raise ValueError(
            f"softmax_type={kind!r}: {type(core_attention).__name__} has no softmax_offset. Use "
            "Megatron's local layer spec or Transformer Engine 2.8 or newer, or set softmax_type "
            "to 'vanilla'"
        )


def takes_shared_prefixes(core_attention: Any) -> bool:
    """Whether a core attention is one of ours."""
    return isinstance(core_attention, _PrefixCoreAttention)


def prefix_self_attention(base: type) -> type:
    """The subclass of a Megatron self attention class that takes shared prefixes.

    A class that already does is returned as it is.
    """
    return prefix_subclass(_PrefixSelfAttention, base)


def prefix_core_attention(base: type) -> type:
    """The subclass of a Megatron core attention class that takes shared prefixes.

    A class that already does is returned as it is.
    """
    return prefix_subclass(_PrefixCoreAttention, base)


def share_in_self_attention(attention: Any, *, rope_table: RopeTable | None = None) -> None:
    """Teach a built self attention, and its core attention, to take shared prefixes.

    Both get the subclass of their own class; nothing else of them changes. Not for context
    parallelism, which a core attention must know when it is built.

    Args:
        attention: Megatron's self attention or multi-latent self attention, or a subclass.
        rope_table: that its model gives it; None: one of Megatron's own.
    """
    core, config = attention.core_attention, attention.config
    scale = config.softmax_scale
    if is_latent(type(attention)):
        attention.__class__ = prefix_latent_attention(type(attention))
        scale = attention.softmax_scale
    else:
        attention.__class__ = prefix_self_attention(type(attention))
        attention.prefix_rope_table = rope_table
    if isinstance(core, _PrefixCoreAttention):
        return
    core.__class__ = prefix_core_attention(type(core))
    core.config = config
    core.prefix_only = False
    core.prefix_layer = _attention_layer(config, attention.layer_number, scale)
    _require_sink(core, config)

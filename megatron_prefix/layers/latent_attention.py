"""Multi-latent attention (DeepSeek-V2, arXiv 2405.04434) over a packed row with shared prefixes.

`prefix_latent_attention(C)` is a subclass of Megatron's `MLASelfAttention`, or of a subclass of it,
that turns each token of the row by its own position. Parameters, checkpoint keys and behaviour are
those of C, until a batch carries `PrefixPackedSeqParams`.

Shapes: T tokens of this rank's row, T/tp of them on a tensor-parallel rank under sequence
parallelism; n heads of this rank; r the rank of the latents, p the rotated dimensions of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    CheckpointWithoutOutput,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_prefix.attention.context_parallel.latents import LatentKeys
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layers.subclass import prefix_subclass
from megatron_prefix.megatron.fused_gradients import gradient_by_autograd
from megatron_prefix.megatron.latent_attention import (
    known_projections,
    normalised,
    returns_latents,
)


class _PrefixLatentAttention:
    """Computes queries, keys and values of a packed row from Megatron's own modules."""

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        """See Megatron's `MLASelfAttention`; in a trimmed last layer, queries of some rows only."""
        if not isinstance(packed_seq_params, PrefixPackedSeqParams):
            return super().get_query_key_value_tensors(
                hidden_states, key_value_states, position_ids, packed_seq_params, **kwargs
            )
        row = _Row(self, packed_seq_params)
        of_queries = _query_latents(self, hidden_states)
        latents, shared = _key_latents(self, hidden_states)
        shared = row.turn(shared[:, None], None)[:, 0]
        self.core_attention.prefix_latents = None
        if travels_as_latents(self, packed_seq_params):
            latents = _whole(self, normalised(self.linear_kv_up_proj, latents, self.config))
            row.keys_weight = gradient_by_autograd(self.linear_kv_up_proj.weight)
            n = packed_seq_params.attention.exchange.own_tokens
            self.core_attention.prefix_latents = LatentKeys(
                shard=torch.cat((latents[:n], shared[:n]), dim=1),
                weight=row.keys_weight,
                num_heads=self.num_attention_heads_per_partition,
                value_size=self.config.v_head_dim,
            )
        if self.recompute_up_proj:
            self.qkv_up_checkpoint = CheckpointWithoutOutput(fp8=None)
            tensors = self.qkv_up_checkpoint.checkpoint(row.expand, of_queries, latents, shared)
        else:
            tensors = row.expand(of_queries, latents, shared)
        return (*tensors, of_queries, latents) if returns_latents() else tensors

    def _run_core_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Tensor:
        """See Megatron 0.18 and newer, which fills the values of packed rows up to keys' size."""
        if not isinstance(kwargs.get("packed_seq_params"), PrefixPackedSeqParams):
            return super()._run_core_attention(query, key, value, attention_mask, **kwargs)
        if kwargs.get("attn_mask_type") is None:
            kwargs["attn_mask_type"] = self.attn_mask_type
        return self.core_attention(query, key, value, attention_mask, **kwargs)


def prefix_latent_attention(base: type) -> type:
    """The subclass of a Megatron multi-latent self attention class that takes shared prefixes.

    A class that already does is returned as it is.
    """
    return prefix_subclass(_PrefixLatentAttention, base)


def _query_latents(attention: Any, hidden_states: Tensor) -> Tensor:
    """[T or T/tp, 1, h] -> [T or T/tp, rank of queries], or hidden states without compression."""
    rank = attention.config.q_lora_rank
    if rank is None:
        return hidden_states.squeeze(1)
    compressed, _ = attention.linear_q_down_proj(hidden_states)
    if compressed.size(-1) != rank:
        compressed = gather_from_tensor_model_parallel_region(compressed)
        if attention.config.sequence_parallel:
            compressed = scatter_to_sequence_parallel_region(compressed)
    return attention.q_layernorm(compressed.squeeze(1))


def _key_latents(attention: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """[T or T/tp, 1, h] -> latents [T or T/tp, r], and what all heads' keys share [T, p]."""
    config = attention.config
    sizes = [config.kv_lora_rank, config.qk_pos_emb_head_dim]
    compressed, _ = attention.linear_kv_down_proj(hidden_states)
    is_sharded = compressed.size(-1) != sum(sizes)
    if is_sharded:
        compressed = gather_from_tensor_model_parallel_region(compressed)
    latents, rotated = compressed.split(sizes, dim=-1)
    if config.sequence_parallel and is_sharded:
        latents = scatter_to_sequence_parallel_region(latents)
    elif config.sequence_parallel:
        rotated = gather_from_sequence_parallel_region(rotated)
    if is_sharded or not config.sequence_parallel:
        # Every rank adds the gradient of its own heads to what all heads share.
        rotated = copy_to_tensor_model_parallel_region(rotated)
    return attention.kv_layernorm(latents.squeeze(1)), rotated.squeeze(1)


def travels_as_latents(attention: Any, params: PrefixPackedSeqParams) -> bool:
    """Whether a layer's keys and values come from other ranks as latents.

    Where the config says so and they cannot, they are gathered expanded, as `all_gather` does: the
    projection is no linear layer of Megatron's own (an adapter is around it), has a LayerNorm in
    it, or the core attention is recomputed alone.
    """
    layer, linear = attention.core_attention.prefix_layer, attention.linear_kv_up_proj
    config = attention.config
    return (
        params.shards is not None
        and layer.comm_type == "latent_gather"
        and layer.window is None
        and type(linear) in known_projections()
        and not (hasattr(linear, "layer_norm_weight") and config.normalization != "RMSNorm")
        and not attention.checkpoint_core_attention
    )


def _whole(attention: Any, latents: Tensor) -> Tensor:
    """[T or T/tp, r] -> [T, r], whose gradient is that of all tensor-parallel ranks' heads."""
    if attention.config.sequence_parallel:
        return gather_from_sequence_parallel_region(latents, tensor_parallel_output_grad=True)
    return copy_to_tensor_model_parallel_region(latents)


class _Row:
    """Latents of a packed row -> queries, keys and values, each turned by its token's position."""

    def __init__(self, attention: Any, params: PrefixPackedSeqParams) -> None:
        self.attention, self.query_rows = attention, params.query_rows
        self.keys_weight: Tensor | None = None
        table = attention.rotary_pos_emb(params.max_seqlen_kv, packed_seq=True)
        table, factor = table if isinstance(table, tuple) else (table, 1.0)
        angles = table.flatten(1)[params.position_ids]
        self.cos, self.sin = angles.cos() * factor, angles.sin() * factor

    def expand(
        self, of_queries: Tensor, latents: Tensor, shared: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """query [T or N, n, key size], key [T, n, key size], value [T, n, value size].

        Args:
            of_queries, latents: as compressed.
            shared: [T, p] the part of the keys that all heads share, turned.
        """
        attention, config, rows = self.attention, self.attention.config, self.query_rows
        heads = attention.num_attention_heads_per_partition
        project = (
            attention.linear_q_proj if config.q_lora_rank is None else attention.linear_q_up_proj
        )
        query = project(of_queries)[0].unflatten(-1, (heads, -1))
        if rows is not None:
            query = query.index_select(0, rows)
        plain, turned = query.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
        query = torch.cat((plain, self.turn(turned, rows)), dim=-1)
        if self.keys_weight is None:
            expanded, _ = attention.linear_kv_up_proj(latents)
        else:  # `latents` are whole
            expanded = F.linear(latents, self.keys_weight)
        expanded = expanded.unflatten(-1, (heads, -1))
        plain, value = expanded.split([config.qk_head_dim, config.v_head_dim], dim=-1)
        key = torch.cat((plain, shared[:, None].expand(-1, heads, -1)), dim=-1)
        return query, key, value.contiguous()

    def turn(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """[T or N, heads, p] each token's pairs of neighbouring dimensions, turned by its position.

        The two of a pair end up half of p apart, as in Megatron.
        """
        cos, sin = (y if rows is None else y[rows] for y in (self.cos, self.sin))
        cos, sin = (y[:, None].to(x.dtype) for y in (cos, sin))
        x, as_it_is = x.tensor_split([cos.shape[-1]], dim=-1)
        first, second = x[..., 0::2], x[..., 1::2]
        turned = torch.cat((first, second), -1) * cos + torch.cat((-second, first), -1) * sin
        return torch.cat((turned, as_it_is), -1)

"""Options of multi-latent attention."""

from __future__ import annotations

from typing import Any

from torch.torch_version import TorchVersion

from megatron_prefix.megatron.options.record import (
    Option,
    Reason,
    refused,
    used,
)
from megatron_prefix.megatron.releases import release


def _latent(latent: bool, config: Any) -> Reason | None:
    if not latent:
        return None
    if not hasattr(config, "kv_lora_rank"):
        return Reason(
            why=f"{type(config).__name__} has no sizes of its latents",
            instead="Use Megatron's MLATransformerConfig",
        )
    if config.num_query_groups != config.num_attention_heads:
        return Reason(
            why="every query head has a key and a value of its own in multi-latent attention",
            instead=f"Set num_query_groups to {config.num_attention_heads}",
            beside=f"num_query_groups={config.num_query_groups}",
        )
    size = config.qk_head_dim + config.qk_pos_emb_head_dim
    if config.v_head_dim > size:
        return Reason(
            why=f"values larger than keys of qk_head_dim + qk_pos_emb_head_dim = {size} are cut "
            "off by Megatron from 0.18 on",
            instead=f"Set v_head_dim to at most {size}",
            beside=f"v_head_dim={config.v_head_dim}",
        )
    return None


def _query_rank(rank: int | None, config: Any) -> Reason | None:
    # Releases before 0.19 leave queries that are not compressed without a norm.
    latent = getattr(config, "multi_latent_attention", False)
    if rank is not None or not latent or not config.qk_layernorm:
        return None
    if TorchVersion(release()) < "0.19":
        return None
    return Reason(
        why="megatron-core 0.19 puts one more norm before the projection of queries that are not "
        "compressed, and its local layers cannot be built so; no released model has that norm",
        instead="Use megatron-core 0.18",
        beside="qk_layernorm=True",
    )


OPTIONS: list[Option] = [
    *used(
        "multi_latent_attention",
        why="our layer expands the latents with Megatron's modules, and turns tokens by position",
        check=_latent,
    ),
    *used(
        "q_lora_rank",
        why="multi_latent_attention: our layer takes Megatron's modules",
        check=_query_rank,
    ),
    *used(
        "kv_lora_rank",
        "qk_head_dim",
        "qk_pos_emb_head_dim",
        "v_head_dim",
        "rope_type",
        "rotary_base",
        "rotary_percent",
        "rotary_scaling_factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        why="multi_latent_attention: our layer takes Megatron's modules and its rotary table",
    ),
    *refused(
        "cache_mla_latents",
        when=bool,
        why="it is for inference, and takes the projection of keys and values apart",
        instead=False,
    ),
    *refused(
        "mla_down_proj_fusion",
        when=bool,
        why="our layer does not read the fused projection yet",
        instead=False,
        first="0.17",
    ),
]

"""Options of mixtures of experts."""

from __future__ import annotations

from typing import Any

from megatron_prefix.megatron.auxiliary_losses import AUXILIARY_LOSSES, auxiliary_losses
from megatron_prefix.megatron.options.record import (
    Option,
    Reason,
    harmless,
    is_set,
    more_than_one,
    refused,
    set_to,
    used,
)
from megatron_prefix.megatron.releases import has_global_auxiliary_loss

_BY_SEQUENCE = "in it a token counts once for each of its sequences"
_CAPACITY = "which tokens exceed an expert's capacity depends on how often the prefix is run"
_BY_TOKEN = "Megatron's experts and router compute it, token by token"
_DISPATCH = "it is about how tokens travel to their experts and back, one by one"


def _load_balancing(kinds: Any, config: Any) -> Reason | None:
    """Only 'none' and auxiliary losses route each token by itself."""
    if config.num_moe_experts is None:
        return None
    kinds = kinds if isinstance(kinds, (list, tuple)) else [kinds]
    if any(kind not in ("none", *AUXILIARY_LOSSES) for kind in kinds):
        return Reason(
            why="it routes a token by what other tokens of the batch need, and a shared prefix "
            "stands there once",
            instead=set_to("moe_router_load_balancing_type", "none"),
        )
    return None


def _auxiliary_loss(coefficients: Any, config: Any) -> Reason | None:
    losses = auxiliary_losses(config)
    if not losses:
        return None
    if "global_aux_loss" in losses and not has_global_auxiliary_loss():
        return Reason(
            why="this release of Megatron-Core does not compute it and does not say so",
            instead="Set moe_router_load_balancing_type to 'aux_loss', or use 0.15 or newer",
            beside="moe_router_load_balancing_type='global_aux_loss'",
        )
    return _run_again(
        config,
        beside=f"moe_router_load_balancing_type={config.moe_router_load_balancing_type!r}",
        instead="moe_aux_loss_coeff to 0.0",
    )


def _expert_bias(enabled: bool, config: Any) -> Reason | None:
    rate = config.moe_router_bias_update_rate
    if not enabled or rate == 0:
        return None
    return _run_again(
        config,
        beside=f"moe_router_bias_update_rate={rate!r}",
        instead="moe_router_bias_update_rate to 0.0",
    )


def _z_loss(coefficient: float | None, config: Any) -> Reason | None:
    return _run_again(config, instead="moe_z_loss_coeff to None") if coefficient else None


def _run_again(config: Any, *, instead: str, beside: str = "") -> Reason | None:
    """Why experts that run again on their own have no statistics of tokens; None: they do not.

    Args:
        instead: what to set where they are to run again.
        beside: another option that the statistics depend on, as `name=value`.
    """
    recomputed = (config.recompute_granularity == "selective" and config.recompute_modules) or []
    if not (config.moe_layer_recompute or "moe" in recomputed):
        return None
    return Reason(
        why="experts that run again outside of their layer do not know how often each token counts",
        instead="Leave moe out of recompute_modules (and moe_layer_recompute False), use "
        f"recompute_granularity 'full', or set {instead}",
        beside=" and ".join(filter(None, [beside, "recomputed experts"])),
    )


def _dispatcher(kind: str, config: Any) -> Reason | None:
    """What needs as many tokens on every rank of an expert-parallel group."""
    if config.num_moe_experts is None or config.expert_model_parallel_size == 1:
        return None
    unequal = "takes as many tokens from every expert-parallel rank, and packed rows differ"
    if kind == "allgather":
        return Reason(why=f"it {unequal}", instead=set_to("moe_token_dispatcher_type", "alltoall"))
    backend = getattr(config, "moe_flex_dispatcher_backend", None)
    if (
        kind == "flex"
        and backend == "hybridep"
        and not getattr(config, "moe_hybridep_pad_uneven_dispatch_inputs", False)
    ):
        return Reason(
            why=f"it {unequal}",
            instead="Set moe_token_dispatcher_type to 'alltoall', or, from megatron-core 0.19 on, "
            "moe_hybridep_pad_uneven_dispatch_inputs to True",
            beside=f"moe_flex_dispatcher_backend={backend!r}",
        )
    return None


OPTIONS: list[Option] = [
    *used(
        "num_moe_experts",
        "moe_layer_freq",
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "moe_shared_expert_overlap",
        "moe_router_topk",
        "moe_router_topk_limited_devices",
        "moe_router_num_groups",
        "moe_router_group_topk",
        "moe_router_pre_softmax",
        "moe_router_topk_scaling_factor",
        "moe_router_score_function",
        "moe_router_dtype",
        "moe_router_fusion",
        "moe_grouped_gemm",
        "moe_apply_probs_on_input",
        "moe_permute_fusion",
        "moe_layer_recompute",
        "use_fused_weighted_squared_relu",
        why=_BY_TOKEN,
    ),
    *used("moe_use_legacy_grouped_gemm", why=_BY_TOKEN, last="0.16"),
    *used("moe_shared_expert_gate", "moe_latent_size", why=_BY_TOKEN, first="0.16"),
    *used(
        "moe_single_grouped_weight",
        "moe_single_grouped_bias",
        "moe_mlp_glu_interleave_size",
        why=_BY_TOKEN,
        first="0.18",
    ),
    *used(
        "use_grouped_gemm_for_shared_expert",
        "moe_shared_expert_glu_interleave_size",
        why=_BY_TOKEN,
        first="0.19",
    ),
    # Statistics over tokens.
    Option(
        name="moe_router_load_balancing_type",
        kind="refused",
        why="sinkhorn and quantile balancing route a token by what others of the batch need",
        check=_load_balancing,
    ),
    *used("moe_aux_loss_coeff", why=_BY_SEQUENCE, check=_auxiliary_loss),
    *used("moe_z_loss_coeff", why=_BY_SEQUENCE, check=_z_loss),
    Option(
        name="moe_router_enable_expert_bias",
        kind="used",
        why="a bias is a constant of the choice of experts; a token moves it once for each of its "
        "sequences",
        check=_expert_bias,
    ),
    *used("moe_router_bias_update_rate", why="see moe_router_enable_expert_bias"),
    *harmless(
        "moe_router_quantile_balancing_ema",
        why="only the load balancing type quantile_balancing reads it, which is refused",
        first="0.19",
    ),
    *harmless("moe_per_layer_logging", why="it is about what is logged"),
    # Capacity.
    *refused("moe_expert_capacity_factor", when=is_set, why=_CAPACITY, instead=None),
    *refused(
        "moe_expert_rank_capacity_factor",
        when=is_set,
        why="which tokens exceed a rank's capacity depends on how often the prefix is run",
        instead=None,
        first="0.18",
    ),
    *harmless(
        "moe_pad_expert_input_to_capacity",
        "moe_token_drop_policy",
        why="only moe_expert_capacity_factor reads it, which is refused",
    ),
    *harmless("moe_token_dropping", why="no release reads it"),
    *harmless(
        "moe_pad_experts_for_cuda_graph_inference", why="only inference reads it", first="0.17"
    ),
    *refused(
        "moe_paged_stash",
        when=is_set,
        why="it needs moe_expert_rank_capacity_factor, a budget of tokens per rank",
        instead=False,
        first="0.18",
    ),
    *harmless(
        "moe_paged_stash_page_size",
        "moe_paged_stash_buffer_size_factor_cuda",
        "moe_paged_stash_buffer_size_factor_cpu",
        why="only moe_paged_stash reads it, which is refused",
        first="0.18",
    ),
    # Randomness and routes from elsewhere.
    *refused(
        "moe_input_jitter_eps",
        when=is_set,
        why="a shared prefix has one jitter where repeated prompts would have had many",
        instead=None,
    ),
    *refused(
        "moe_router_force_load_balancing",
        when=is_set,
        why="it replaces routing by random numbers",
        instead=False,
    ),
    *refused(
        "moe_router_force_biased",
        when=is_set,
        why="it adds random numbers to the router's logits",
        instead=None,
        first="0.17",
    ),
    *refused(
        "moe_enable_routing_replay",
        when=is_set,
        why="routes are recorded and replayed by a token's place in the batch, and a shared "
        "prefix has one place for all of its sequences; routes of sequences are given by "
        "PrefixPackedSeqParams.from_layout(routes=)",
        instead=False,
        first="0.16",
    ),
    # Dispatchers.
    Option(name="moe_token_dispatcher_type", kind="used", why=_DISPATCH, check=_dispatcher),
    *used("moe_enable_deepep", "moe_deepep_num_sms", why=_DISPATCH),
    *used("moe_flex_dispatcher_backend", "moe_hybridep_num_sms", why=_DISPATCH, first="0.16"),
    *used(
        "moe_permute_fusion_into_hybridep",
        "moe_hybridep_num_blocks_permute",
        "moe_hybridep_num_blocks_unpermute",
        why=_DISPATCH,
        first="0.17",
    ),
    *used("moe_hybridep_num_sms_preprocessing", why=_DISPATCH, first="0.18"),
    *used(
        "moe_hybridep_pad_uneven_dispatch_inputs",
        "moe_flex_dispatcher_num_sms",
        why=_DISPATCH,
        first="0.19",
    ),
    *harmless(
        "moe_ncclep_static_shape",
        "moe_ncclep_zero_copy",
        why="ncclep needs moe_expert_rank_capacity_factor, which is refused",
        first="0.19",
    ),
    *refused(
        "mlp_chunks_for_training",
        when=more_than_one,
        why="a row may have fewer tokens than chunks, and then ranks of an expert-parallel group "
        "run different numbers of chunks",
        instead=1,
        first="0.18",
    ),
]

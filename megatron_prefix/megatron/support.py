"""What cannot be exact with shared prefixes is refused when the model is built, by name.

Every row of `refusals` names an option of Megatron's `TransformerConfig`, why shared prefixes
would change what it computes, and what to set instead. Options that a Megatron release does not
have are passed over.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import megatron.core
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

from megatron_prefix.attention.comm_types import COMM_TYPES


class UnsupportedOptionError(ValueError):
    """An option of the model's config that cannot work with shared prefixes."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """One option that is refused: its name, when, why, and what to set instead."""

    option: str
    refused: Callable[[Any], bool]
    why: str
    instead: str


def _is_set(value: Any) -> bool:
    return value is not None and value is not False


def _positive(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(v is not None and v > 0 for v in values)


_DROPOUT = "a shared prefix has one dropout mask where repeated prompts would have had many"
_ROUTER = "its statistics would count a shared prefix once instead of once per response"

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        option="attention_dropout", refused=_positive, why=_DROPOUT, instead="attention_dropout: 0"
    ),
    Refusal(option="hidden_dropout", refused=_positive, why=_DROPOUT, instead="hidden_dropout: 0"),
    Refusal(
        option="hybrid_context_parallel",
        refused=_is_set,
        why="it gives every sequence a context-parallel group of its own",
        instead="hybrid_context_parallel: false",
    ),
    Refusal(
        option="multi_latent_attention",
        refused=_is_set,
        why="its own rotary modules do not take per-token positions yet",
        instead="multi_latent_attention: false",
    ),
    Refusal(
        option="mrope_section",
        refused=_is_set,
        why="multimodal rotary tables already hold one row per token",
        instead="position_embedding_type: rope and mrope_section: null",
    ),
    Refusal(
        option="mtp_num_layers",
        refused=_positive,
        why="multi-token prediction rolls labels over the borders of segments",
        instead="mtp_num_layers: null",
    ),
    Refusal(
        option="window_size",
        refused=_is_set,
        why="a sliding window would have to follow each sequence across its segments",
        instead="window_size: null",
    ),
    Refusal(
        option="softmax_type",
        refused=lambda v: v is not None and v != "vanilla",
        why="a softmax offset would enter once per attention stage",
        instead="softmax_type: vanilla",
    ),
    Refusal(
        option="experimental_attention_variant",
        refused=_is_set,
        why="only softmax attention can be computed in stages",
        instead="experimental_attention_variant: null",
    ),
    Refusal(
        option="qk_clip",
        refused=_is_set,
        why="the stages do not report their largest attention logit",
        instead="qk_clip: false",
    ),
    Refusal(
        option="moe_z_loss_coeff", refused=_positive, why=_ROUTER, instead="moe_z_loss_coeff: null"
    ),
    Refusal(
        option="moe_router_enable_expert_bias",
        refused=_is_set,
        why=_ROUTER,
        instead="moe_router_enable_expert_bias: false",
    ),
    Refusal(
        option="moe_expert_capacity_factor",
        refused=_is_set,
        why="which tokens exceed an expert's capacity depends on how often the prefix is run",
        instead="moe_expert_capacity_factor: null",
    ),
    Refusal(
        option="moe_input_jitter_eps",
        refused=_is_set,
        why="a shared prefix has one jitter where repeated prompts would have had many",
        instead="moe_input_jitter_eps: null",
    ),
    Refusal(
        option="moe_router_force_load_balancing",
        refused=_is_set,
        why="it replaces routing by random numbers",
        instead="moe_router_force_load_balancing: false",
    ),
    Refusal(
        option="overlap_moe_expert_parallel_comm",
        refused=_is_set,
        why="its schedule does not hand the packed params to the layers",
        instead="overlap_moe_expert_parallel_comm: false",
    ),
    Refusal(
        option="fused_single_qkv_rope",
        refused=_is_set,
        why="it does not take packed sequences",
        instead="fused_single_qkv_rope: false",
    ),
    Refusal(
        option="enable_cuda_graph",
        refused=_is_set,
        why="a captured graph has the first batch's segments in it",
        instead="enable_cuda_graph: false",
    ),
    Refusal(
        option="external_cuda_graph",
        refused=_is_set,
        why="a captured graph has the first batch's segments in it",
        instead="external_cuda_graph: false",
    ),
    Refusal(
        option="cuda_graph_impl",
        refused=lambda v: v is not None and v != "none",
        why="a captured graph has the first batch's segments in it",
        instead="cuda_graph_impl: none",
    ),
    Refusal(
        option="fp8_dot_product_attention",
        refused=_is_set,
        why="the attention kernels run in the activations' precision",
        instead="fp8_dot_product_attention: false",
    ),
)


def refuse_unsupported(config: Any) -> None:
    """Raise `UnsupportedOptionError` for the first option that cannot work with shared prefixes.

    Args:
        config: Megatron's `TransformerConfig`, or anything with its attributes.
    """
    for refusal in REFUSALS:
        value = getattr(config, refusal.option, None)
        if refusal.refused(value):
            raise UnsupportedOptionError(
                f"{refusal.option}={value!r} cannot be combined with shared prefixes: "
                f"{refusal.why}. Set {refusal.instead}"
            )
    _refuse_load_balancing(config)
    _refuse_yarn(config)
    _refuse_comm_types(config)


def _refuse_load_balancing(config: Any) -> None:
    """The auxiliary loss is off when its type is 'none' or its coefficient 0, per type."""
    if getattr(config, "num_moe_experts", None) is None:
        return
    kinds = config.moe_router_load_balancing_type
    coefficients = config.moe_aux_loss_coeff
    kinds = kinds if isinstance(kinds, (list, tuple)) else [kinds]
    if not isinstance(coefficients, (list, tuple)):
        coefficients = [coefficients] * len(kinds)
    for kind, coefficient in zip(kinds, coefficients, strict=True):
        if kind == "sinkhorn":
            raise UnsupportedOptionError(
                "moe_router_load_balancing_type='sinkhorn' cannot be combined with shared "
                f"prefixes: {_ROUTER}. Set moe_router_load_balancing_type: none"
            )
        if kind != "none" and coefficient:
            raise UnsupportedOptionError(
                f"moe_aux_loss_coeff={coefficient!r} with moe_router_load_balancing_type={kind!r} "
                f"cannot be combined with shared prefixes: {_ROUTER}. Set moe_aux_loss_coeff: 0 "
                "or moe_router_load_balancing_type: none"
            )


def _refuse_yarn(config: Any) -> None:
    """Where it is fused, and under context parallelism in releases that cut its table."""
    if not _is_set(getattr(config, "yarn_rotary_scaling_factor", None)):
        return
    if getattr(config, "apply_rope_fusion", False):
        raise UnsupportedOptionError(
            "apply_rope_fusion=True drops YaRN's attention scale for packed sequences. Set "
            "apply_rope_fusion: false"
        )
    size = config.context_parallel_size
    if size > 1 and not yarn_takes_packed_rows():
        raise UnsupportedOptionError(
            f"context_parallel_size={size} cannot be combined with YaRN in megatron-core "
            f"{megatron.core.__version__}, which cuts its table as if a packed row were one "
            "sequence. Set context_parallel_size: 1, or install megatron-core 0.16"
        )


def yarn_takes_packed_rows() -> bool:
    """Whether this release's GPTModel tells YaRN that a batch is packed."""
    return "cp_group" in inspect.signature(YarnRotaryEmbedding.forward).parameters


def _refuse_comm_types(config: Any) -> None:
    """Kinds that are not ours, and heads that cannot be exchanged."""
    size = config.context_parallel_size
    if size == 1 or config.cp_comm_type is None:
        return
    kinds = config.cp_comm_type
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in COMM_TYPES:
            raise UnsupportedOptionError(
                f"cp_comm_type={kind!r} cannot be combined with shared prefixes. Set cp_comm_type: "
                f"{', '.join(COMM_TYPES[:-1])} or {COMM_TYPES[-1]}"
            )
        for option in ("num_attention_heads", "num_query_groups"):
            heads = getattr(config, option)
            if kind == "a2a" and heads % (config.tensor_model_parallel_size * size):
                raise UnsupportedOptionError(
                    f"cp_comm_type='a2a' needs {option}={heads} to be a multiple of "
                    f"tensor_model_parallel_size x context_parallel_size = "
                    f"{config.tensor_model_parallel_size} x {size}. Set cp_comm_type: all_gather "
                    "or p2p"
                )

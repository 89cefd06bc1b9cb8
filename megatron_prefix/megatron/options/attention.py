"""Options of attention and of positions."""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.rotary_pos_embedding import (
    MultimodalRotaryEmbedding,
)
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

from megatron_prefix.attention.comm_types import COMM_TYPES, RUN_AS, layer_comm_type
from megatron_prefix.megatron.gated_delta_net import attending_layers, delta_net_layers
from megatron_prefix.megatron.mamba import mamba_layers
from megatron_prefix.megatron.options.record import (
    Option,
    Reason,
    harmless,
    is_set,
    positive,
    refused,
    set_to,
    used,
)
from megatron_prefix.megatron.prediction_layers import prediction_layer_numbers
from megatron_prefix.megatron.releases import release

logger = logging.getLogger(__name__)

_DROPOUT = "a shared prefix has one dropout mask where repeated prompts would have had many"
_OTHER_KERNEL = (
    "it chooses among Megatron's kernels, for ordinary batches; PrefixPackedSeqParams names the "
    "kernel of shared prefixes, and all of them compute the same attention"
)


def yarn_takes_packed_rows() -> bool:
    """Whether this release's GPTModel tells YaRN that a batch is packed."""
    return "cp_group" in inspect.signature(YarnRotaryEmbedding.forward).parameters


def fused_rotary_takes_interleaved_rows() -> bool:
    """Whether this release tells the fused kernel of packed rows that channels are interleaved.

    Without Transformer Engine there is no fused kernel, and Megatron refuses the option itself.
    """
    fused = rope_utils.fused_apply_rotary_pos_emb_thd
    return fused is None or "interleaved" in inspect.signature(fused).parameters


def _fused_rotary(fused: bool, config: Any) -> Reason | None:
    if not fused:
        return None
    off = set_to("apply_rope_fusion", False)
    if is_set(getattr(config, "yarn_rotary_scaling_factor", None)):
        return Reason(
            why="the fused kernel drops YaRN's attention scale for packed rows",
            instead=off,
            beside="yarn_rotary_scaling_factor set",
        )
    if config.rotary_interleaved and not fused_rotary_takes_interleaved_rows():
        return Reason(
            why=f"megatron-core {release()} does not tell the fused kernel of "
            "packed rows that channels are interleaved, and it computes another model",
            instead=f"{off}, or install megatron-core 0.19",
            beside="rotary_interleaved=True",
        )
    return None


def _yarn(factor: Any, config: Any) -> Reason | None:
    size = config.context_parallel_size
    if not is_set(factor) or size == 1 or yarn_takes_packed_rows():
        return None
    return Reason(
        why=f"context_parallel_size={size} cannot be combined with YaRN in megatron-core "
        f"{release()}, which cuts its table as if a packed row were one sequence",
        instead="Set context_parallel_size to 1, or install megatron-core 0.16 or newer",
    )


def params_have_cp_group() -> bool:
    """Whether a batch's params tell this release which part of an mRoPE table a rank has."""
    return "cp_group" in inspect.signature(MultimodalRotaryEmbedding.forward).parameters


def _mrope(section: Any, config: Any) -> Reason | None:
    size = config.context_parallel_size
    if not is_set(section) or size == 1 or params_have_cp_group():
        return None
    return Reason(
        why=f"context_parallel_size={size} cannot be combined with mRoPE in megatron-core "
        f"{release()}, which cuts its table as if a packed row were one sequence",
        instead="Set context_parallel_size to 1, or install megatron-core 0.16 or newer",
    )


def _comm_type(kinds: Any, config: Any) -> Reason | None:
    """Kinds that are not ours, and heads that cannot be exchanged."""
    size = config.context_parallel_size
    if size == 1 or kinds is None:
        return None
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind in RUN_AS:
            _say_what_runs(kind)
        elif kind not in COMM_TYPES:
            return Reason(
                why=f"there is no kind {kind!r}",
                instead=f"Set cp_comm_type to {', '.join(COMM_TYPES[:-1])} or {COMM_TYPES[-1]}",
            )
        elif kind == "latent_gather" and not config.multi_latent_attention:
            return Reason(
                why="only multi-latent attention has latents",
                instead="Set cp_comm_type to all_gather, p2p or a2a",
            )
    tensor = config.tensor_model_parallel_size
    for name in _exchanged_heads(config):
        heads = getattr(config, name)
        if heads % (tensor * size):
            return Reason(
                why=f"a2a needs {name}={heads} to be a multiple of "
                f"tensor_model_parallel_size x context_parallel_size = {tensor} x {size}",
                instead="Set cp_comm_type to all_gather or p2p",
            )
    return None


def _exchanged_heads(config: Any) -> list[str]:
    """Options with the numbers of heads that layers with a2a exchange."""
    attending = [n for n, attends in enumerate(attending_layers(config), start=1) if attends]
    attending += prediction_layer_numbers(config)
    delta_nets, mamba = (
        [n for n, is_one in enumerate(layers, start=1) if is_one]
        for layers in (delta_net_layers(config), mamba_layers(config))
    )
    options = []
    for numbers, heads in (
        (attending, ["num_attention_heads", "num_query_groups"]),
        (delta_nets, ["linear_num_key_heads", "linear_num_value_heads"]),
        (mamba, ["mamba_num_groups"]),
    ):
        if any(layer_comm_type(config, number) == "a2a" for number in numbers):
            options += heads
    return options


def _variant(name: Any, config: Any) -> Reason | None:
    if not name:
        return None
    if name != "gated_delta_net":
        return Reason(
            why="only softmax attention and gated delta nets can be computed for shared prefixes",
            instead=set_to("experimental_attention_variant", None),
        )
    return None


def _window(size: Any, config: Any) -> Reason | None:
    """Windows that are not causal, or that this release does not take."""
    if not size:
        return None
    off = set_to("window_size", None)
    if not hasattr(config, "window_attn_skip_freq"):
        return Reason(
            why=f"megatron-core {release()} has sliding windows in Transformer Engine's attention "
            "only, where shared prefixes were not compared with it",
            instead=f"{off}, or install megatron-core 0.15 or newer",
        )
    if size[0] < 0 or size[1] != 0:
        return Reason(
            why="a window is (keys before a query, 0) here; -1 (no limit) and keys behind a query "
            "are not supported",
            instead=f"Set window_size to (n, 0) with n of at least 0, or: {off}",
        )
    return None


@functools.cache
def _say_what_runs(kind: str) -> None:
    logger.warning("cp_comm_type %s runs as %s with shared prefixes", kind, RUN_AS[kind])


OPTIONS: list[Option] = [
    *used(
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "softmax_scale",
        why="our attention takes heads and scale as Megatron's does",
    ),
    *used(
        "add_qkv_bias",
        "qk_layernorm",
        "no_rope_freq",
        why="Megatron's self attention computes it, row by row; a trimmed last layer as well",
    ),
    *used(
        "qk_l2_norm",
        "attention_output_gate",
        why="Megatron's self attention computes it, row by row; a trimmed last layer as well",
        first="0.16",
    ),
    *used(
        "rotary_interleaved",
        why="Megatron rotates by our table of positions; see apply_rope_fusion",
    ),
    Option(
        name="apply_rope_fusion",
        kind="used",
        why="the fused kernel takes our table as one sequence of a row's length",
        check=_fused_rotary,
    ),
    Option(
        name="yarn_rotary_scaling_factor",
        kind="used",
        why="GPTModel's YaRN table is read by position",
        check=_yarn,
        declared=False,
    ),
    Option(
        name="cp_comm_type",
        kind="used",
        why="our context-parallel attention has kinds of the same names",
        check=_comm_type,
    ),
    *refused("attention_dropout", "hidden_dropout", when=positive, why=_DROPOUT, instead=0.0),
    *used(
        "mrope_section",
        why="GPTModel's mRoPE table has a row for each token of a packed row already",
        check=_mrope,
    ),
    Option(
        name="window_size",
        kind="used",
        why="our attention reaches so many keys back along each sequence, across its segments",
        check=_window,
    ),
    *used(
        "window_attn_skip_freq",
        why="a layer has the window that Megatron's has",
        first="0.15",
    ),
    *used(
        "softmax_type",
        why="our attention merges the core attention's softmax_offset as its last term",
        first="0.15",
    ),
    Option(
        name="experimental_attention_variant",
        kind="used",
        why="gated_delta_net: our layer hands the state behind a segment to all segments below it",
        check=_variant,
        first="0.16",
    ),
    *refused(
        "qk_clip",
        when=is_set,
        why="the stages do not report their largest attention logit, which it clips by",
        instead=False,
        first="0.16",
    ),
    *refused(
        "log_max_attention_logit",
        when=is_set,
        why="the stages do not report their largest attention logit",
        instead=False,
        first="0.16",
    ),
    *harmless("qk_clip_alpha", "qk_clip_threshold", why="only qk_clip reads it", first="0.16"),
    *refused(
        "fused_single_qkv_rope",
        when=is_set,
        why="Megatron's kernel does not take packed rows",
        instead=False,
        first="0.15",
    ),
    *refused(
        "batch_invariant_mode",
        when=is_set,
        why="attention over a tree adds up in another order than over a sequence of its own, so "
        "the last bits depend on the batch",
        instead=False,
        first="0.16",
    ),
    *harmless("attention_backend", why=_OTHER_KERNEL),
    *harmless("flash_attention_version", why=_OTHER_KERNEL, first="0.19"),
    *harmless(
        "apply_query_key_layer_scaling",
        "attention_softmax_in_fp32",
        "masked_softmax_fusion",
        why="it is about how Megatron's softmax keeps its precision; ours is in float32 or wider",
    ),
]

"""Options of number formats."""

from __future__ import annotations

from megatron_prefix.megatron.options.record import Option, harmless, is_set, refused, used

_ROWS = (
    "quantised linear layers need numbers of rows that divide by 8, 16 or 32, which packed and "
    "trimmed rows do not have"
)
_ACTIVATIONS = "the attention kernels run in the activations' precision"
_QUANTISED = "only fp8 or fp4 reads it, which are refused"

OPTIONS: list[Option] = [
    *used(
        "fp16",
        "bf16",
        "params_dtype",
        "disable_bf16_reduced_precision_matmul",
        why="attention runs in the activations' precision, and merges stages in float32 or wider",
    ),
    *used(
        "deterministic_mode",
        why="Megatron's modules honour it; attention with `deterministic` of "
        "PrefixPackedSeqParams, which the trainer sets with it",
    ),
    *refused(
        "enable_autocast",
        when=is_set,
        why="it would change the precision inside the attention's stages, forward only",
        instead=False,
    ),
    *harmless("autocast_dtype", why="only enable_autocast reads it, which is refused"),
    *refused("fp8", when=is_set, why=_ROWS, instead=None),
    *refused("fp8_param", when=is_set, why=_ROWS, instead=False),
    *refused("fp4", when=is_set, why=_ROWS, instead=None, first="0.15"),
    *refused("fp4_param", when=is_set, why=_ROWS, instead=False, first="0.15"),
    *refused("quant_recipe", when=is_set, why=_ROWS, instead=None),
    *refused("use_kitchen", when=is_set, why=_ROWS, instead=False),
    *refused("use_kitchen_attention", when=is_set, why=_ACTIVATIONS, instead=False, first="0.16"),
    *refused(
        "fp8_dot_product_attention",
        "fp8_multi_head_attention",
        when=is_set,
        why=_ACTIVATIONS,
        instead=False,
    ),
    *harmless(
        "kitchen_attention_backend",
        why="only use_kitchen_attention reads it, which is refused",
        first="0.16",
    ),
    *harmless(
        "fp8_recipe",
        "fp8_margin",
        "fp8_interval",
        "fp8_amax_history_len",
        "fp8_amax_compute_algo",
        "fp8_wgrad",
        "tp_only_amax_red",
        "first_last_layers_bf16",
        "num_layers_at_start_in_bf16",
        "num_layers_at_end_in_bf16",
        "moe_router_padding_for_fp8",
        "disable_parameter_transpose_cache",
        why=_QUANTISED,
    ),
    *harmless("fp4_recipe", why=_QUANTISED, first="0.15"),
    *harmless(
        "fp8_quantizer_factory",
        "fp4_quantizer_factory",
        "moe_router_padding_for_quantization",
        why=_QUANTISED,
        first="0.16",
    ),
    *harmless("fp8_output_proj", why=_QUANTISED, first="0.18"),
    *used(
        "activation_func_fp8_input_store",
        why="Megatron's MLP keeps its activation's input in FP8 for backward, row by row",
    ),
]

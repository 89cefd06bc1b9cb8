"""GRPO on Megatron-Core with the prompt of each group computed once, exactly.

    prefix_grouped              any layer spec, taught to share prefixes
    prefix_grouped_layer_spec   a ready layer spec
    PrefixTree, pack            from token lists to a packed row
    AttentionSetup              how a model's attention is computed, made once
    PrefixPackedSeqParams       what such a row's batch carries through GPTModel
    check_same_row              whether context-parallel ranks hold parts of the same row
    vocab_parallel_log_probs    log-probabilities from hidden states, without all logits at once
    enable_cpu_device           Megatron-Core without a GPU
    select_kernel, check_kernel the attention kernel of a device, and whether it computes attention

Names are imported when first used, so that importing the package loads neither torch nor Megatron.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.lazy_names import lazy_names

if TYPE_CHECKING:
    from megatron_prefix.attention.kernels import select_kernel
    from megatron_prefix.attention.row_attention import AttentionSetup
    from megatron_prefix.attention.self_check import check_kernel
    from megatron_prefix.distributed.agreement import check_same_row
    from megatron_prefix.layer_spec import prefix_grouped, prefix_grouped_layer_spec
    from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
    from megatron_prefix.layout import PrefixTree, pack
    from megatron_prefix.megatron.cpu_device import enable_cpu_device
    from megatron_prefix.objective.log_probs import vocab_parallel_log_probs

__version__ = "0.1.0"

__all__ = [
    "AttentionSetup",
    "PrefixPackedSeqParams",
    "PrefixTree",
    "__version__",
    "check_kernel",
    "check_same_row",
    "enable_cpu_device",
    "pack",
    "prefix_grouped",
    "prefix_grouped_layer_spec",
    "select_kernel",
    "vocab_parallel_log_probs",
]

__getattr__ = lazy_names(
    __name__,
    {
        "AttentionSetup": "megatron_prefix.attention.row_attention",
        "PrefixPackedSeqParams": "megatron_prefix.layers.packed_seq_params",
        "PrefixTree": "megatron_prefix.layout",
        "check_kernel": "megatron_prefix.attention.self_check",
        "check_same_row": "megatron_prefix.distributed.agreement",
        "enable_cpu_device": "megatron_prefix.megatron.cpu_device",
        "pack": "megatron_prefix.layout",
        "prefix_grouped": "megatron_prefix.layer_spec",
        "prefix_grouped_layer_spec": "megatron_prefix.layer_spec",
        "select_kernel": "megatron_prefix.attention.kernels",
        "vocab_parallel_log_probs": "megatron_prefix.objective.log_probs",
    },
)


def __dir__() -> list[str]:
    return __all__

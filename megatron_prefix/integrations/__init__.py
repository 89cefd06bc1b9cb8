"""Shared prefixes inside other trainers.

    share_prefixes           lets a GPTModel that a framework has built share prefixes
    prefix_model_provider    the same for the function that builds it
    log_probs_of_rows        log-probabilities and entropies without logits of the whole row
    token_counter            what was saved
    whole_groups             microbatches that keep groups together
    TreeSegments             rows in the words of the `TreePackedSeqParams` proposed to Megatron

Names are imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.lazy_names import lazy_names

if TYPE_CHECKING:
    from megatron_prefix.integrations.counting import TokenCounter
    from megatron_prefix.integrations.gpt_model import (
        prefix_model_provider,
        share_prefixes,
        token_counter,
    )
    from megatron_prefix.integrations.grouping import whole_groups
    from megatron_prefix.integrations.scored_rows import log_probs_of_rows
    from megatron_prefix.integrations.tree_segments import TreeSegments

__all__ = [
    "TokenCounter",
    "TreeSegments",
    "log_probs_of_rows",
    "prefix_model_provider",
    "share_prefixes",
    "token_counter",
    "whole_groups",
]

__getattr__ = lazy_names(
    __name__,
    {
        "TokenCounter": "megatron_prefix.integrations.counting",
        "TreeSegments": "megatron_prefix.integrations.tree_segments",
        "log_probs_of_rows": "megatron_prefix.integrations.scored_rows",
        "prefix_model_provider": "megatron_prefix.integrations.gpt_model",
        "share_prefixes": "megatron_prefix.integrations.gpt_model",
        "token_counter": "megatron_prefix.integrations.gpt_model",
        "whole_groups": "megatron_prefix.integrations.grouping",
    },
)


def __dir__() -> list[str]:
    return __all__

"""The objective: group advantages, weights over the global batch, log-probabilities, losses.

Everything that normalises is a weight per token, fixed from the whole batch before anything is
split, so the loss is one plain sum wherever its tokens are computed.

Names are imported when first used: a run's configuration needs `ObjectiveConfig`, but no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.lazy_names import lazy_names

if TYPE_CHECKING:
    from megatron_prefix.objective.advantages import group_advantages
    from megatron_prefix.objective.config import ObjectiveConfig
    from megatron_prefix.objective.filters import group_terms
    from megatron_prefix.objective.log_probs import vocab_parallel_log_probs
    from megatron_prefix.objective.loss import policy_loss
    from megatron_prefix.objective.metrics import PolicyMetrics
    from megatron_prefix.objective.turns import turn_advantages
    from megatron_prefix.objective.weights import token_weights

__all__ = [
    "ObjectiveConfig",
    "PolicyMetrics",
    "group_advantages",
    "group_terms",
    "policy_loss",
    "token_weights",
    "turn_advantages",
    "vocab_parallel_log_probs",
]

__getattr__ = lazy_names(
    __name__,
    {
        "ObjectiveConfig": "megatron_prefix.objective.config",
        "PolicyMetrics": "megatron_prefix.objective.metrics",
        "group_advantages": "megatron_prefix.objective.advantages",
        "group_terms": "megatron_prefix.objective.filters",
        "policy_loss": "megatron_prefix.objective.loss",
        "token_weights": "megatron_prefix.objective.weights",
        "turn_advantages": "megatron_prefix.objective.turns",
        "vocab_parallel_log_probs": "megatron_prefix.objective.log_probs",
    },
)

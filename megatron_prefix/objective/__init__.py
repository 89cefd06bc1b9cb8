"""The objective: group advantages, weights over the global batch, log-probabilities, losses.

Everything that normalises is a weight per token, fixed from the whole batch before anything is
split, so the loss is one plain sum wherever its tokens are computed.
"""

from megatron_prefix.objective.advantages import group_advantages
from megatron_prefix.objective.config import ObjectiveConfig
from megatron_prefix.objective.log_probs import vocab_parallel_log_probs
from megatron_prefix.objective.losses import policy_loss
from megatron_prefix.objective.metrics import PolicyMetrics
from megatron_prefix.objective.weights import token_weights

__all__ = [
    "ObjectiveConfig",
    "PolicyMetrics",
    "group_advantages",
    "policy_loss",
    "token_weights",
    "vocab_parallel_log_probs",
]

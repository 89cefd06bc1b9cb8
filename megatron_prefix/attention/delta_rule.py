"""The gated delta rule (arXiv 2412.06464) over a packed row with shared prefixes.

For each token, with a state S [K, V] of a head that runs along its path:

    S = exp(g) S;    S = S + beta k (v - k^T S)^T;    out = S^T q / sqrt(K)

What computes it is chosen, see `delta_rules`; what is kept for backward, see `recurrent_rule.py`.

Shapes: T tokens, H heads, K and V the sizes of keys and values.
"""

from __future__ import annotations

from torch import Tensor

from megatron_prefix.attention.delta_rules import DeltaRule, TorchRule
from megatron_prefix.attention.recurrent_rule import apply_rule
from megatron_prefix.layout import Recurrence

_TORCH = TorchRule()


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    row: Recurrence[Tensor],
    rule: DeltaRule = _TORCH,
) -> Tensor:
    """The outputs of a row's tokens.

    Args:
        q, k: [T, H, K], normalised as the layer does; v: [T, H, V].
        g: [T, H] logarithms of the decay, at most 0, in float32 or wider.
        beta: [T, H] how much of a key's value is written, in [0, 1].
        row: the row's paths.
        rule: what computes it, from `select_delta_rule`.

    Returns:
        [T, H, V] in v's dtype; 0 on padding.
    """
    return apply_rule(rule, (q, k, v, g, beta), row)

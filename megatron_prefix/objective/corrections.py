"""Importance sampling between the policy that sampled and the trainer's own old policy.

A server computes with other kernels, another precision and sometimes older weights, so the
log-probabilities that it reports differ from those that the trainer computes for the same weights.
With rho = pi_old(token) / pi_sampled(token), a weight on each token's policy loss corrects it:

    truncate   min(rho, high)                           truncated importance sampling
               Yao et al. 2025, Your Efficient RL Framework Secretly Brings You Off-Policy RL
               Training; Ionides 2008, Truncated Importance Sampling
    mask       rho where low <= rho <= high, else 0     masked importance sampling; two-sided as in
               IcePop (Ling Team 2025, Every Step Evolves, arXiv 2510.18855)

and `low` holds truncated weights from below too. rho is a token's; or the whole response's, the
product over its tokens, which is unbiased; or their geometric mean. The weight is a constant: no
gradient flows through it. It is apart from the ratio pi / pi_old that the objective clips.

The denominators of the loss stay what they are: a masked token counts, with a loss of 0.

Legend: E entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prefix.objective.options import CorrectionConfig
from megatron_prefix.objective.ratio import LARGEST_LOG_RATIO, bounded_ratio
from megatron_prefix.objective.sequences import Sequences


@dataclass(frozen=True, kw_only=True, eq=False)
class Correction:
    """[E] each."""

    weights: Tensor
    """What multiplies the policy loss of each entry; 0 where its rho is not known."""
    changed: Tensor
    """bool: entries whose weight is not their rho: masked or held at a bound."""


@torch.no_grad()
def correction(
    log_ratio: Tensor, known: Tensor, *, sequences: Sequences, config: CorrectionConfig
) -> Correction:
    """The weights of a correction. Collective over the sequences' ranks, unless the level is token.

    Args:
        log_ratio: [E] log rho of each token, finite.
        known: [E] bool; tokens whose rho is not known take no part in that of their response.
        sequences: of the entries.
        config: which correction.
    """
    if config.level == "token":
        of_entry = log_ratio
    elif config.level == "sequence":
        (sums,) = sequences.sums(log_ratio * known)
        of_entry = sums[sequences.ids]
    else:
        of_entry = sequences.means(log_ratio, known)
    rho = bounded_ratio(of_entry, max(LARGEST_LOG_RATIO, math.log(config.high)))
    outside = (rho < config.low) | (rho > config.high)
    if config.kind == "mask":
        weights = rho.masked_fill(outside, 0)
    else:
        weights = rho.clamp(config.low, config.high)
    return Correction(weights=weights.masked_fill(~known, 0), changed=outside & known)

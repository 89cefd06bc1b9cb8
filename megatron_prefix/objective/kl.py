"""Estimates of a KL divergence from sampled tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prefix.objective.choices import KlEstimator
from megatron_prefix.objective.ratio import LARGEST_LOG_RATIO


def kl_per_token(logprobs: Tensor, reference_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimate of KL(policy || reference) from each sampled token (Schulman 2020).

    With d = reference - logprob, for tokens that the policy sampled:

        k1  -d                unbiased, may be negative. Its gradient is that of the
                              log-probability: 0 in expectation, so as a penalty it adds noise and
                              restrains nothing.
        k2  d^2 / 2           biased as a value; its gradient, -d times that of the
                              log-probability, is the reverse KL's, KL(policy || reference), in
                              expectation.
        k3  exp(d) - 1 - d    unbiased and never negative, the one in GRPO's eq. 4. Its gradient
                              is the forward KL's, KL(reference || policy), in expectation.

    Beyond d = `LARGEST_LOG_RATIO`, k3 goes on as the straight line that touches it there, so that
    one token's gradient stays finite.

    Once the policy has moved away from the one that sampled, these hold only approximately: no
    ratio corrects them, as in the papers.

    Args:
        logprobs: [E] under the policy; carries the gradient.
        reference_logprobs: [E] under the reference.
        estimator: 'k1', 'k2' or 'k3'.

    Returns:
        [E] in nats.
    """
    difference = reference_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return 0.5 * difference.square()
    assert estimator == "k3", estimator
    bounded = difference.clamp(max=LARGEST_LOG_RATIO)
    beyond = difference - bounded
    return torch.expm1(bounded) + bounded.exp() * beyond - difference

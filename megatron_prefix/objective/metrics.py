"""What a loss reports: sums that add up over microbatches and ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PolicyMetrics:
    """Sums over entries (one entry = one trained token of one sequence); means come last.

    Every field is a detached float64 scalar tensor. Add those of several microbatches with `+`;
    over ranks, all-reduce `stack()` by addition and read it back with `from_stack`.
    """

    policy_loss: Tensor
    """Sum of weight * policy loss, without KL penalty and entropy bonus."""
    kl: Tensor
    """Sum of weight * KL estimate against the reference; 0 where no reference was given."""
    entropy: Tensor
    """Sum of weight * entropy in nats; 0 where no entropy was given."""
    weight: Tensor
    """Sum of the weights: 1 over the whole batch for the mean aggregations."""
    tokens: Tensor
    """Number of entries."""
    clipped_low: Tensor
    """Entries whose ratio was clipped from below."""
    clipped_high: Tensor
    """Entries whose ratio was clipped from above."""
    ratio: Tensor
    """Sum of the ratio to the old policy (gspo: the sequence's ratio, once per token)."""
    ratio_squared: Tensor
    """Sum of its squares."""
    old_kl: Tensor
    """Sum of the k3 estimate of KL(old policy || policy), from token log-probabilities."""

    @classmethod
    def zeros(cls, device: torch.device | str = "cpu") -> PolicyMetrics:
        """The metrics of no entries, to start a sum from."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls.from_stack(torch.zeros(len(names), dtype=torch.float64, device=device))

    @classmethod
    def from_stack(cls, stacked: Tensor) -> PolicyMetrics:
        """The inverse of `stack`."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**dict(zip(names, stacked.unbind(), strict=True)))

    def stack(self) -> Tensor:
        """All fields in order, as one float64 vector."""
        return torch.stack([getattr(self, field.name) for field in dataclasses.fields(self)])

    def __add__(self, other: PolicyMetrics) -> PolicyMetrics:
        return PolicyMetrics.from_stack(self.stack() + other.stack())

    def means(self) -> dict[str, float]:
        """What to log: call it once everything is added up, since it waits for the device.

        `policy_loss` is the sum itself, whose weights already normalise it. `kl` and `entropy`
        are divided by the sum of the weights, the clip fractions and ratio statistics by the
        number of entries. Without entries everything is 0.
        """
        names = [field.name for field in dataclasses.fields(self)]
        sums = dict(zip(names, self.stack().tolist(), strict=True))
        tokens = max(sums["tokens"], 1.0)
        weight = sums["weight"] or 1.0
        ratio_mean = sums["ratio"] / tokens
        ratio_variance = max(sums["ratio_squared"] / tokens - ratio_mean**2, 0.0)
        return {
            "policy_loss": sums["policy_loss"],
            "kl": sums["kl"] / weight,
            "entropy": sums["entropy"] / weight,
            "clip_fraction": (sums["clipped_low"] + sums["clipped_high"]) / tokens,
            "clip_fraction_low": sums["clipped_low"] / tokens,
            "clip_fraction_high": sums["clipped_high"] / tokens,
            "ratio_mean": ratio_mean,
            "ratio_std": ratio_variance**0.5,
            "old_kl": sums["old_kl"] / tokens,
            "tokens": sums["tokens"],
        }

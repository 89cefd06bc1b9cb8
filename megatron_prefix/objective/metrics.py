"""What a loss reports: sums that add up over microbatches and ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prefix.objective.histogram import BINS, ratio_at


@dataclass(frozen=True, kw_only=True)
class PolicyMetrics:
    """Sums over entries (one entry = one trained token of one sequence); means come last.

    Every field is a detached float64 tensor, a scalar or the counts of a histogram. Add those of
    several microbatches with `+`; over ranks, all-reduce `stack()` by addition and read it back
    with `from_stack`.

    The ratio of an entry whose old log-probability is not known takes part in nothing here.
    """

    policy_loss: Tensor
    """Sum of weight * correction * policy loss, without KL penalty and entropy bonus."""
    kl: Tensor
    """Sum of weight * KL estimate against the reference; 0 where no reference was given."""
    entropy: Tensor
    """Sum of weight * entropy in nats; 0 where no entropy was given."""
    prediction_loss: Tensor
    """Sum of weight * cross-entropy of multi-token prediction; 0 without it."""
    prediction_weight: Tensor
    """Sum of its weights."""
    weight: Tensor
    """Sum of the weights: 1 over the whole batch for the mean aggregations."""
    tokens: Tensor
    """Number of entries."""
    unknown: Tensor
    """Entries whose old or sampled log-probability is impossible. They have no policy loss,
    except with `supervised`, which looks at neither."""
    clipped_low: Tensor
    """Entries whose ratio was clipped from below."""
    clipped_high: Tensor
    """Entries whose ratio was clipped from above."""
    clipped_dual: Tensor
    """Entries whose loss was bounded by the dual clip."""
    ratio: Tensor
    """Sum of the ratio to the old policy (gspo: the sequence's ratio, once per token)."""
    ratio_squared: Tensor
    """Sum of its squares."""
    old_kl: Tensor
    """Sum of the k3 estimate of KL(old policy || policy), from token log-probabilities."""
    ratio_counts: Tensor
    """[BINS] of the ratio's logarithm, see `histogram.log_ratio_counts`."""
    corrected: Tensor
    """Entries whose rho = pi_old / pi_sampled is known; 0 without a correction, as what follows."""
    correction_changed: Tensor
    """Entries whose rho is outside of the correction's bounds."""
    correction_weight: Tensor
    """Sum of the correction's weights."""
    mismatch_kl: Tensor
    """Sum of the k3 estimate of KL(sampling policy || old policy)."""
    mismatch_counts: Tensor
    """[BINS] of the logarithm of each token's rho."""

    @classmethod
    def zeros(cls, device: torch.device | str = "cpu") -> PolicyMetrics:
        """The metrics of no entries, to start a sum from."""
        return cls.from_stack(torch.zeros(sum(cls._sizes()), dtype=torch.float64, device=device))

    @classmethod
    def from_stack(cls, stacked: Tensor) -> PolicyMetrics:
        """The inverse of `stack`."""
        parts = stacked.split(cls._sizes())
        return cls(
            **{
                field.name: part if field.name in _HISTOGRAMS else part[0]
                for field, part in zip(dataclasses.fields(cls), parts, strict=True)
            }
        )

    @classmethod
    def _sizes(cls) -> list[int]:
        return [BINS if f.name in _HISTOGRAMS else 1 for f in dataclasses.fields(cls)]

    def stack(self) -> Tensor:
        """All fields in order, as one float64 vector."""
        return torch.cat([getattr(self, f.name).reshape(-1) for f in dataclasses.fields(self)])

    def __add__(self, other: PolicyMetrics) -> PolicyMetrics:
        return PolicyMetrics.from_stack(self.stack() + other.stack())

    def means(self) -> dict[str, float]:
        """What to log: call it once everything is added up, since it waits for the device.

        `policy_loss` is the sum itself, whose weights already normalise it. `kl` and `entropy`
        are divided by the sum of the weights, and so is `mtp_loss` by that of its own; what
        concerns the ratio by the number of entries whose old log-probability is known, fractions of
        tokens by the number of entries. Without entries everything is 0, and ratios at a fraction
        of the entries are 1.
        """
        host = PolicyMetrics.from_stack(self.stack().cpu())
        sums = {
            field.name: float(getattr(host, field.name))
            for field in dataclasses.fields(host)
            if field.name not in _HISTOGRAMS
        }
        tokens = max(sums["tokens"], 1.0)
        known = max(sums["tokens"] - sums["unknown"], 1.0)
        weight = sums["weight"] or 1.0
        ratio_mean = sums["ratio"] / known
        ratio_variance = max(sums["ratio_squared"] / known - ratio_mean**2, 0.0)
        clipped = sums["clipped_low"] + sums["clipped_high"]
        found = {
            "policy_loss": sums["policy_loss"],
            "kl": sums["kl"] / weight,
            "entropy": sums["entropy"] / weight,
            "clip_fraction": clipped / tokens,
            "clip_fraction_low": sums["clipped_low"] / tokens,
            "clip_fraction_high": sums["clipped_high"] / tokens,
            "clip_fraction_dual": sums["clipped_dual"] / tokens,
            "ratio_mean": ratio_mean,
            "ratio_std": ratio_variance**0.5,
            "ratio_p01": ratio_at(host.ratio_counts, 0.01),
            "ratio_p99": ratio_at(host.ratio_counts, 0.99),
            "ratio_max": ratio_at(host.ratio_counts, 1.0),
            "old_kl": sums["old_kl"] / known,
            "unknown_fraction": sums["unknown"] / tokens,
            "tokens": sums["tokens"],
        }
        if sums["corrected"]:
            found |= {
                "mismatch_kl": sums["mismatch_kl"] / sums["corrected"],
                "mismatch_p01": ratio_at(host.mismatch_counts, 0.01),
                "mismatch_p50": ratio_at(host.mismatch_counts, 0.5),
                "mismatch_p99": ratio_at(host.mismatch_counts, 0.99),
                "mismatch_max": ratio_at(host.mismatch_counts, 1.0),
                "correction_mean": sums["correction_weight"] / sums["corrected"],
                "correction_changed_fraction": sums["correction_changed"] / sums["corrected"],
            }
        if sums["prediction_weight"]:
            found["mtp_loss"] = sums["prediction_loss"] / sums["prediction_weight"]
        return found


_HISTOGRAMS = ("ratio_counts", "mismatch_counts")

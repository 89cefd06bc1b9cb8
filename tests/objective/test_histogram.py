"""Quantiles of ratios from counts in fixed bins."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_prefix.objective.histogram import BINS, log_ratio_counts, ratio_at


def counts(values: list[float]) -> torch.Tensor:
    return log_ratio_counts(torch.tensor(values), torch.ones(len(values), dtype=torch.bool))


def test_a_quantile_is_known_to_two_and_a_half_percent_of_its_logarithm() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1001, generator=generator, dtype=torch.float64)
    found = log_ratio_counts(values, torch.ones(1001, dtype=torch.bool))
    assert found.shape == (BINS,) and found.sum() == 1001
    for fraction in (0.01, 0.25, 0.9, 0.99, 1.0):
        rank = max(1, math.ceil(fraction * 1001))
        exact = float(values.sort().values[rank - 1])
        assert math.log(ratio_at(found, fraction)) == pytest.approx(exact, rel=0.026)


def test_only_what_is_counted_counts_and_counts_add_up() -> None:
    values, counted = torch.tensor([0.5, 3.0, -0.5]), torch.tensor([True, False, True])
    found = log_ratio_counts(values, counted)
    assert torch.equal(found, counts([0.5]) + counts([-0.5]))
    assert math.log(ratio_at(found, 1.0)) == pytest.approx(0.5, rel=0.026)
    assert math.log(ratio_at(found, 0.5)) == pytest.approx(-0.5, rel=0.026)


def test_values_without_a_size_and_beyond_all_bins() -> None:
    assert ratio_at(counts([]), 0.5) == 1.0
    assert ratio_at(counts([0.0, 1e-9, -1e-9, math.nan]), 1.0) == 1.0
    assert ratio_at(counts([math.inf, 1e4]), 0.0) == pytest.approx(math.exp(10), rel=0.3)
    assert ratio_at(counts([-math.inf, -1e4]), 1.0) == pytest.approx(math.exp(-10), rel=0.3)

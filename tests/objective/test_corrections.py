"""Corrections between the sampling and the old policy, against values computed by hand.

Two sequences; the old policy's over the sampling policy's probability, rho:

    sequence            0     0     1     1     1
    old probability    .6    .2    .2    .6    .4
    sampled            .2    .4    .4    .1    .4
    rho                3.    .5    .5    6.    1.
    product of rho     1.5         3.
    geometric mean     1.22474487  1.44224957

The ratio to the old policy is 1 and the advantages are 1, so that the gradient of each token is
minus its weight.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_prefix.objective import ObjectiveConfig, PolicyMetrics, policy_loss
from megatron_prefix.objective.options import CorrectionConfig
from tests.distributed import run_distributed

OLD = torch.tensor([0.6, 0.2, 0.2, 0.6, 0.4], dtype=torch.float64).log()
SAMPLED = torch.tensor([0.2, 0.4, 0.4, 0.1, 0.4], dtype=torch.float64).log()
SEQUENCE_IDS = torch.tensor([0, 0, 1, 1, 1])


def run(
    sampled: torch.Tensor = SAMPLED, *, name: Any = "grpo", **options: Any
) -> tuple[list[float], PolicyMetrics]:
    """The weight of each token's gradient, and the metrics."""
    logprobs = OLD.clone().requires_grad_()
    loss, metrics = policy_loss(
        logprobs,
        old_logprobs=OLD,
        sampled_logprobs=sampled,
        advantages=torch.ones(5),
        weights=torch.ones(5),
        sequence_ids=SEQUENCE_IDS,
        num_sequences=2,
        config=ObjectiveConfig(name=name, correction=CorrectionConfig(**options)),
    )
    loss.backward()
    return (-logprobs.grad).tolist(), metrics


@pytest.mark.parametrize(
    ("options", "expected", "changed"),
    [
        # Truncated at 2, as in the paper of that name.
        ({}, [2, 0.5, 0.5, 2, 1], 2),
        ({"low": 0.75, "high": 4.0}, [3, 0.75, 0.75, 4, 1], 3),
        # Masked above; IcePop's two sides, .5 and 5; bounds belong to the range.
        ({"kind": "mask", "high": 5.0}, [3, 0.5, 0.5, 0, 1], 1),
        ({"kind": "mask", "low": 0.51, "high": 5.0}, [3, 0, 0, 0, 1], 3),
        # The product over a response: 3 * .5, and .5 * 6 * 1.
        ({"level": "sequence"}, [1.5, 1.5, 2, 2, 2], 3),
        ({"level": "sequence", "kind": "mask"}, [1.5, 1.5, 0, 0, 0], 3),
        # 1.5^(1/2) and 3^(1/3).
        (
            {"level": "sequence_mean"},
            [1.22474487, 1.22474487, 1.44224957, 1.44224957, 1.44224957],
            0,
        ),
        (
            {"level": "sequence_mean", "kind": "mask", "high": 1.3},
            [1.22474487, 1.22474487, 0, 0, 0],
            3,
        ),
    ],
)
@pytest.mark.parametrize("name", ["grpo", "dapo", "cispo"])
def test_weights(name: Any, options: dict[str, Any], expected: list[float], changed: int) -> None:
    found, metrics = run(name=name, **options)
    assert found == pytest.approx(expected, abs=2e-8)
    assert metrics.correction_changed == changed
    assert metrics.means()["correction_mean"] == pytest.approx(sum(expected) / 5, abs=2e-8)


def test_gspo_and_a_correction_of_the_whole_response() -> None:
    # Its gradient is that of the mean over a response: 1/2 and 1/3 of the sum of the weights.
    found, _ = run(name="gspo", level="sequence")
    assert found == pytest.approx([1.5, 1.5, 2, 2, 2])
    found, _ = run(name="gspo", level="token")
    assert found == pytest.approx([1.25, 1.25, 3.5 / 3, 3.5 / 3, 3.5 / 3])


def test_metrics_of_the_mismatch() -> None:
    _, metrics = run()
    found = metrics.means()
    # rho - 1 - ln rho, with ln 3 = 1.09861229, ln .5 = -.69314718, ln 6 = 1.79175947:
    # .90138771, twice .19314718, 3.20824053, 0; their mean
    assert found["mismatch_kl"] == pytest.approx(0.89918452, abs=1e-8)
    # Of bins, to 2.5 % of the logarithm: 3, .5, 6, 1.
    assert found["mismatch_p01"] == pytest.approx(0.5, rel=0.018)
    assert found["mismatch_p50"] == 1.0
    assert found["mismatch_p99"] == found["mismatch_max"] == pytest.approx(6, rel=0.046)
    assert found["correction_changed_fraction"] == pytest.approx(0.4)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_impossible_values_are_masked_and_leave_the_rest_of_their_response_as_it_is(
    level: Any, kind: Any
) -> None:
    sampled = SAMPLED.clone()
    sampled[0], sampled[3] = -9999.0, -math.inf
    found, metrics = run(sampled, level=level, kind=kind)
    # rho .5 alone in sequence 0; .5 and 1 in sequence 1, their product .5, their mean .70710678.
    expected = {
        "token": [0, 0.5, 0.5, 0, 1],
        "sequence": [0, 0.5, 0.5, 0, 0.5],
        "sequence_mean": [0, 0.5, 0.70710678, 0, 0.70710678],
    }[level]
    assert found == pytest.approx(expected, abs=2e-8)
    assert metrics.unknown == 2
    assert metrics.stack().isfinite().all()
    # k3 of .5 twice and of 1: .38629436 over three tokens that are known.
    assert metrics.means()["mismatch_kl"] == pytest.approx(0.12876479, abs=1e-8)


@pytest.mark.parametrize("level", ["sequence", "sequence_mean"])
def test_the_product_of_a_long_response_stays_finite(level: Any) -> None:
    logprobs = torch.full((4000,), -1.0, requires_grad=True)
    loss, metrics = policy_loss(
        logprobs,
        old_logprobs=None,
        sampled_logprobs=torch.full((4000,), -11.0),
        advantages=torch.full((4000,), 1e20),
        weights=torch.ones(4000),
        sequence_ids=torch.zeros(4000, dtype=torch.int64),
        num_sequences=1,
        config=ObjectiveConfig(correction=CorrectionConfig(level=level)),
    )
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-2e20] * 4000)
    assert metrics.stack().isfinite().all()


def _corrected(
    rank: int, world_size: int, entries: dict[str, torch.Tensor], options: dict[str, Any]
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Loss, gradient and metrics of every second entry, with sequences over both ranks."""
    mine = {name: values[rank::world_size] for name, values in entries.items()}
    logprobs = mine.pop("logprobs").requires_grad_()
    loss, metrics = policy_loss(
        logprobs,
        **mine,
        num_sequences=4,
        config=ObjectiveConfig(name="gspo", clip_low=0.3, clip_high=0.3, **options),
        context_parallel_group=dist.group.WORLD if world_size > 1 else None,
    )
    loss.backward()
    return float(loss.detach()), logprobs.grad, metrics.stack()


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_responses_that_are_split_over_ranks(kind: Any) -> None:
    generator = torch.Generator().manual_seed(1)

    def normal(count: int) -> torch.Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    # Sequence 2 has one entry, so one rank has none of it; sequence 3 has none at all.
    sequence_ids = torch.tensor([0] * 5 + [1] * 4 + [2])
    entries = {
        "logprobs": -normal(10).abs(),
        "old_logprobs": -normal(10).abs(),
        "sampled_logprobs": -normal(10).abs(),
        "advantages": normal(4)[sequence_ids],
        "weights": normal(10).abs(),
        "sequence_ids": sequence_ids,
    }
    entries["sampled_logprobs"][6] = -9999.0
    for level in ("token", "sequence", "sequence_mean"):
        options = {"correction": CorrectionConfig(level=level, kind=kind, low=0.4, high=1.5)}
        whole = {name: values.clone() for name, values in entries.items()}
        expected_loss, expected_gradient, expected_metrics = _corrected(0, 1, whole, options)
        ranks = run_distributed(_corrected, 2, entries, options)
        assert sum(loss for loss, _, _ in ranks) == pytest.approx(expected_loss, rel=1e-13)
        gradient = torch.empty(10, dtype=torch.float64)
        for rank, (_, found, _) in enumerate(ranks):
            gradient[rank::2] = found
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-13, atol=1e-15)
        metrics = sum(metrics for _, _, metrics in ranks)
        torch.testing.assert_close(metrics, expected_metrics, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "drop"}, r"kind='drop': choose one of truncate, mask"),
        ({"level": "group"}, r"level='group': choose one of token, sequence, sequence_mean"),
        ({"low": 1.5}, r"low=1\.5: set a number from 0"),
        ({"high": 0.5}, r"high=0\.5: set a number from 1 to 1e\+06"),
        ({"high": math.inf}, r"high=inf: set"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CorrectionConfig(**options)

"""Losses of inputs at and beyond the bounds of what a run can meet."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_prefix.objective import ObjectiveConfig, policy_loss
from megatron_prefix.objective.options import CorrectionConfig
from megatron_prefix.objective.ratio import LARGEST_LOG_RATIO

NAMES = ["grpo", "dr_grpo", "dapo", "gspo", "cispo"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("old", [-9999.0, -1000.0, -math.inf, math.nan, math.inf, 1.0])
def test_an_impossible_old_log_probability_takes_its_token_out_of_the_policy_loss(
    name, advantage, old
):
    """Servers write -9999 for a log-probability of minus infinity."""
    logprobs = torch.tensor([-3.0, -1.0, -2.0], requires_grad=True)
    loss, metrics = policy_loss(
        logprobs,
        old_logprobs=torch.tensor([old, -1.0, -2.0]),
        reference_logprobs=torch.tensor([-1.0, 5000.0, -2.0]),
        advantages=torch.full((3,), advantage),
        weights=torch.full((3,), 0.5),
        sequence_ids=torch.tensor([0, 1, 0]),
        num_sequences=2,
        config=ObjectiveConfig(name=name, kl_coefficient=0.1, aggregation="token_mean"),
    )
    loss.backward()
    assert metrics.stack().isfinite().all()
    bound = math.exp(LARGEST_LOG_RATIO)
    # Of the other tokens: their advantage, and the slope of k3 (1 - exp(d) with d at the bound for
    # the second, 0 for the third). The sequence of the first has the third alone in its ratio.
    of_kl = [-0.05 * math.expm1(2.0), -0.05 * (bound - 1), 0.0]
    expected = [of_kl[0], of_kl[1] - 0.5 * advantage, of_kl[2] - 0.5 * advantage]
    assert logprobs.grad.tolist() == pytest.approx(expected, rel=1e-5)
    found = metrics.means()
    assert (found["unknown_fraction"], found["ratio_mean"]) == (pytest.approx(1 / 3), 1.0)
    assert found["tokens"] == 3


@pytest.mark.parametrize("old", [-9999.0, math.nan, 1.0])
def test_supervised_trains_on_a_token_whatever_its_old_log_probability(old):
    logprobs = torch.tensor([-3.0, -1.0], requires_grad=True)
    loss, metrics = policy_loss(
        logprobs,
        old_logprobs=torch.tensor([old, -1.0]),
        advantages=torch.zeros(2),
        weights=torch.full((2,), 0.5),
        sequence_ids=torch.tensor([0, 0]),
        num_sequences=1,
        config=ObjectiveConfig(name="supervised"),
    )
    loss.backward()
    assert loss.item() == 2.0
    assert logprobs.grad.tolist() == [-0.5, -0.5]
    assert metrics.means()["unknown_fraction"] == 0.5


@pytest.mark.parametrize("name", [*NAMES, "supervised"])
@pytest.mark.parametrize("advantage", [-1e20, 0.0, 1e20])
@pytest.mark.parametrize("old", [0.0, -30.0, -100.0, -999.0])
@pytest.mark.parametrize("current", [-1e4, -3.0, 0.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"correction": CorrectionConfig(), "kl_estimator": "k2"},
        {"correction": CorrectionConfig(level="sequence", high=1e6), "dual_clip": 1e6},
        {"correction": CorrectionConfig(level="sequence_mean", kind="mask"), "clip_high": 1e6},
    ],
    ids=lambda options: " ".join(options),
)
def test_extreme_inputs_give_finite_losses_gradients_and_metrics(
    name, advantage, old, current, options
):
    # What an objective does not use is refused.
    unused = {"supervised": ("correction", "dual_clip"), "cispo": ("dual_clip",)}.get(name, ())
    options = {key: value for key, value in options.items() if key not in unused}
    corrects = "correction" in options
    logprobs = torch.tensor([current, -1.0], requires_grad=True)
    config = ObjectiveConfig(
        name=name,
        kl_coefficient=0.1,
        aggregation="token_mean",
        **options,
    )
    loss, metrics = policy_loss(
        logprobs,
        old_logprobs=torch.tensor([old, -1.0]),
        sampled_logprobs=torch.tensor([-999.0, -1e4]) if corrects else None,
        reference_logprobs=torch.tensor([-1e4, 1e4]),
        advantages=torch.full((2,), advantage),
        weights=torch.full((2,), 0.5),
        sequence_ids=torch.tensor([0, 1]),
        num_sequences=2,
        config=config,
    )
    loss.backward()
    assert loss.isfinite()
    assert logprobs.grad.isfinite().all()
    assert metrics.stack().isfinite().all()
    assert all(math.isfinite(value) for value in metrics.means().values())


@pytest.mark.parametrize("old", [-30.0, -100.0, -999.0])
def test_beyond_the_bound_a_ratio_has_no_gradient(old):
    logprobs = torch.tensor([-3.0], requires_grad=True)
    loss, metrics = policy_loss(
        logprobs,
        old_logprobs=torch.tensor([old]),
        advantages=torch.tensor([-1.0]),
        weights=torch.ones(1),
        sequence_ids=torch.tensor([0]),
        num_sequences=1,
        config=ObjectiveConfig(),
    )
    loss.backward()
    assert loss.item() == metrics.ratio.item() == pytest.approx(math.exp(10.0), rel=1e-5)
    assert logprobs.grad.item() == 0
    # The last bin of the histogram, to 2.5 % of the logarithm.
    assert metrics.means()["ratio_max"] == pytest.approx(math.exp(10.0), rel=0.3)


def test_ratios_within_a_wide_clip_range_are_what_they_are():
    logprobs = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    loss, _ = policy_loss(
        logprobs,
        old_logprobs=torch.tensor([-14.0], dtype=torch.float64),
        advantages=torch.tensor([1.0]),
        weights=torch.tensor([1.0]),
        sequence_ids=torch.tensor([0]),
        num_sequences=1,
        config=ObjectiveConfig(name="grpo", clip_high=math.exp(12.0)),
    )
    loss.backward()
    assert loss.item() == logprobs.grad.item() == pytest.approx(-math.exp(11.0), rel=1e-12)


@pytest.mark.parametrize("name", [*NAMES, "supervised"])
def test_no_entries_give_a_zero_that_can_be_differentiated(name):
    logprobs = torch.zeros(0, requires_grad=True)
    empty = torch.zeros(0)
    loss, metrics = policy_loss(
        logprobs,
        old_logprobs=empty,
        advantages=empty,
        weights=empty,
        sequence_ids=torch.zeros(0, dtype=torch.int64),
        num_sequences=0,
        config=ObjectiveConfig(
            name=name,
            kl_coefficient=0.1,
            entropy_coefficient=0.1,
            max_response_length=4 if name == "dr_grpo" else None,
        ),
        reference_logprobs=empty,
        entropy=empty,
    )
    assert loss.item() == 0
    assert torch.autograd.grad(loss, logprobs)[0].shape == (0,)
    assert metrics.means()["tokens"] == 0

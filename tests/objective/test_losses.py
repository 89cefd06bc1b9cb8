"""The losses, their gradients and their metrics against values computed by hand.

One example serves all objectives. Two sequences; the old policy gave every token 0.4:

    sequence       0    0    1    1    1
    probability   .6   .2   .2   .6   .4
    ratio r      1.5   .5   .5  1.5   1.
    advantage A    2    2   -1   -1   -1

    ln .6 = -0.51082562    ln .4 = -0.91629073    ln .2 = -1.60943791
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.objective import (
    ObjectiveConfig,
    PolicyMetrics,
    policy_loss,
    token_weights,
)
from megatron_prefix.objective.kl import kl_per_token
from megatron_prefix.objective.options import CorrectionConfig
from tests.distributed import run_distributed

SEQUENCE_IDS = torch.tensor([0, 0, 1, 1, 1])
PROBABILITIES = torch.tensor([0.6, 0.2, 0.2, 0.6, 0.4], dtype=torch.float64)
ADVANTAGES = torch.tensor([2, -1], dtype=torch.float64)[SEQUENCE_IDS]

# The literals below carry 8 digits.
TOLERANCE = {"rtol": 0, "atol": 2e-8}


def run(config: ObjectiveConfig, **inputs: Tensor) -> tuple[Tensor, Tensor, PolicyMetrics]:
    """Loss, its gradient and metrics of the example."""
    config = config.resolved()
    logprobs = PROBABILITIES.log().requires_grad_()
    weights = token_weights(
        [2, 3], config.aggregation, max_response_length=config.max_response_length
    )
    loss, metrics = policy_loss(
        logprobs,
        old_logprobs=torch.full((5,), 0.4, dtype=torch.float64).log(),
        advantages=ADVANTAGES,
        weights=torch.from_numpy(weights)[SEQUENCE_IDS],
        sequence_ids=SEQUENCE_IDS,
        num_sequences=2,
        config=config,
        **inputs,
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), gradient, metrics


def expect(actual: Tensor, expected: float | list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), **TOLERANCE)


def test_grpo():
    loss, gradient, _ = run(ObjectiveConfig(name="grpo"))
    # weights 1/(2*2) and 1/(2*3); -min(r A, clip(r, .8, 1.2) A):
    #   -min(3, 2.4) = -2.4   -min(1, 1.6) = -1
    #   -min(-.5, -.8) = .8   -min(-1.5, -1.2) = 1.5   -min(-1, -1) = 1
    # (-2.4 - 1) / 4 + (.8 + 1.5 + 1) / 6 = -.85 + .55
    expect(loss, -0.3)
    # -weight r A where not clipped: -1/4, 1.5/6, 1/6
    expect(gradient, [0, -0.25, 0, 0.25, 1 / 6])


def test_dr_grpo():
    loss, gradient, _ = run(ObjectiveConfig(name="dr_grpo", max_response_length=10))
    # token losses as for grpo, all weights 1/(2*10): (-2.4 - 1 + .8 + 1.5 + 1) / 20
    expect(loss, -0.005)
    expect(gradient, [0, -0.05, 0, 0.075, 0.05])


def test_dapo():
    loss, gradient, _ = run(ObjectiveConfig(name="dapo"))
    # weights 1/5, upper bound 1.28: (-2.56 - 1 + .8 + 1.5 + 1) / 5
    expect(loss, -0.052)
    expect(gradient, [0, -0.2, 0, 0.3, 0.2])


def test_gspo():
    loss, gradient, _ = run(ObjectiveConfig(name="gspo"))
    # s_0 = (1.5 * .5)^(1/2) = .8660254038, s_1 = (.5 * 1.5 * 1)^(1/3) = .9085602964
    # bounds .9997 and 1.0004: -min(2 s_0, 2 * .9997) = -1.7320508076 (not clipped),
    # -min(-s_1, -.9997) = .9997 (clipped); half their sum
    expect(loss, -0.36617540)
    # -1/2 A s_0 / 2 for both tokens of sequence 0, and nothing for sequence 1
    expect(gradient, [-0.43301270, -0.43301270, 0, 0, 0])


def test_gspo_not_clipped():
    loss, gradient, _ = run(ObjectiveConfig(name="gspo", clip_low=0.2, clip_high=0.2))
    # (-1.7320508076 + .9085602964) / 2
    expect(loss, -0.41174526)
    # sequence 1: 1/2 * s_1 / 3
    expect(gradient, [-0.43301270, -0.43301270, 0.15142672, 0.15142672, 0.15142672])


def test_cispo():
    loss, gradient, _ = run(ObjectiveConfig(name="cispo", clip_high=0.2))
    # weights 1/5; clip(r) = 1.2, .5, .5, 1.2, 1; -clip(r) A logprob:
    #   2.4 * .51082562 = 1.22598150   1 * 1.60943791 = 1.60943791
    #   -.5 * 1.60943791 = -.80471896  -1.2 * .51082562 = -.61299075  -1 * .91629073
    # sum .50141897
    expect(loss, 0.10028379)
    # -weight clip(r) A: every token keeps its gradient
    expect(gradient, [-0.48, -0.2, 0.1, 0.24, 0.2])


def test_supervised_is_the_mean_negative_log_likelihood_whatever_the_rewards():
    loss, gradient, metrics = run(ObjectiveConfig(name="supervised"))
    # weights 1/5; (.51082562 + 1.60943791 + 1.60943791 + .51082562 + .91629073) / 5
    expect(loss, 1.03136356)
    expect(gradient, [-0.2] * 5)
    assert metrics.means()["clip_fraction"] == 0


def test_cispo_has_no_lower_bound_and_caps_weights_at_5_by_default():
    config = ObjectiveConfig(name="cispo")
    logprobs = torch.tensor([0.0, -9.0], dtype=torch.float64, requires_grad=True)
    loss, _ = policy_loss(
        logprobs,
        old_logprobs=torch.tensor([-9.0, 0.0], dtype=torch.float64),
        advantages=torch.ones(2),
        weights=torch.ones(2),
        sequence_ids=torch.tensor([0, 0]),
        num_sequences=1,
        config=config,
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    # exp(9) = 8103 becomes 5; exp(-9) = .0001234098 stays
    expect(gradient, [-5, -0.00012340980])


@pytest.mark.parametrize(
    ("estimator", "values", "gradients"),
    [
        # logprob ln .6, reference ln .3: d = -ln 2. logprob ln .2, reference ln .4: d = ln 2.
        # ln 2 = .69314718
        ("k1", [0.69314718, -0.69314718], [1, 1]),
        # ln(2)^2 / 2 = .24022651; gradient -d
        ("k2", [0.24022651, 0.24022651], [0.69314718, -0.69314718]),
        # 1/2 - 1 + ln 2, 2 - 1 - ln 2; gradient 1 - exp(d)
        ("k3", [0.19314718, 0.30685282], [0.5, -1]),
    ],
)
def test_kl_per_token(estimator, values, gradients):
    logprobs = torch.tensor([0.6, 0.2], dtype=torch.float64).log().requires_grad_()
    kl = kl_per_token(logprobs, torch.tensor([0.3, 0.4], dtype=torch.float64).log(), estimator)
    expect(kl.detach(), values)
    expect(torch.autograd.grad(kl.sum(), logprobs)[0], gradients)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_expected_gradient_of_a_kl_penalty_is_the_documented_one(estimator):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, generator=generator, requires_grad=True)
    reference = torch.randn(7, dtype=torch.float64, generator=generator).log_softmax(0)
    logprobs = logits.log_softmax(0)
    penalty = logprobs.detach().exp() @ kl_per_token(logprobs, reference, estimator)
    expected = {
        "k1": 0 * logprobs.sum(),
        "k2": logprobs.exp() @ (logprobs - reference),
        "k3": reference.exp() @ (reference - logprobs),
    }[estimator]
    torch.testing.assert_close(
        torch.autograd.grad(penalty, logits, retain_graph=True)[0],
        torch.autograd.grad(expected, logits)[0],
        rtol=0,
        atol=1e-15,  # seven terms of about .1
    )


def test_kl_penalty_and_entropy_bonus_enter_with_the_weights():
    reference = torch.tensor([0.3, 0.4, 0.2, 0.6, 0.4], dtype=torch.float64).log()
    entropy = torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64, requires_grad=True)
    config = ObjectiveConfig(kl_coefficient=0.1, entropy_coefficient=0.01)
    loss, gradient, metrics = run(config, reference_logprobs=reference, entropy=entropy)
    # k3 is .19314718 and .30685282, then 0: sum .5, times weight 1/4: .125
    # entropy (1 + 2) / 4 + (3 + 4 + 5) / 6 = 2.75
    # -.3 + .1 * .125 - .01 * 2.75
    expect(loss, -0.315)
    expect(metrics.policy_loss, -0.3)
    expect(metrics.kl, 0.125)
    expect(metrics.entropy, 2.75)
    # grpo's plus .1 / 4 * (1 - exp(d)): .1 / 4 * .5 and .1 / 4 * -1
    expect(gradient, [0.0125, -0.275, 0, 0.25, 1 / 6])


def test_the_entropy_bonus_pulls_entropies_up():
    entropy = torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64, requires_grad=True)
    loss, _ = policy_loss(
        torch.zeros(5, dtype=torch.float64),
        old_logprobs=None,
        advantages=ADVANTAGES,
        weights=torch.tensor([0.25, 0.25, 0.5, 0.5, 0.5], dtype=torch.float64),
        sequence_ids=SEQUENCE_IDS,
        num_sequences=2,
        config=ObjectiveConfig(entropy_coefficient=0.1),
        entropy=entropy,
    )
    expect(torch.autograd.grad(loss, entropy)[0], [-0.025, -0.025, -0.05, -0.05, -0.05])


def test_reference_and_entropy_without_coefficients_are_only_reported():
    entropy = torch.ones(5, dtype=torch.float64, requires_grad=True)
    loss, gradient, metrics = run(
        ObjectiveConfig(), reference_logprobs=torch.zeros(5), entropy=entropy
    )
    expect(loss, -0.3)
    expect(gradient, [0, -0.25, 0, 0.25, 1 / 6])
    expect(metrics.entropy, 1)
    assert metrics.kl > 0


def test_without_old_logprobs_every_ratio_is_one_and_keeps_its_gradient():
    logprobs = PROBABILITIES.log().requires_grad_()
    loss, metrics = policy_loss(
        logprobs,
        old_logprobs=None,
        advantages=ADVANTAGES,
        weights=torch.ones(5, dtype=torch.float64),
        sequence_ids=SEQUENCE_IDS,
        num_sequences=2,
        config=ObjectiveConfig(),
    )
    expect(loss.detach(), -1)  # -2 - 2 + 1 + 1 + 1
    expect(torch.autograd.grad(loss, logprobs)[0], [-2, -2, 1, 1, 1])
    assert metrics.means()["clip_fraction"] == 0
    assert metrics.means()["ratio_std"] == 0


def test_metrics_of_grpo():
    _, _, metrics = run(ObjectiveConfig())
    expect(metrics.weight, 1)
    expect(metrics.tokens, 5)
    # clipped: r = 1.5 with A > 0, r = .5 with A < 0
    expect(metrics.clipped_high, 1)
    expect(metrics.clipped_low, 1)
    # 1.5 + .5 + .5 + 1.5 + 1, and 2.25 + .25 + .25 + 2.25 + 1
    expect(metrics.ratio, 5)
    expect(metrics.ratio_squared, 6)
    # r - 1 - ln r: .5 - .40546511 = .09453489 and -.5 + .69314718 = .19314718, each twice
    expect(metrics.old_kl, 0.57536414)
    assert metrics.means() == pytest.approx(
        {
            "policy_loss": -0.3,
            "kl": 0,
            "entropy": 0,
            "clip_fraction": 0.4,
            "clip_fraction_low": 0.2,
            "clip_fraction_high": 0.2,
            "clip_fraction_dual": 0,
            "ratio_mean": 1,
            "ratio_std": 0.2**0.5,  # 6/5 - 1
            # Bins of a histogram, to 2.5 % of ln .5 = -.6931 and of ln 1.5 = .4055.
            "ratio_p01": pytest.approx(0.5, rel=0.0175),
            "ratio_p99": pytest.approx(1.5, rel=0.0102),
            "ratio_max": pytest.approx(1.5, rel=0.0102),
            "old_kl": 0.115072828,
            "unknown_fraction": 0,
            "tokens": 5,
        },
        abs=1e-8,
    )


def test_metrics_of_gspo_and_cispo():
    _, _, gspo = run(ObjectiveConfig(name="gspo"))
    expect(gspo.clipped_low, 3)  # the three tokens of sequence 1
    expect(gspo.clipped_high, 0)
    expect(gspo.ratio, 4.45773170)  # 2 * .8660254038 + 3 * .9085602964
    _, _, cispo = run(ObjectiveConfig(name="cispo", clip_high=0.2))
    expect(cispo.clipped_low, 0)
    expect(cispo.clipped_high, 2)  # r = 1.5, whatever the advantage


def test_metrics_add_up_and_survive_stacking():
    _, _, metrics = run(ObjectiveConfig())
    twice = PolicyMetrics.zeros() + metrics + PolicyMetrics.from_stack(metrics.stack())
    assert twice.means()["tokens"] == 10
    assert twice.means()["clip_fraction"] == metrics.means()["clip_fraction"]
    assert twice.means()["policy_loss"] == 2 * metrics.means()["policy_loss"]
    assert not metrics.stack().requires_grad
    nothing = PolicyMetrics.zeros().means()
    assert {name for name, value in nothing.items() if value == 1.0} == {
        "ratio_p01",
        "ratio_p99",
        "ratio_max",
    }
    assert set(nothing.values()) == {0.0, 1.0}


def test_the_dual_clip_bounds_the_loss_of_negative_advantages():
    config = ObjectiveConfig(dual_clip=1.4, clip_high=0.2)
    loss, gradient, metrics = run(config)
    # As in test_grpo but for r = 1.5, A = -1: the loss 1.5 becomes 1.4, without a gradient.
    # (-2.4 - 1) / 4 + (.8 + 1.4 + 1) / 6
    expect(loss, -0.31666667)
    expect(gradient, [0, -0.25, 0, 0, 1 / 6])
    assert metrics.means()["clip_fraction_dual"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_computes_in_float32_or_wider(dtype, wide):
    logprobs = torch.zeros(2, dtype=dtype, requires_grad=True)
    loss, metrics = policy_loss(
        logprobs,
        old_logprobs=torch.zeros(2, dtype=torch.float64),
        advantages=torch.ones(2, dtype=torch.float64),
        weights=torch.ones(2, dtype=torch.float64),
        sequence_ids=torch.tensor([0, 0]),
        num_sequences=1,
        config=ObjectiveConfig(),
    )
    assert loss.dtype == wide
    assert metrics.stack().dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages": torch.zeros(3)}, r"advantages has shape \[3\], logprobs have \[2\]"),
        ({"weights": torch.zeros(2, 1)}, r"weights has shape \[2, 1\]"),
        ({"logprobs": torch.zeros(1, 2)}, r"logprobs have shape \[1, 2\]"),
        (
            {"config": ObjectiveConfig(kl_coefficient=0.5)},
            r"kl_coefficient=0\.5 needs reference_logprobs",
        ),
        ({"sampled_logprobs": torch.zeros(2)}, "sampled_logprobs are for correction"),
        (
            {"config": ObjectiveConfig(correction=CorrectionConfig())},
            "correction needs them",
        ),
        (
            {"config": ObjectiveConfig(entropy_coefficient=0.5)},
            r"entropy_coefficient=0\.5 needs entropy",
        ),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "logprobs": torch.zeros(2),
        "old_logprobs": torch.zeros(2),
        "advantages": torch.zeros(2),
        "weights": torch.zeros(2),
        "sequence_ids": torch.zeros(2, dtype=torch.int64),
        "num_sequences": 1,
        "config": ObjectiveConfig(),
    } | change
    with pytest.raises(ValueError, match=message):
        policy_loss(arguments.pop("logprobs"), **arguments)


def _gspo(
    rank: int, world_size: int, entries: dict[str, torch.Tensor]
) -> tuple[float, torch.Tensor]:
    """Loss and gradient of every second entry, with the sequences' ratios over both ranks."""
    mine = {name: values[rank::world_size] for name, values in entries.items()}
    logprobs = mine.pop("logprobs").requires_grad_()
    loss, _ = policy_loss(
        logprobs,
        **mine,
        num_sequences=4,
        config=ObjectiveConfig(name="gspo", clip_low=0.3, clip_high=0.3),
        context_parallel_group=dist.group.WORLD if world_size > 1 else None,
    )
    loss.backward()
    return float(loss), logprobs.grad


def test_gspo_of_responses_that_are_split_over_ranks() -> None:
    generator = torch.Generator().manual_seed(1)

    def normal(count: int) -> torch.Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    # Sequence 2 has one entry, so one rank has none of it; sequence 3 has none at all.
    sequence_ids = torch.tensor([0] * 5 + [1] * 4 + [2])
    entries = {
        "logprobs": normal(10),
        "old_logprobs": normal(10),
        "advantages": normal(4)[sequence_ids],
        "weights": normal(10).abs(),
        "sequence_ids": sequence_ids,
    }
    whole = {name: values.clone() for name, values in entries.items()}
    expected_loss, expected_gradient = _gspo(0, 1, whole)
    ranks = run_distributed(_gspo, 2, entries)
    assert sum(loss for loss, _ in ranks) == pytest.approx(expected_loss, rel=1e-13)
    gradient = torch.empty(10, dtype=torch.float64)
    for rank, (_, found) in enumerate(ranks):
        gradient[rank::2] = found
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-13, atol=1e-15)

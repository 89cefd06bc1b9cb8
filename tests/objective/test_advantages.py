"""Group advantages against values computed by hand."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from megatron_prefix.objective import group_advantages

KINDS = ["std", "mean", "leave_one_out"]


def test_mean_subtracts_the_groups_mean():
    # mean of 1, 2, 6 is 3
    assert group_advantages([1, 2, 6], "mean").tolist() == [-2.0, -1.0, 3.0]


def test_std_divides_by_the_sample_standard_deviation():
    # centred -2, -1, 3; squares 4 + 1 + 9 = 14; over G - 1 = 2: 7
    root = 2.6457513110645907
    np.testing.assert_allclose(
        group_advantages([1, 2, 6], "std", eps=0.0),
        [-2 / root, -1 / root, 3 / root],
        rtol=1e-15,
    )


def test_eps_is_added_to_the_standard_deviation():
    # mean 1/2; variance (1/4 + 1/4) / 1 = 1/2; std 0.70710678; plus 0.5: 1.20710678
    np.testing.assert_allclose(
        group_advantages([0.0, 1.0], "std", eps=0.5),
        [-0.5 / 1.2071067811865475, 0.5 / 1.2071067811865475],
        rtol=1e-15,
    )


def test_leave_one_out_subtracts_the_mean_of_the_others():
    # 1 - (2 + 6) / 2 = -3; 2 - (1 + 6) / 2 = -1.5; 6 - (1 + 2) / 2 = 4.5
    np.testing.assert_allclose(
        group_advantages([1, 2, 6], "leave_one_out"), [-3.0, -1.5, 4.5], rtol=1e-15
    )


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_give_exactly_no_advantage(kind):
    # The float mean of three times 0.1 is not 0.1.
    assert group_advantages([0.1, 0.1, 0.1], kind, eps=0.0).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_one_has_nothing_to_be_compared_with(kind):
    advantages = group_advantages([5.0], kind)
    assert advantages.tolist() == [0.0]
    assert advantages.dtype == np.float64


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_add_up_to_zero(kind):
    rewards = np.random.default_rng(0).normal(size=17)
    assert abs(group_advantages(rewards, kind).sum()) < 1e-13  # 17 roundings of about 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.1e20, -1e300])
def test_a_reward_that_is_no_number_is_named(kind, value):
    with pytest.raises(ValueError, match=re.escape(f"reward of response 2 is {value}")):
        group_advantages([1.0, 0.0, value, 1.0], kind)


@pytest.mark.parametrize(
    ("rewards", "kind", "eps", "message"),
    [
        ([], "std", 1e-6, r"rewards have shape \[0\]"),
        ([[1.0, 2.0]], "std", 1e-6, r"rewards have shape \[1, 2\]"),
        ([1.0], "rloo", 1e-6, r"advantage='rloo': choose one of"),
        ([1.0], "std", -1.0, r"advantage_epsilon=-1\.0"),
    ],
)
def test_wrong_arguments_are_named(rewards, kind, eps, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, kind, eps=eps)

"""Advantages of turns, computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_prefix.objective import group_advantages, turn_advantages

# Five turns of three responses: mean 2, sum of squares 4 + 1 + 1 + 0 + 4.
REWARDS = [np.array([0.0, 1.0]), np.array([3.0]), np.array([2.0, 4.0])]
STD = math.sqrt(10 / 4)


def test_a_turn_gets_the_normalised_rewards_of_itself_and_of_those_after_it():
    found = turn_advantages(REWARDS, "std", of="return", eps=0.0)
    expected = [[-3 / STD, -1 / STD], [1 / STD], [2 / STD, 2 / STD]]
    for values, of_response in zip(found, expected, strict=True):
        assert values == pytest.approx(of_response, abs=1e-15)


def test_or_its_own_reward_alone():
    found = turn_advantages(REWARDS, "mean", of="reward")
    assert [values.tolist() for values in found] == [[-2, -1], [1], [0, 2]]
    found = turn_advantages(REWARDS, "leave_one_out", of="reward")
    # 0 against the mean 2.5 of the four other turns, and so on.
    assert [values.tolist() for values in found] == [[-2.5, -1.25], [1.25], [0, 2.5]]


@pytest.mark.parametrize("kind", ["std", "mean", "leave_one_out"])
@pytest.mark.parametrize("of", ["return", "reward"])
def test_with_one_turn_each_they_are_the_advantages_of_responses(kind, of):
    rewards = np.array([0.5, -1.0, 2.0, 7.25])
    found = turn_advantages(np.split(rewards, 4), kind, of=of)
    assert np.concatenate(found).tolist() == group_advantages(rewards, kind).tolist()


def test_equal_rewards_of_all_turns_teach_nothing():
    found = turn_advantages([np.array([1.0, 1.0]), np.array([1.0])], "std", of="return")
    assert [values.tolist() for values in found] == [[0, 0], [0]]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="turn_advantage='last': choose one of return, reward"):
        turn_advantages(REWARDS, "std", of="last")

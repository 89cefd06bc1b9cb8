"""Rewards by hand, by name and by module; and what is said of one that does not work."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_prefix.rollouts.records import RolloutGroup
from megatron_prefix.rollouts.rewards import (
    REWARDS,
    compute_rewards,
    contains_answer,
    ends_with_answer,
    exact_match,
    load_reward,
    token_match_fraction,
)

GROUP = RolloutGroup(
    prompt=(9,), responses=((1, 2), (3,)), rewards=(), answer=[1, 2], source="file.jsonl:17"
)


@pytest.mark.parametrize(
    ("response", "exact", "fraction", "contains", "ends"),
    [
        ((1, 2), 1, 1, 1, 1),
        ((1, 2, 3), 0, 2 / 3, 1, 0),
        ((3, 1, 2), 0, 0, 1, 1),
        ((1,), 0, 1 / 2, 0, 0),
        ((2,), 0, 0, 0, 0),
        ((1, 3, 2, 4), 0, 1 / 4, 0, 0),
        ((1, 1, 2, 2), 0, 1 / 4, 1, 0),
    ],
)
def test_named_rewards_have_these_values_for_the_answer_1_2(
    response, exact, fraction, contains, ends
):
    for reward, value in (
        (exact_match, exact),
        (token_match_fraction, fraction),
        (contains_answer, contains),
        (ends_with_answer, ends),
    ):
        found = reward((9,), response, [1, 2])
        assert found == value
        assert type(found) is float


def test_a_reward_is_found_by_its_name():
    assert {name: load_reward(name) for name in REWARDS} == REWARDS
    assert load_reward("exact_match") is exact_match


def test_a_reward_is_found_as_module_and_function(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_a_user.py").write_text(
        "def length(prompt, response, answer):\n    return len(response) / 4\n"
        "class Judge:\n    @staticmethod\n    def judge(prompt, response, answer):\n"
        "        return -1\n"
        "number = 3\n"
    )
    (tmp_path / "broken_module_of_a_user.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert compute_rewards(load_reward("rewards_of_a_user:length"), GROUP) == (0.5, 0.25)
    assert compute_rewards(load_reward("rewards_of_a_user:Judge.judge"), GROUP) == (-1.0, -1.0)
    for spec, message in [
        ("rewards_of_a_user:number", "3 is not a function"),
        ("rewards_of_a_user:width", "has no attribute 'width'"),
        ("broken_module_of_a_user:f", "importing broken_module_of_a_user failed: ModuleNotFound"),
        ("no_module_of_a_user:f", "importing no_module_of_a_user failed: ModuleNotFoundError"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            load_reward(spec)
        assert str(caught.value).startswith(f"reward '{spec}': ")


@pytest.mark.parametrize("spec", ["exact_mtch", "", ":", "module:", ":function"])
def test_an_unknown_name_lists_those_that_there_are(spec):
    with pytest.raises(ValueError) as caught:
        load_reward(spec)
    assert str(caught.value) == (
        f"reward {spec!r}: name one of exact_match, token_match_fraction, contains_answer, "
        "ends_with_answer, numeric, multiple_choice, math, reasoning_gym, or a function of yours "
        "as module:function"
    )


def raising(prompt, response, answer):
    return 1.0 if len(response) == 2 else {}["key"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "returned nan; it must return a finite number"),
        (-math.inf, "returned -inf; it must return a finite number"),
        (10**400, "returned 1000"),
        (None, "returned None, a NoneType; it must return a float"),
        ("1", "returned '1', a str; it must return a float"),
        (True, "returned True, a bool; it must return a float"),
        (np.float32(1), "a float32; it must return a float"),
    ],
)
def test_a_reward_that_returns_no_finite_number_is_named(value, message):
    def bad(prompt, response, answer):
        return 1.0 if len(response) == 2 else value

    with pytest.raises(ValueError) as caught:
        compute_rewards(bad, GROUP)
    text = str(caught.value)
    assert text.startswith(f"file.jsonl:17: responses[1]: reward {__name__}:")
    assert "bad returned" in text
    assert message in text


def test_a_reward_that_raises_is_named_and_its_error_stays_the_cause():
    with pytest.raises(ValueError) as caught:
        compute_rewards(raising, GROUP)
    assert str(caught.value) == (
        f"file.jsonl:17: responses[1]: reward {__name__}:raising failed: KeyError: 'key'"
    )
    assert isinstance(caught.value.__cause__, KeyError)


class Constant:
    def __call__(self, prompt, response, answer):
        return np.float64(2)


def test_any_callable_will_do_and_whole_numbers_become_floats():
    assert compute_rewards(Constant(), GROUP) == (2.0, 2.0)
    values = compute_rewards(lambda prompt, response, answer: 1, GROUP)
    assert values == (1.0, 1.0)
    assert type(values[0]) is float


@pytest.mark.parametrize("answer", [None, "1 2", [], [1.0], [True], 3, {"tokens": [1]}])
@pytest.mark.parametrize("reward", REWARDS.values(), ids=REWARDS)
def test_named_rewards_want_the_answer_as_token_ids(reward, answer):
    with pytest.raises(ValueError, match="it compares with the answer's token ids; answer is"):
        reward((9,), (1, 2), answer)

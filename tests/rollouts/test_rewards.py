"""Rewards by hand, by name and by module; and what is said of one that does not work."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_prefix.config import RewardProcessConfig
from megatron_prefix.rollouts.records import RolloutGroup
from megatron_prefix.rollouts.rewards import (
    REWARDS,
    close_reward,
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
        (
            "no_module_of_a_user:f",
            "importing no_module_of_a_user failed: ModuleNotFoundError: No module named "
            f"'no_module_of_a_user'; looked for in .*{tmp_path}.*, the installed packages",
        ),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            load_reward(spec)
        assert str(caught.value).startswith(f"reward '{spec}': ")


FUNCTIONS = """
import decimal, numpy, torch
RESULTS = [True, numpy.float32(1), torch.ones(()), decimal.Decimal(1), None, {"reward": 1}, [1.0]]

def chosen(prompt, response, answer):
    return RESULTS[answer]

def level(prompt, response, answer, record):
    return record["level"] * len(response)

def together(prompts, responses, answers, records):
    assert len(prompts) == len(answers) == len(records)
    return numpy.array([len(r) + record["level"] for r, record in zip(responses, records)])

def too_few(prompts, responses, answers):
    return [1.0]

def one_bad(prompts, responses, answers):
    return [1.0, float("nan")]
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "functions_of_a_user.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    return "functions_of_a_user"


def test_numbers_of_any_library_are_rewards_and_anything_else_is_an_error(functions):
    """Also where a call that fails has a value: what it returned is not a failure."""
    process = RewardProcessConfig(processes=1, timeout_s=60.0, on_failure=0.0)
    reward = load_reward(f"{functions}:chosen", process=process)
    for answer in range(4):
        assert compute_rewards(reward, dataclasses.replace(GROUP, answer=answer)) == (1.0, 1.0)
    for answer, shown in [
        (4, "None, a NoneType"),
        (5, "{'reward': 1}, a dict"),
        (6, "[1.0], a li"),
    ]:
        with pytest.raises(ValueError) as caught:
            compute_rewards(reward, dataclasses.replace(GROUP, answer=answer))
        assert str(caught.value).startswith("file.jsonl:17: responses[0]: reward functions_of_a_us")
        assert f"returned {shown}" in str(caught.value)
    close_reward(reward)


def test_a_function_may_take_the_records_other_fields_and_many_responses_at_once(functions):
    group = dataclasses.replace(GROUP, record={"level": 3})
    process = RewardProcessConfig(processes=1, timeout_s=60.0)
    found = {}
    for name in ("level", "together"):
        reward = load_reward(f"{functions}:{name}", process=process)
        found[name] = compute_rewards(reward, group)
        close_reward(reward)
    assert found == {"level": (6.0, 3.0), "together": (5.0, 4.0)}
    for name, message in [
        ("too_few", r"responses\[0\]: .* must return a list of 2 numbers"),
        ("one_bad", r"responses\[1\]: .* returned nan; it must return a finite number"),
    ]:
        reward = load_reward(f"{functions}:{name}", process=process)
        with pytest.raises(ValueError, match=f"^file.jsonl:17: {message}"):
            compute_rewards(reward, group)
        close_reward(reward)


@pytest.mark.parametrize("spec", ["exact_mtch", "", ":", "module:", ":function"])
def test_an_unknown_name_lists_those_that_there_are(spec):
    with pytest.raises(ValueError) as caught:
        load_reward(spec)
    assert str(caught.value) == (
        f"reward {spec!r}: name one of exact_match, token_match_fraction, contains_answer, "
        "ends_with_answer, numeric, multiple_choice, math, reasoning_gym, code, or a function of "
        "yours as module:function"
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
        ({"reward": 1}, "returned {'reward': 1}, a dict; it must return a float"),
        (np.ones(1), "a ndarray; it must return a float"),
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
    for one in (1, True, np.float32(1), np.bool_(True), torch.ones(()), Fraction(1)):
        values = compute_rewards(lambda prompt, response, answer, one=one: one, GROUP)
        assert values == (1.0, 1.0)
        assert type(values[0]) is float


@pytest.mark.parametrize("answer", [None, "1 2", [], [1.0], [True], 3, {"tokens": [1]}])
@pytest.mark.parametrize("reward", REWARDS.values(), ids=REWARDS)
def test_named_rewards_want_the_answer_as_token_ids(reward, answer):
    with pytest.raises(ValueError, match="it compares with the answer's token ids; answer is"):
        reward((9,), (1, 2), answer)

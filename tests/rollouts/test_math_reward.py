"""The reward `math`: mathematically equal answers, in a process that no response can hold up."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator

import pytest

from megatron_prefix.config import RewardProcessConfig
from megatron_prefix.rollouts.names import LIBRARY_REWARDS
from megatron_prefix.rollouts.records import RolloutGroup
from megatron_prefix.rollouts.rewards import close_reward, load_reward, reward_groups
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
from megatron_prefix.rollouts.user_process import CallFailed, UserFunction
from tests.rollouts.servers import save_word_tokenizer


@pytest.fixture(scope="module")
def math_equal() -> Iterator[UserFunction]:
    function = UserFunction(LIBRARY_REWARDS["math"].function, processes=1, timeout_s=60)
    yield function
    function.close()


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("#### Step 1: April\n48\n#### Step 2: May\n24\n\nTotal: \\boxed{72}", "72", 1),
        (r"\boxed{\$70{,}000}", "70000", 1),
        (r"\boxed{10,\!080}", "10080", 1),
        (r"\boxed{\frac{1}{4}}", r"\frac{3}{4}", 0),
        (r"\boxed{\frac{3}{4}}", r"\frac{3}{4}", 1),
        ("#### 1/2", "1/2", 1),
        ("The change is \N{MINUS SIGN}3", "-3", 1),
        ("The change is 3", "-3", 0),
        ("#### 5 + 6 = 11", "11", 1),
        (r"\boxed{0.5}", "1/2", 1),
        (r"\boxed{3\sqrt{2}}", r"\sqrt{18}", 1),
        ("so it is $x^2 + 2x + 1$", "(x+1)^2", 1),
        (r"\boxed{x = 5}", "5", 1),
        ("the answer is 70,000.", 70000, 1),
        ("#### 72 apples", "5 + 67 = <<5+67=72>>72.\n#### 72", 1),
        ("she has 3, then 4", 4.0, 1),
        (r"first \boxed{4}, no: \boxed{5}", "5", 1),
        ("#### 3:4", "3:4", 1),
        ("nothing", "3", 0),
        ("", "3", 0),
        ("(" * 5000, "3", 0),
    ],
)
def test_a_response_is_right_where_its_answer_is_equal(math_equal, response, answer, reward):
    assert math_equal("", response, answer) == {"value": reward}


@pytest.mark.parametrize(
    "answer", [{"ground_truth": "34", "style": "rule-lighteval/MATH_v2"}, "NaN", None, math.nan, ""]
)
def test_an_answer_that_is_no_expression_is_refused(math_equal, answer):
    with pytest.raises(CallFailed, match=r"it compares with .*; answer is "):
        math_equal("", "34", answer)


HOSTILE = ["9^9^9^9", r"\boxed{9^{9^{9^9}}}", r"\boxed{10000000!}", r"\boxed{2^{10000000000}}"]


def test_a_response_that_never_ends_is_wrong_and_the_next_is_scored(tmp_path):
    words = [*HOSTILE, r"\boxed{4}", ";", "?"]
    tokenizer = TextTokenizer(save_word_tokenizer(tmp_path, words, ";"), vocab_size=len(words))
    process = RewardProcessConfig(processes=1, timeout_s=5)
    reward = load_reward("math", tokenizer=tokenizer, process=process)
    group = RolloutGroup(
        prompt=(6,),
        responses=tuple((i,) for i in range(len(HOSTILE) + 1)),
        rewards=(),
        answer="4",
        source="file.jsonl:17",
    )
    began = time.monotonic()
    try:
        assert reward_groups(reward, [group]) == [(0.0,) * len(HOSTILE) + (1.0,)]
    finally:
        close_reward(reward)
    assert time.monotonic() - began < 20 * len(HOSTILE)


def test_a_missing_library_is_named_with_what_to_install(tmp_path, monkeypatch):
    tokenizer = TextTokenizer(save_word_tokenizer(tmp_path, ["1", ";", "?"], ";"), vocab_size=3)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError) as caught:
        load_reward("math", tokenizer=tokenizer)
    assert str(caught.value) == (
        "reward 'math' needs math-verify, which is not installed; "
        "pip install 'megatron-prefix[math]'"
    )
    with pytest.raises(ValueError, match=r"reward 'math': it reads text; set rollouts.text"):
        load_reward("math")

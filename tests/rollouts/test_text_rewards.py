"""Rewards that read text, and rewards that run in processes of their own."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest

from megatron_prefix.config import RewardProcessConfig
from megatron_prefix.rollouts.records import RolloutGroup
from megatron_prefix.rollouts.reward_process import ProcessReward
from megatron_prefix.rollouts.rewards import (
    close_reward,
    compute_rewards,
    load_reward,
    reward_groups,
)
from megatron_prefix.rollouts.text.rewards import exact_match, multiple_choice, numeric
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
from tests.rollouts.servers import save_word_tokenizer

WORDS = ["good", "hang", "crash", "raise", "the", "end", ";", "?"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    folder = save_word_tokenizer(tmp_path_factory.mktemp("tokenizer"), WORDS, ";")
    return TextTokenizer(folder, vocab_size=8)


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("The answer is 42.", "42", 1),
        ("5 apples and 6 pears\n#### 11", "She has 5 + 6 = <<5+6=11>>11.\n#### 11", 1),
        ("first 11, but then\n#### 12", "#### 11", 0),
        ("#### 1,234 dollars of 9", 1234, 1),
        (r"so \boxed{-3.50} of 7", "-3.5", 1),
        ("it costs $1,000.00", "1000", 1),
        ("1e3", 1000, 1),
        ("none", "7", 0),
        ("3.14159", "3.14", 0),
        ("2/3", "2/3", 1),
        ("#### Step 1: April\n48\n#### Step 2: May\n24\n\nTotal: \\boxed{72}", "72", 1),
        (r"\boxed{\$70{,}000}", "70000", 1),
        (r"\boxed{10,\!080}", "10080", 1),
        (r"\boxed{\frac{1}{4}}", r"\frac{3}{4}", 0),
        (r"\boxed{3\frac{1}{2}}", 3.5, 1),
        (r"\boxed{\sqrt{2}}", "2", 0),
        (r"\boxed{x = 5 \text{ apples}}", 5, 1),
        (r"\boxed{72\ \text{km/h}}", 72, 1),
        (r"\boxed{3\text{ m}^2}", 3, 1),
        (r"\boxed{-10^{3}}", -1000, 1),
        (r"1.5 \times 10^3", 1500, 1),
        (r"\boxed{2^{10}}", 10, 0),
        (r"\boxed{7!}", 7, 0),
        ("#### 1/2", "1/2", 1),
        ("#### Final answer\n72", "72", 1),
        ("The change is \N{MINUS SIGN}3", "-3", 1),
        ("#### 5 + 6 = 11", "11", 1),
        ("pages 10-12", "12", 1),
        ("on 3/4/2024", "2024", 1),
        ("1/0", "0", 0),
        ("1e999999999", "1", 0),
    ],
)
def test_a_numeric_reward_compares_the_number_that_a_response_ends_in(response, answer, reward):
    assert numeric("", response, answer) == reward


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("B", "B", 1),
        ("The answer is (B).", "B", 1),
        ("A or B? I say A.", "B", 0),
        (r"C ... \boxed{D}, not B", "D", 1),
        ("It's A bad Choice", "A", 1),
        ("", "A", 0),
        ("Yes", {"choices": ["yes", "no"], "answer": "yes"}, 1),
        ("no, I mean yes", {"choices": ["yes", "no"], "answer": "no"}, 0),
        (
            "not_entailment",
            {"choices": ["entailment", "not_entailment"], "answer": "entailment"},
            0,
        ),
        (
            "not entailment",
            {"choices": ["entailment", "not entailment"], "answer": "not entailment"},
            1,
        ),
        ("maybe", {"choices": ["yes", "no"], "answer": "no"}, 0),
    ],
)
def test_a_multiple_choice_reward_takes_the_last_choice_named(response, answer, reward):
    assert multiple_choice("", response, answer) == reward


def test_an_exact_match_of_text_overlooks_white_space_only():
    assert exact_match("", " two  words\n", "two words") == 1
    assert exact_match("", "Two words", "two words") == 0


@pytest.mark.parametrize(
    ("reward", "answer", "message"),
    [
        (numeric, "none", "it compares with a number; answer is 'none'"),
        (numeric, {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"}, "compares with a num"),
        (numeric, "NaN", "it compares with a number; answer is 'NaN'"),
        (numeric, float("nan"), "it compares with a number; answer is nan"),
        (numeric, True, "it compares with a number; answer is True"),
        (numeric, r"2\sqrt{3}", "it compares with a number; answer is "),
        (multiple_choice, "b", "a capital letter or with an answer out of choices; answer is 'b'"),
        (multiple_choice, {"choices": ["a"], "answer": "b"}, "answer out of choices"),
        (exact_match, 3, "it compares with the answer's text; answer is 3"),
    ],
)
def test_an_answer_that_fits_no_text_reward_is_shown(reward, answer, message):
    with pytest.raises(ValueError, match=message):
        reward("", "1", answer)


def test_with_a_tokenizer_rewards_read_text_without_special_tokens(tokenizer):
    group = RolloutGroup(
        prompt=(4, 5), responses=((4, 5, 6), (5, 6)), rewards=(), answer="the end", source="f:1"
    )
    reward = load_reward("exact_match", tokenizer=tokenizer)
    assert compute_rewards(reward, group) == (1, 0)
    # Answers that are token ids stay so.
    of_tokens = dataclasses.replace(group, answer=[5, 6])
    assert compute_rewards(reward, of_tokens) == (0, 1)
    reward = load_reward("numeric", tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"^f:1: responses\[0\]: reward numeric failed: Value"):
        compute_rewards(reward, group)
    with pytest.raises(ValueError, match=r"reward 'numeric': it reads text; set rollouts.text.tok"):
        load_reward("numeric")


def group_of(*responses: str) -> RolloutGroup:
    return RolloutGroup(
        prompt=(4, 5),
        responses=tuple((WORDS.index(word), 6) for word in responses),
        rewards=(0.0,) * len(responses),
        answer="end",
        source="file.jsonl:17",
    )


def process_reward(tokenizer: TextTokenizer, **options) -> ProcessReward:
    config = RewardProcessConfig(timeout_s=1.0, **options)
    return load_reward("tests.rollouts.user_rewards:shout", tokenizer=tokenizer, process=config)


def test_a_reward_that_hangs_or_crashes_ends_its_own_process_only(tokenizer, capfd):
    reward = process_reward(tokenizer, on_failure=-1.0)
    groups = [group_of("hang", "good", "crash", "good"), group_of("raise", "good", "hang", "good")]
    started = time.monotonic()
    assert reward_groups(reward, groups) == [(-1, 1, -1, 1)] * 2
    # Two processes side by side, two calls that hang for a second.
    assert time.monotonic() - started < 8
    assert reward.failures == 4
    assert reward_groups(reward, [group_of("good")]) == [(1,)]
    close_reward(reward)
    # Closed, it starts again when it is needed.
    assert reward((4, 5), (0, 6), "other") == 0.5
    close_reward(reward)
    assert "to standard output" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("hang", r"the call \(limit 1 s\) took too long; its process was ended"),
        ("crash", r"its process ended in the call \(limit 1 s\) \(signal 6\)"),
        ("raise", "failed: KeyError: 'the end'"),
    ],
)
def test_a_reward_that_fails_names_the_record_unless_it_has_a_value(tokenizer, word, message):
    reward = process_reward(tokenizer)
    with pytest.raises(ValueError, match=message) as caught:
        compute_rewards(reward, group_of("good", word))
    where = "file.jsonl:17: responses[1]: reward tests.rollouts.user_rewards:shout "
    assert str(caught.value).startswith(where)
    close_reward(reward)


def test_a_reward_process_outlives_what_asks_the_run_to_stop(tokenizer):
    reward = process_reward(tokenizer)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        worker = reward._function._idle.get()
        worker._process.send_signal(number)
        reward._function._idle.put(worker)
        assert compute_rewards(reward, group_of("good")) == (1,)
    close_reward(reward)


def test_a_reward_process_ends_with_the_process_that_started_it(tokenizer):
    reward = process_reward(tokenizer)
    worker = reward._function._idle.get()
    worker._calls.close()
    assert worker._process.wait(timeout=10) == 0
    reward._function._idle.put(None)


def test_a_reward_of_the_folder_that_a_run_is_started_in_is_found(tmp_path, monkeypatch):
    (tmp_path / "local_reward.py").write_text("def one(prompt, response, answer): return 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    reward = load_reward("local_reward:one")
    assert reward((1,), (2,), None) == 1.0
    assert Path(os.getcwd()) == tmp_path
    close_reward(reward)

"""A config fills in what goes with its name, and says what is wrong with it."""

from __future__ import annotations

import dataclasses
import math

import pytest

from megatron_prefix.objective import ObjectiveConfig


@pytest.mark.parametrize(
    ("name", "advantage", "clip_low", "clip_high", "aggregation"),
    [
        ("grpo", "std", 0.2, 0.2, "sequence_mean"),
        ("dr_grpo", "mean", 0.2, 0.2, "constant"),
        ("dapo", "std", 0.2, 0.28, "token_mean"),
        ("gspo", "std", 3e-4, 4e-4, "sequence_mean"),
        ("cispo", "std", 1.0, 4.0, "token_mean"),
    ],
)
def test_a_name_brings_its_defaults(name, advantage, clip_low, clip_high, aggregation):
    length = 16 if name == "dr_grpo" else None
    config = ObjectiveConfig(name=name, max_response_length=length).resolved()
    assert config == ObjectiveConfig(
        name=name,
        advantage=advantage,
        clip_low=clip_low,
        clip_high=clip_high,
        aggregation=aggregation,
        max_response_length=length,
    )
    assert config.resolved() == config


def test_what_is_set_stays_as_it_is_set():
    given = ObjectiveConfig(
        name="gspo",
        advantage="leave_one_out",
        clip_low=0.0,
        clip_high=0.5,
        aggregation="token_mean",
    )
    assert given.resolved() == given


def test_defaults_follow_the_name_when_it_is_replaced():
    config = dataclasses.replace(ObjectiveConfig(name="grpo"), name="dapo")
    assert config.resolved().clip_high == 0.28


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "ppo"}, r"name='ppo': choose one of grpo, dr_grpo, dapo, gspo, cispo"),
        ({"advantage": "gae"}, r"advantage='gae': choose one of std, mean, leave_one_out"),
        ({"aggregation": "sum"}, r"aggregation='sum': choose one of sequence_mean, token_mean"),
        ({"kl_estimator": "k4"}, r"kl_estimator='k4': choose one of k1, k2, k3"),
        ({"clip_low": 1.5}, r"clip_low=1\.5: set a number from 0 to 1"),
        ({"clip_low": -0.1}, r"clip_low=-0\.1: set"),
        ({"clip_high": -1.0}, r"clip_high=-1\.0: set a number of at least 0"),
        ({"clip_high": math.nan}, r"clip_high=nan: set"),
        ({"kl_coefficient": -0.1}, r"kl_coefficient=-0\.1: set a number of at least 0"),
        ({"entropy_coefficient": math.inf}, r"entropy_coefficient=inf: set"),
        ({"advantage_epsilon": -1e-9}, r"advantage_epsilon=-1e-09: set"),
        ({"temperature": 0.0}, r"temperature=0\.0: set a number above 0"),
        ({"name": "dr_grpo"}, r"max_response_length=None.*set max_response_length to"),
        ({"aggregation": "constant"}, r"max_response_length=None.*divides by it"),
        (
            {"name": "dr_grpo", "max_response_length": 0},
            r"max_response_length=0: set a whole number of tokens",
        ),
        (
            {"name": "dapo", "max_response_length": 9},
            r"max_response_length=9 is not used by aggregation 'token_mean'",
        ),
    ],
)
def test_a_wrong_option_is_named_with_its_value_and_what_would_do(options, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**options)

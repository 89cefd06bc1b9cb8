"""A config fills in what goes with its name, and says what is wrong with it."""

from __future__ import annotations

import dataclasses
import math

import pytest

from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.objective.options import CorrectionConfig, OverlongConfig


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


def test_the_kl_coefficient_moves_evenly_to_its_final_value():
    config = ObjectiveConfig(kl_coefficient=0.4, kl_final_coefficient=0.0, kl_decay_steps=4)
    found = [config.at_step(step).kl_coefficient for step in range(1, 8)]
    assert found == pytest.approx([0.4, 0.3, 0.2, 0.1, 0, 0, 0])
    assert ObjectiveConfig(kl_coefficient=0.4).at_step(9).kl_coefficient == 0.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "ppo"}, r"name='ppo': choose one of grpo, dr_grpo, dapo, gspo, cispo"),
        ({"advantage": "gae"}, r"advantage='gae': choose one of std, mean, leave_one_out"),
        ({"aggregation": "sum"}, r"aggregation='sum': choose one of sequence_mean, token_mean"),
        ({"kl_estimator": "k4"}, r"kl_estimator='k4': choose one of k1, k2, k3"),
        ({"clip_low": 1.5}, r"clip_low=1\.5: set a number from 0 to 1"),
        ({"clip_low": -0.1}, r"clip_low=-0\.1: set"),
        ({"clip_high": -1.0}, r"clip_high=-1\.0: set a number from 0 to"),
        ({"clip_high": math.nan}, r"clip_high=nan: set"),
        ({"clip_high": 1e7}, r"clip_high=10000000\.0: set a number from 0 to 1e\+06"),
        ({"reward_weights": {}}, r"reward_weights=\{\}: set at least one weight that is not 0"),
        ({"reward_weights": {"a": 0.0}}, r"reward_weights=\{'a': 0\.0\}: set at least one"),
        ({"reward_weights": {"a": math.inf}}, r"reward_weights\.a=inf: set a finite number"),
        (
            {"name": "supervised", "correction": CorrectionConfig()},
            r"correction=CorrectionConfig\(.*\) is not used by name='supervised'",
        ),
        ({"kl_coefficient": -0.1}, r"kl_coefficient=-0\.1: set a number of at least 0"),
        (
            {"kl_coefficient": 0.1, "reference_refresh_steps": 0},
            r"reference_refresh_steps=0: set a whole number",
        ),
        ({"reference_refresh_steps": 4}, r"reference_refresh_steps=4 with kl_coefficient=0"),
        ({"kl_in": "advantage"}, r"kl_in='advantage': choose one of loss, reward"),
        ({"kl_in": "reward"}, r"kl_in='reward' with kl_coefficient=0"),
        (
            {"name": "supervised", "kl_in": "reward", "kl_coefficient": 0.1},
            r"kl_in='reward' is not used by name='supervised'",
        ),
        ({"kl_decay_steps": 4}, r"kl_final_coefficient=None and kl_decay_steps=4 go together"),
        (
            {"kl_coefficient": 0.1, "kl_final_coefficient": -1.0, "kl_decay_steps": 4},
            r"kl_final_coefficient=-1\.0: set a number of at least 0",
        ),
        (
            {"kl_coefficient": 0.1, "kl_final_coefficient": 0.0, "kl_decay_steps": 0},
            r"kl_decay_steps=0: set a whole number",
        ),
        (
            {"kl_final_coefficient": 0.1, "kl_decay_steps": 4},
            r"kl_coefficient=0\.0: set a number above 0, from which",
        ),
        ({"entropy_coefficient": math.inf}, r"entropy_coefficient=inf: set"),
        ({"advantage_epsilon": -1e-9}, r"advantage_epsilon=-1e-09: set"),
        ({"temperature": 0.0}, r"temperature=0\.0: set a number above 0"),
        ({"dual_clip": 1.0}, r"dual_clip=1\.0: set a number above 1"),
        ({"dual_clip": 1e7}, r"dual_clip=10000000\.0: set a number above 1, at most 1e\+06"),
        ({"name": "cispo", "dual_clip": 3.0}, r"dual_clip=3\.0 is not used by name='cispo'"),
        ({"zero_advantages": "drop"}, r"zero_advantages='drop': choose one of keep, skip"),
        ({"resample_limit": 0}, r"resample_limit=0: set a whole number"),
        (
            {"zero_advantages": "skip", "kl_coefficient": 0.1},
            r"zero_advantages='skip' with kl_coefficient=0\.1",
        ),
        (
            {"zero_advantages": "skip", "entropy_coefficient": 0.1},
            r"zero_advantages='skip' with entropy_coefficient=0\.1",
        ),
        (
            {"name": "supervised", "zero_advantages": "skip"},
            r"zero_advantages='skip' is not used by name='supervised'",
        ),
        (
            {
                "name": "supervised",
                "overlong": OverlongConfig(kind="penalty", length=8, buffer=4),
            },
            r"overlong\.kind='penalty' is not used by name='supervised'",
        ),
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

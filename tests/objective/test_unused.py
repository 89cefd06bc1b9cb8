"""Every option with every objective: it is refused by name, or it changes what is trained on."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import numpy as np
import pytest
import torch

from megatron_prefix.objective import (
    ObjectiveConfig,
    group_terms,
    policy_loss,
    token_weights,
    turn_advantages,
)
from megatron_prefix.objective.choices import ObjectiveName
from megatron_prefix.objective.options import CorrectionConfig, OverlongConfig
from megatron_prefix.objective.unused import unused_options

NAMES = get_args(ObjectiveName)

# Beside what each option needs: another option's value.
WITH_KL = {"kl_coefficient": 0.1}
OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "advantage": ("leave_one_out", {}),
    "turn_advantage": ("reward", {}),
    "advantage_epsilon": (0.5, {}),
    "clip_low": (0.05, {}),
    "clip_high": (0.05, {}),
    "dual_clip": (1.1, {}),
    "aggregation": ("sequence_mean", {}),
    "max_response_length": (9, {}),
    "kl_coefficient": (0.1, {}),
    "kl_estimator": ("k2", WITH_KL),
    "entropy_coefficient": (0.1, {}),
    "correction": (CorrectionConfig(level="sequence"), {}),
    "zero_advantages": ("skip", {}),
    "overlong": (OverlongConfig(kind="mask"), {}),
}

SCHEDULE = {"kl_final_coefficient": 0.0, "kl_decay_steps": 2}

# What the trainer does with these is tested with the trainer.
OF_THE_TRAINER = {
    "kl_in": ("reward", WITH_KL),
    "reference_refresh_steps": (2, WITH_KL),
    **{option: (value, {**WITH_KL, **SCHEDULE}) for option, value in SCHEDULE.items()},
    "resample_limit": (2, {"zero_advantages": "resample"}),
    "report_entropy": (True, {}),
    "temperature": (0.5, {}),
    "reward_weights": ({"right": 1.0}, {}),
}

REFUSED = {
    *(("max_response_length", name) for name in NAMES if name != "dr_grpo"),
    ("advantage_epsilon", "dr_grpo"),
    ("dual_clip", "cispo"),
    *(
        (option, "supervised")
        for option in (
            "advantage",
            "turn_advantage",
            "advantage_epsilon",
            "clip_low",
            "clip_high",
            "dual_clip",
            "correction",
            "zero_advantages",
            "kl_in",
            "resample_limit",
        )
    ),
}


def _options(name: str, option: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those without the option, and those with it."""
    value, others = {**OPTIONS, **OF_THE_TRAINER}[option]
    without = {"name": name, **others}
    if option in SCHEDULE:
        without = {"name": name, **WITH_KL}
    if name == "dr_grpo":
        without["max_response_length"] = 8
    with_it = {**without, **others, option: value}
    if option == "aggregation":
        with_it.pop("max_response_length", None)
        # Every default is another one.
        with_it["aggregation"] = "token_mean" if name in ("grpo", "gspo") else "sequence_mean"
    return without, with_it


def _outcome(config: ObjectiveConfig) -> list[float]:
    """Filters and loss of a group with advantages and ratios of either sign, and of a dull group;
    and advantages of turns."""
    config = config.resolved()
    lengths = np.array([2, 3, 2, 3])
    finished = np.array([1, 0, 1, 1], dtype=np.int8)
    groups = [
        group_terms(np.array(rewards), lengths, finished, config)
        for rewards in ([1.0, 0.0, 0.2, 0.9], [1.0] * 4)
    ]
    trained = np.concatenate([of.trained for of in groups])
    lengths = np.tile(lengths, 2)
    weights = np.zeros(8)
    weights[trained] = token_weights(
        lengths[trained], config.aggregation, max_response_length=config.max_response_length
    )
    ids = torch.from_numpy(np.repeat(np.arange(8), lengths))
    ratios = torch.tensor([2.0, 0.5, 2.0, 0.5] * 2, dtype=torch.float64)[ids]
    logprobs = torch.linspace(-2.0, -1.0, len(ids), dtype=torch.float64, requires_grad=True)
    current = logprobs.detach()
    loss, _ = policy_loss(
        logprobs,
        old_logprobs=current - ratios.log(),
        sampled_logprobs=None if config.correction is None else current - 2.2,
        reference_logprobs=current - 0.3,
        entropy=0.5 * logprobs,
        advantages=torch.from_numpy(np.concatenate([of.advantages for of in groups]))[ids],
        weights=torch.from_numpy(weights)[ids],
        sequence_ids=ids,
        num_sequences=8,
        config=config,
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    turns = turn_advantages(
        [np.array([1.0, 0.0]), np.array([0.5, 0.2])], config.advantage, of=config.turn_advantage
    )
    return [
        loss.item(),
        *gradient.tolist(),
        *trained,
        *np.concatenate([of.computed for of in groups]),
        *np.concatenate(turns),
    ]


def _faults(options: dict[str, Any]) -> list[str]:
    """What a run would be refused for."""
    try:
        return list(unused_options(ObjectiveConfig(**options)))
    except ValueError as error:
        return [str(error)]


def test_every_option_stands_here() -> None:
    fields = {field.name for field in dataclasses.fields(ObjectiveConfig)}
    assert fields == {"name", *OPTIONS, *OF_THE_TRAINER}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", [*OPTIONS, *OF_THE_TRAINER])
def test_an_option_is_refused_by_name_or_changes_what_is_trained_on(option: str, name: str) -> None:
    without, with_it = _options(name, option)
    faults = _faults(with_it)
    if (option, name) in REFUSED:
        # resample_limit comes with zero_advantages: resample, which is refused before it.
        named = "zero_advantages" if option == "resample_limit" else option
        assert any(named in fault for fault in faults)
        return
    assert not faults and not _faults(without)
    if option in OPTIONS:
        assert _outcome(ObjectiveConfig(**with_it)) != _outcome(ObjectiveConfig(**without))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_estimator": "k2"}, "kl_estimator: k2 is not used with kl_coefficient: 0, which has"),
        ({"resample_limit": 5}, "resample_limit: 5 is not used with zero_advantages: keep; remove"),
        (
            {"advantage": "mean", "advantage_epsilon": 0.1},
            "advantage_epsilon: 0.1 is not used with advantage: mean; remove it",
        ),
        (
            {"name": "supervised", "clip_high": 0.2},
            "clip_high: 0.2 is not used with objective.name",
        ),
    ],
)
def test_what_is_set_for_nothing_is_named(options: dict[str, Any], message: str) -> None:
    (fault,) = _faults(options)
    assert fault.startswith(message)


def test_what_a_run_fills_in_by_itself_is_not_refused() -> None:
    """Its config.yaml can be its next run's file."""
    for name in NAMES:
        length = 8 if name == "dr_grpo" else None
        config = ObjectiveConfig(name=name, max_response_length=length)
        assert not [*unused_options(config)]
    decayed = ObjectiveConfig(
        kl_coefficient=0.1, kl_final_coefficient=0.0, kl_decay_steps=1, kl_estimator="k2"
    ).at_step(3)
    assert (decayed.kl_coefficient, decayed.kl_estimator) == (0, "k2")

"""Rewards of turns and advantages of tokens reach the entries that they belong to."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from megatron_prefix.config import ParallelConfig
from megatron_prefix.config.packing import packing_of_run
from megatron_prefix.layout import ModelShape
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup
from megatron_prefix.training.minibatch import build_minibatch
from megatron_prefix.training.token_advantages import with_token_advantages
from tests.megatron.models import ON_CPU, TRAINING

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=32,
    gated_linear_unit=True,
)
MEAN = ObjectiveConfig(name="dapo", advantage="mean")
TURNS = RolloutGroup(
    prompt=[1, 2],
    responses=[[3, 4, 5, 6, 7], [8, 9], [10]],
    loss_mask=[[True, False, False, True, True], [False, True], [True]],
    rewards=[3.0, 2.0, 0.0],
    turn_rewards=[[1.0, 2.0], [2.0], [-1.0]],
    source="turns",
)
PLAIN = RolloutGroup(prompt=[1], responses=[[2, 3], [4]], rewards=[1.0, 0.0], source="plain")
GIVEN = RolloutGroup(
    prompt=[1],
    responses=[[2, 3], [4]],
    rewards=[1.0, 0.0],
    advantages=[[0.5, -7.0], [1e20]],
    source="given",
)


def _found(groups: list[RolloutGroup], objective: ObjectiveConfig) -> dict[tuple[int, int], Any]:
    """The advantage of each trained token, by response of the batch and token of it."""
    batch = with_token_advantages(RolloutBatch.from_groups(groups), objective)
    training = dataclasses.replace(TRAINING, token_budget=64, share_only_where_it_pays=False)
    minibatch = build_minibatch(
        batch,
        objective,
        packing_of_run(training, ParallelConfig(), model_shape=SHAPE, data_parallel_size=1),
        attention=ON_CPU,
        data_parallel_rank=0,
    )
    found = {}
    for row, slices in zip(
        minibatch.rows, minibatch.step.microbatches.microbatches[0], strict=True
    ):
        names = [minibatch.step.responses_of_unit[s.group][i] for s in slices for i in s.sequences]
        for sequence, token, value in zip(
            row.sequence_ids.tolist(),
            row.sequence_tokens.tolist(),
            row.advantages.tolist(),
            strict=True,
        ):
            found[names[sequence], token] = value
    return found


def test_turns_tokens_and_responses_have_advantages_side_by_side() -> None:
    # Rewards 1, 2, 2, -1 of four turns, with mean 1.
    turns = {(0, 0): 0 + 1, (0, 3): 1, (0, 4): 1, (1, 1): 1, (2, 0): -2}
    plain = {(3, 0): 0.5, (3, 1): 0.5, (4, 0): -0.5}
    given = {(5, 0): 0.5, (5, 1): -7.0, (6, 0): 1e20}
    assert _found([TURNS, PLAIN, GIVEN], MEAN) == {**turns, **plain, **given}
    own = dataclasses.replace(MEAN, turn_advantage="reward")
    assert _found([TURNS], own) == {**turns, (0, 0): 0}


def test_every_rank_knows_the_advantage_that_is_farthest_from_0() -> None:
    batch = with_token_advantages(RolloutBatch.from_groups([TURNS, PLAIN, GIVEN]), MEAN)
    largest = batch.summary().largest_advantages
    assert largest is not None
    np.testing.assert_array_equal(largest, [1, 1, -2, np.nan, np.nan, -7, 1e20])
    ignored = dataclasses.replace(
        GIVEN, loss_mask=[[True, False], [True]], advantages=[[0.0, 5.0], [0.0]]
    )
    summary = RolloutBatch.from_groups([ignored]).summary()
    assert summary.largest_advantages is not None
    assert summary.largest_advantages.tolist() == [0, 0]
    assert RolloutBatch.from_groups([PLAIN]).summary().largest_advantages is None


@pytest.mark.parametrize("group", [TURNS, GIVEN])
def test_an_objective_without_advantages_refuses_them(group: RolloutGroup) -> None:
    batch = RolloutBatch.from_groups([PLAIN, group])
    message = rf"{group.source}: responses\[0\]: it has advantages or turn_rewards, which objective"
    with pytest.raises(ValueError, match=message):
        with_token_advantages(batch, ObjectiveConfig(name="supervised"))


def test_supervised_refuses_old_log_probabilities() -> None:
    group = dataclasses.replace(
        PLAIN, old_logprobs=[[-1.0] * len(response) for response in PLAIN.responses]
    )
    batch = RolloutBatch.from_groups([group])
    with pytest.raises(ValueError, match=f"{PLAIN.source}: old_logprobs: given, but objective.nam"):
        with_token_advantages(batch, ObjectiveConfig(name="supervised"))
    assert with_token_advantages(batch, ObjectiveConfig()) is batch


def test_a_ratio_of_whole_responses_refuses_advantages_that_differ_within_one() -> None:
    objective = ObjectiveConfig(name="gspo", turn_advantage="reward")
    batch = RolloutBatch.from_groups([PLAIN, TURNS])
    with pytest.raises(ValueError, match=r"turns: responses\[0\]: its tokens have different adv"):
        with_token_advantages(batch, objective)
    alike = dataclasses.replace(
        TURNS, turn_rewards=[[1.0, 1.0], [2.0], [0.5]], advantages=None, source="alike"
    )
    assert with_token_advantages(RolloutBatch.from_groups([alike]), objective).turn_rewards is None

"""The plan of a rollout batch comes from lengths and rewards, and gives every response a rank."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from megatron_prefix.layout import ModelShape, Packing
from megatron_prefix.objective import ObjectiveConfig, group_advantages, token_weights
from megatron_prefix.objective.options import OverlongConfig
from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup, RolloutSummary
from megatron_prefix.training.step_plan import plan_rollouts

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=64,
    gated_linear_unit=True,
)
PACKING = Packing(
    token_budget=64,
    data_parallel_size=3,
    model_shape=SHAPE,
    pad_to_multiple=2,
    microbatch_multiple=1,
    allow_split=True,
    sharing="groups",
    trim_last_layer=True,
    share_only_where_it_pays=False,
    share_across_microbatches=False,
)
LENGTHS = [(9, [4, 7, 5]), (1, [6, 2]), (40, [20, 20, 20, 3]), (5, [1]), (12, [8, 8])]


def _summary(**changes: Any) -> RolloutSummary:
    rng = np.random.default_rng(0)
    groups = [
        RolloutGroup(
            prompt=[1] * prompt,
            responses=[[2] * n for n in lengths],
            rewards=rng.normal(size=len(lengths)),
            source=f"file.jsonl:{index}",
        )
        for index, (prompt, lengths) in enumerate(LENGTHS)
    ]
    return dataclasses.replace(RolloutBatch.from_groups(groups).summary(), **changes)


@pytest.mark.parametrize("sharing", ["groups", "everything", "none"])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_every_response_is_in_one_share_and_one_microbatch(sharing: Any, num_steps: int) -> None:
    summary = _summary()
    packing = dataclasses.replace(PACKING, sharing=sharing)
    plan = plan_rollouts(summary, ObjectiveConfig(), packing, num_steps=num_steps)
    total = len(summary.response_lengths)
    shares = np.concatenate([share.responses for share in plan.shares])
    assert sorted(shares.tolist()) == list(range(total))
    run = [step.responses_of_rank(rank) for step in plan.steps for rank in range(3)]
    assert sorted(np.concatenate(run).tolist()) == list(range(total))
    for share in plan.shares:
        lengths = summary.response_lengths[share.responses]
        assert np.diff(share.response_offsets).tolist() == lengths.tolist()
    assert sum(step.ungrouped_tokens for step in plan.steps) == sum(
        prompt + n - 1 for prompt, lengths in LENGTHS for n in lengths
    )


def test_weights_and_advantages_are_those_of_the_whole_step() -> None:
    summary = _summary()
    for num_steps in (1, 2):
        plan = plan_rollouts(summary, ObjectiveConfig(), PACKING, num_steps=num_steps)
        bounds = np.cumsum([0, *(len(step.weights) for step in plan.steps)]).tolist()
        assert [step.first_response for step in plan.steps] == bounds[:-1]
        for step, (start, stop) in zip(plan.steps, itertools.pairwise(bounds), strict=True):
            lengths = summary.response_lengths[start:stop]
            expected = token_weights(lengths, ObjectiveConfig().resolved().aggregation)
            assert step.weights.tolist() == expected.tolist()
    offsets = summary.group_offsets
    (step,) = plan_rollouts(summary, ObjectiveConfig(), PACKING).steps
    for group in range(len(LENGTHS)):
        responses = slice(offsets[group], offsets[group + 1])
        expected = group_advantages(summary.rewards[responses], "std")
        assert step.advantages[responses].tolist() == expected.tolist()


def test_masked_tokens_do_not_count_in_the_weights() -> None:
    trained = np.maximum(_summary().response_lengths - 1, 1)
    (step,) = plan_rollouts(
        _summary(trained_lengths=trained), ObjectiveConfig(aggregation="token_mean"), PACKING
    ).steps
    assert step.weights == pytest.approx(1 / trained.sum())


def test_another_reward_is_another_plan() -> None:
    plans = []
    for reward in (0.5, 0.25):
        rewards = _summary().rewards.copy()
        rewards[0] = reward
        plans.append(plan_rollouts(_summary(rewards=rewards), ObjectiveConfig(), PACKING))
    assert plans[0].fingerprint() != plans[1].fingerprint()
    again = plan_rollouts(_summary(rewards=rewards), ObjectiveConfig(), PACKING)
    assert again.fingerprint() == plans[1].fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_budget": 40, "pad_to_multiple": 1}, r"file.jsonl:2.*response 0 alone"),
        ({"allow_split": False}, r"file.jsonl:2.*allow_split is off"),
    ],
)
def test_what_does_not_fit_is_named_by_its_source(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_rollouts(_summary(), ObjectiveConfig(), dataclasses.replace(PACKING, **changes))


def test_rewards_that_are_no_numbers_are_named_by_their_source() -> None:
    rewards = _summary().rewards.copy()
    rewards[4] = np.nan
    with pytest.raises(ValueError, match=r"file.jsonl:1: the reward of response 1 is nan"):
        plan_rollouts(_summary(rewards=rewards), ObjectiveConfig(), PACKING)


@pytest.mark.parametrize("sharing", ["groups", "everything", "none"])
def test_what_is_skipped_is_in_no_share_and_counts_in_every_weight(sharing: Any) -> None:
    rewards = np.arange(len(_summary().rewards), dtype=np.float64)
    # Groups 1 and 4; group 3 is a single response, and response 1 has the mean of its group.
    rewards[3:5] = rewards[10:] = 1.0
    summary = _summary(rewards=rewards)
    packing = dataclasses.replace(PACKING, sharing=sharing)
    kept = plan_rollouts(summary, ObjectiveConfig(), packing, num_steps=2)
    skipped = plan_rollouts(summary, ObjectiveConfig(zero_advantages="skip"), packing, num_steps=2)
    run = [step.responses_of_rank(rank) for step in skipped.steps for rank in range(3)]
    assert sorted(np.concatenate(run).tolist()) == [0, 2, 5, 6, 7, 8]
    shares = np.concatenate([share.responses for share in skipped.shares])
    assert sorted(shares.tolist()) == [0, 2, 5, 6, 7, 8]
    for one, other in zip(kept.steps, skipped.steps, strict=True):
        assert one.weights.tolist() == other.weights.tolist()
        assert one.advantages.tolist() == other.advantages.tolist()
        assert one.ungrouped_tokens > other.ungrouped_tokens
        assert one.ungrouped_flops > other.ungrouped_flops
    assert kept.fingerprint() != skipped.fingerprint()


def test_where_all_is_skipped_every_rank_has_one_empty_microbatch() -> None:
    summary = _summary(rewards=np.ones_like(_summary().rewards))
    plan = plan_rollouts(summary, ObjectiveConfig(zero_advantages="skip"), PACKING)
    assert plan.steps[0].microbatches.microbatches == (((),),) * 3
    assert [share.responses.tolist() for share in plan.shares] == [[], [], []]


def test_responses_that_are_masked_count_in_no_weight() -> None:
    finished = np.ones(len(_summary().rewards), dtype=np.int8)
    finished[[1, 4, 5, 6]] = 0
    config = ObjectiveConfig(aggregation="token_mean", overlong=OverlongConfig(kind="mask"))
    (step,) = plan_rollouts(_summary(finished=finished), config, PACKING).steps
    lengths = _summary().response_lengths
    masked = np.isin(np.arange(len(lengths)), [1, 4, 5, 6])
    assert step.weights[masked].tolist() == [0.0] * 4
    assert step.weights[~masked] == pytest.approx(1 / lengths[~masked].sum())
    run = np.concatenate([step.responses_of_rank(rank) for rank in range(3)])
    assert sorted(run.tolist()) == np.flatnonzero(~masked).tolist()


def test_a_response_that_does_not_say_whether_it_is_finished_is_named_by_its_source() -> None:
    finished = np.ones(len(_summary().rewards), dtype=np.int8)
    finished[4] = -1
    config = ObjectiveConfig(overlong=OverlongConfig(kind="mask"))
    with pytest.raises(ValueError, match=r"file.jsonl:1: finished: not known of response 1"):
        plan_rollouts(_summary(finished=finished), config, PACKING)

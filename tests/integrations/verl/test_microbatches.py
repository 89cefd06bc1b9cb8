"""Samples of a rank in microbatches: whole groups, packed tokens, the same number on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict

from megatron_prefix.integrations.verl.microbatches import Microbatches, MicrobatchPlanner
from megatron_prefix.integrations.verl.samples import Samples, part_of_groups_split
from tests.distributed import RankError, run_distributed
from tests.integrations.verl.batches import SHAPE, batch, nested, samples, tokens

GROUPS = [(37, (5, 9, 3, 7)), (41, (6, 6, 2, 11)), (22, (8,)), (30, (4, 13, 1))]


def plan(
    found: Samples, budget: int, *, multiple: int = 1, pad: int = 1, group: object = None
) -> Microbatches:
    planner = MicrobatchPlanner(group=group, pad_to_multiple=pad, microbatch_multiple=multiple)
    return planner.by_tokens(found, token_budget=budget, refuse_split_groups=True)


def assert_every_sample_runs_once(microbatches: Microbatches, count: int) -> None:
    assert sorted(i for chosen in microbatches for i in chosen) == list(range(count))
    assert all(microbatches)


def test_samples_with_the_same_prompt_are_a_group_wherever_they_stand() -> None:
    first, second = batch(GROUPS[:1]), batch(GROUPS[1:2], seed=1)
    rows = [
        row
        for pair in zip(first["input_ids"].unbind(), second["input_ids"].unbind(), strict=True)
        for row in pair
    ]
    data = TensorDict(
        {
            "input_ids": nested([row.tolist() for row in rows]),
            "prompts": nested(
                [row[: 37 if i % 2 == 0 else 41].tolist() for i, row in enumerate(rows)]
            ),
        },
        batch_size=[8],
    )
    assert Samples.of_batch(data, SHAPE).groups == ((0, 2, 4, 6), (1, 3, 5, 7))


def test_padded_prompts_are_read_from_the_attention_mask() -> None:
    data = batch(GROUPS[2:])
    width = 40
    mask = torch.zeros(4, width + 13, dtype=torch.int64)
    lengths = data["prompts"].offsets().diff().tolist()
    for i, length in enumerate(lengths):
        mask[i, width - length : width] = 1
    padded = TensorDict(
        {
            "input_ids": data["input_ids"],
            "prompts": torch.zeros(4, width, dtype=torch.int64),
            "attention_mask": mask,
        },
        batch_size=[4],
    )
    assert Samples.of_batch(padded, SHAPE).prompt_lengths.tolist() == [22, 30, 30, 30]


def test_without_prompts_all_but_the_first_token_is_response() -> None:
    data = TensorDict({"input_ids": nested([tokens(5, 0), tokens(9, 1)])}, batch_size=[2])
    assert Samples.of_batch(data, SHAPE).prompt_lengths.tolist() == [1, 1]


def test_a_sample_of_one_token_is_refused() -> None:
    data = TensorDict({"input_ids": nested([[3, 4], [3]])}, batch_size=[2])
    with pytest.raises(ValueError, match="sample 1 of the batch has 1 tokens"):
        Samples.of_batch(data, SHAPE)


def test_groups_are_whole_and_the_budget_counts_packed_tokens() -> None:
    found = samples(GROUPS)
    repeated = [sum(len(found.tokens[i]) for i in group) for group in found.groups]
    packed = [found.tree(group).grouped_tokens for group in found.groups]
    # Each of the first two groups takes more than the budget, were its prompt repeated.
    budget = 70
    assert max(packed) <= budget < min(repeated[:2])
    microbatches = plan(found, budget)
    assert_every_sample_runs_once(microbatches, 12)
    for group in found.groups:
        assert sum(bool(set(group) & set(chosen)) for chosen in microbatches) == 1
    assert all(found.tree(c, token_budget=budget).grouped_tokens <= budget for c in microbatches)


def test_a_group_over_the_budget_is_split() -> None:
    found = samples([(37, (20, 20, 20, 20))])
    microbatches = plan(found, 80)
    assert_every_sample_runs_once(microbatches, 4)
    assert len(microbatches) == 2
    assert all(found.tree(c, token_budget=80).grouped_tokens <= 80 for c in microbatches)


def test_their_number_is_a_multiple_of_what_the_schedule_asks_for() -> None:
    found = samples(GROUPS)
    alone = plan(found, 120)
    assert len(alone) % 4
    microbatches = plan(found, 120, multiple=4)
    assert_every_sample_runs_once(microbatches, 12)
    assert len(microbatches) % 4 == 0


def test_equal_samples_fill_microbatches_that_would_be_empty() -> None:
    data = TensorDict(
        {"input_ids": nested([tokens(9, 0)] * 4), "prompts": nested([tokens(9, 0)[:5]] * 4)},
        batch_size=[4],
    )
    microbatches = plan(Samples.of_batch(data, SHAPE), 100, multiple=4)
    assert_every_sample_runs_once(microbatches, 4)
    assert len(microbatches) == 4


def test_too_few_samples_for_the_schedule_are_refused() -> None:
    with pytest.raises(ValueError, match=r"4 microbatches are needed .* has 2 samples"):
        plan(samples([(20, (3, 4))]), 100, multiple=4)


def test_a_sample_over_the_budget_is_refused_by_verls_name() -> None:
    with pytest.raises(ValueError, match="max_token_len_per_gpu"):
        plan(samples([(50, (3, 4))]), 40)


def test_microbatches_of_so_many_samples_run_group_after_group() -> None:
    planner = MicrobatchPlanner(group=None, pad_to_multiple=1, microbatch_multiple=1)
    found = samples(GROUPS)
    microbatches = planner.by_samples(found, size=4, refuse_split_groups=True)
    assert_every_sample_runs_once(microbatches, 12)
    assert microbatches[0] == [0, 1, 2, 3] and microbatches[1] == [4, 5, 6, 7]
    with pytest.raises(ValueError, match="micro_batch_size_per_gpu=5"):
        planner.by_samples(found, size=5, refuse_split_groups=True)


def _plan_on_rank(rank: int, world_size: int, groups: Sequence, budget: int) -> Microbatches:
    return plan(samples(groups[rank], seed=100 * rank), budget, group=dist.group.WORLD)


def test_every_rank_has_as_many_microbatches() -> None:
    groups = [[(60, (20, 20, 20))], [(12, (3, 4)), (9, (5,))]]
    assert len(plan(samples(groups[0]), 90)) != len(plan(samples(groups[1], seed=100), 90))
    first, second = run_distributed(_plan_on_rank, 2, groups, 90)
    assert len(first) == len(second) == len(plan(samples(groups[0]), 90))
    assert_every_sample_runs_once(first, 3)
    assert_every_sample_runs_once(second, 3)


def test_a_sample_over_the_budget_ends_every_rank() -> None:
    with pytest.raises(RankError) as raised:
        run_distributed(_plan_on_rank, 2, [[(60, (20,))], [(12, (3,))]], 40)
    assert str(raised.value).count("ValueError: data-parallel rank 0: ") == 2


def _split_on_rank(rank: int, world_size: int) -> Microbatches:
    return plan(samples(GROUPS), 200, group=dist.group.WORLD)


def test_a_trainer_that_splits_groups_over_ranks_is_refused_in_one_line() -> None:
    with pytest.raises(RankError, match="the trainer has dealt 100% of the groups") as raised:
        run_distributed(_split_on_rank, 2)
    assert "split_groups=allow" in str(raised.value)


def test_only_groups_of_several_samples_can_be_split() -> None:
    assert part_of_groups_split([[b"a", b"a", b"b"], [b"b", b"c"]]) == 0.5
    assert part_of_groups_split([[b"a"], [b"b"]]) == 0.0
    assert part_of_groups_split([[], []]) == 0.0

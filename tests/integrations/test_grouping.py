"""Microbatches of whole groups."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prefix.integrations import whole_groups

PROMPTS = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=6, max_size=20),
    st.integers(1, 40),
    st.integers(1, 2),
    st.integers(1, 2),
)
def test_every_sequence_runs_once_on_ranks_with_as_many_microbatches(
    chosen: list[tuple[int, int]], budget: int, ranks: int, multiple: int
) -> None:
    prompts = [PROMPTS[i] for i, _ in chosen]
    lengths = [len(PROMPTS[i]) + n for i, n in chosen]
    try:
        found = whole_groups(
            prompts,
            lengths,
            token_budget=budget,
            data_parallel_size=ranks,
            microbatch_multiple=multiple,
        )
    except ValueError as error:
        assert "Give more sequences or raise token_budget" in str(error)
        return
    assert len(found) == ranks
    assert len({len(rank) for rank in found}) == 1 and len(found[0]) % multiple == 0
    microbatches = [own for rank in found for own in rank]
    assert all(microbatches)
    assert sorted(i for own in microbatches for i in own) == list(range(len(chosen)))
    for own in microbatches:
        tokens = sum(lengths[i] - len(prompts[i]) + 1 for i in own)
        tokens += sum(len(PROMPTS[k]) - 1 for k in {chosen[i][0] for i in own})
        assert tokens <= max(budget, *lengths)


def test_groups_stay_whole_where_they_fit() -> None:
    prompts = [PROMPTS[i % 2] for i in range(8)]
    lengths = [len(prompt) + 3 for prompt in prompts]
    found = whole_groups(prompts, lengths, token_budget=20, data_parallel_size=2)
    assert sorted(map(sorted, (own for rank in found for own in rank))) == [
        [0, 2, 4, 6],
        [1, 3, 5, 7],
    ]


def test_prompts_of_other_keys_are_other_groups() -> None:
    prompts, lengths = [[9, 9]] * 4, [100] * 4
    keys = [[1, 2], [3, 4], [1, 2], [3, 4]]
    found = whole_groups(prompts, lengths, token_budget=200, prompt_keys=keys)
    assert sorted(map(sorted, found[0])) == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match="prompt_keys: give one key for each token"):
        whole_groups(prompts, lengths, token_budget=200, prompt_keys=keys[1:])


def test_mistakes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="2 prompts for 1 sequences"):
        whole_groups([[1], [1]], [3], token_budget=9)
    with pytest.raises(ValueError, match="1 sequences for data_parallel_size=2"):
        whole_groups([[1]], [3], token_budget=9, data_parallel_size=2)
    with pytest.raises(ValueError, match="sequence 0 has 1 tokens and its prompt 2"):
        whole_groups([[1, 2]], [1], token_budget=9)

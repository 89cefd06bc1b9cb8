"""A rank gets the tokens of its own responses, and of no others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup
from megatron_prefix.training.shares import Distribution, Share, ShareSizes, take_share
from tests.distributed import run_distributed


def _batch(
    seed: int,
    *,
    old_logprobs: bool = True,
    loss_mask: bool = True,
    advantages: bool = True,
    keys: bool = True,
    routes: bool = False,
) -> RolloutBatch:
    """With routes, which are wider than a byte, tokens have positions of mRoPE too."""
    rng = np.random.default_rng(seed)
    groups = []
    for index in range(7):
        lengths = rng.integers(1, 9, rng.integers(1, 5)).tolist()
        prompt = rng.integers(0, 99, rng.integers(1, 6))
        groups.append(
            RolloutGroup(
                prompt=prompt,
                prompt_keys=rng.integers(0, 99, len(prompt)) if keys and index != 3 else None,
                keys=[rng.integers(0, 99, n) for n in lengths] if keys and index != 4 else None,
                responses=[rng.integers(0, 99, n) for n in lengths],
                rewards=rng.normal(size=len(lengths)),
                old_logprobs=[-rng.random(n) for n in lengths] if old_logprobs else None,
                loss_mask=[rng.random(n) < 0.5 for n in lengths] if loss_mask else None,
                # Those of a group's responses, or of its tokens.
                advantages=[rng.normal(size=n) for n in lengths]
                if advantages and index % 2
                else None,
                source=f"group {index}",
                **(_routes_and_positions(rng, len(prompt), lengths) if routes else {}),
            )
        )
    return RolloutBatch.from_groups(groups)


def _routes_and_positions(
    rng: np.random.Generator, prompt: int, lengths: list[int]
) -> dict[str, Any]:
    return {
        "routes": [rng.integers(0, 300, (prompt + n - 1, 2, 3), dtype=np.int16) for n in lengths],
        "prompt_position_shifts": rng.integers(-9, 9, (prompt, 3), dtype=np.int32),
        "position_shifts": [rng.integers(-9, 9, (n, 3), dtype=np.int32) for n in lengths],
    }


def _assert_holds(share: Share, batch: RolloutBatch, responses: np.ndarray) -> None:
    assert share.sizes.responses.tolist() == sorted(responses.tolist())
    for response in responses.tolist():
        group = int(np.searchsorted(batch.group_offsets, response, side="right")) - 1
        tokens = batch.tokens_of(response)
        expected = [*batch.prompt(group).tolist(), *batch.response_tokens[tokens].tolist()]
        assert share.sequence(group, response).tolist() == expected
        if batch.routes is not None:
            _assert_holds_routes(share, batch, group, response)
            continue
        keys = share.sequence_keys(group, response)
        assert (keys is None) == (batch.keys is None)
        if keys is not None and batch.keys is not None and batch.prompt_keys is not None:
            prompt = slice(*batch.prompt_offsets[[group, group + 1]].tolist())
            assert keys.tolist() == [*batch.prompt_keys[prompt], *batch.keys[tokens]]
        for found, values in (
            (share.old_logprobs_of(response), batch.old_logprobs),
            (share.loss_mask_of(response), batch.loss_mask),
            (share.advantages_of(response), batch.advantages if group % 2 else None),
        ):
            assert (found is None) == (values is None)
            if found is not None and values is not None:
                assert np.array_equal(found, values[tokens])


def _assert_holds_routes(share: Share, batch: RolloutBatch, group: int, response: int) -> None:
    whole = batch.group(group)
    index = response - int(batch.group_offsets[group])
    assert whole.routes is not None and whole.position_shifts is not None
    found = share.routes_of(response)
    assert found.dtype == np.int16 and np.array_equal(found, whole.routes[index])
    shifts = np.concatenate([whole.prompt_position_shifts, whole.position_shifts[index]])
    assert np.array_equal(share.position_shifts_of(group, response), shifts)


@pytest.mark.parametrize("old_logprobs", [False, True])
@pytest.mark.parametrize("loss_mask", [False, True])
@pytest.mark.parametrize("advantages", [False, True])
@pytest.mark.parametrize("keys", [False, True])
def test_a_share_holds_its_responses_and_their_prompts(
    old_logprobs: bool, loss_mask: bool, advantages: bool, keys: bool
) -> None:
    batch = _batch(
        0, old_logprobs=old_logprobs, loss_mask=loss_mask, advantages=advantages, keys=keys
    )
    rng = np.random.default_rng(1)
    for count in (0, 1, 5, batch.num_responses):
        responses = rng.permutation(batch.num_responses)[:count]
        sizes = ShareSizes.of(batch.summary(), responses)
        share = take_share(batch, sizes)
        _assert_holds(share, batch, responses)
        assert len(share.prompt_tokens) == sizes.prompt_offsets[-1]
        arrays = (share.response_tokens, share.old_logprobs, share.loss_mask, share.advantages)
        for values in arrays:
            assert values is None or len(values) == sizes.response_offsets[-1]


def test_a_response_of_another_rank_is_not_there() -> None:
    batch = _batch(0)
    share = take_share(batch, ShareSizes.of(batch.summary(), np.array([0, 2])))
    with pytest.raises(AssertionError):
        share.old_logprobs_of(1)


def _scatter(rank: int, world_size: int, data_parallel_rank_of: list[int]) -> list[dict[str, Any]]:
    return [
        _scattered(_batch(3, routes=routes), rank, data_parallel_rank_of)
        for routes in (False, True)
    ]


def _scattered(batch: RolloutBatch, rank: int, data_parallel_rank_of: list[int]) -> dict[str, Any]:
    sizes = [
        ShareSizes.of(batch.summary(), np.arange(start, batch.num_responses, 3))
        for start in range(3)
    ]
    own = data_parallel_rank_of[rank]
    share = Distribution(own, torch.device("cpu")).scatter(batch if rank == 0 else None, sizes)
    _assert_holds(share, batch, sizes[own].responses)
    return {"responses": share.sizes.responses.tolist()}


def test_every_rank_of_a_replica_gets_the_same_share_from_rank_0() -> None:
    found = run_distributed(_scatter, 3, [1, 0, 1])
    assert found[0] == found[2] != found[1]

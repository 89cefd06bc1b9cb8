"""A batch of flat arrays holds what its groups hold, and is refused where one of them is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.rollouts.batch_builder import BatchBuilder
from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup
from megatron_prefix.rollouts.validation import validate_batch, validate_group
from megatron_prefix.training.waiting import read_waiting, write_waiting

from .files import LIMITS, MAX_POSITIONS, VOCAB_SIZE, contents, groups_strategy


def assert_equal(found: RolloutBatch, expected: RolloutBatch) -> None:
    for field in dataclasses.fields(RolloutBatch):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        assert type(ours) is type(theirs), field.name
        if not isinstance(ours, np.ndarray):
            assert repr(ours) == repr(theirs)  # an answer may hold a NaN
            continue
        np.testing.assert_array_equal(ours, theirs, err_msg=field.name, strict=True)


@settings(max_examples=60, deadline=None)
@given(groups_strategy(), st.data())
def test_groups_come_out_of_a_batch_as_they_went_in(groups, data):
    versions = [data.draw(st.none() | st.integers(0, 9)) for _ in groups]
    groups = [
        dataclasses.replace(group, policy_version=version, source=str(i))
        for i, (group, version) in enumerate(zip(groups, versions, strict=True))
    ]
    batch = RolloutBatch.from_groups(groups)
    validate_batch(batch, LIMITS)
    assert contents(batch) == contents(groups)
    assert [group.policy_version for group in batch.groups()] == versions
    assert list(batch.sources) == [str(i) for i in range(len(groups))]
    assert batch.num_responses == sum(len(group.responses) for group in groups)


@settings(max_examples=40, deadline=None)
@given(groups_strategy(), st.data())
def test_batches_one_behind_the_other_are_the_batch_of_all_their_groups(groups, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, len(groups)))) | {len(groups)})
    parts = [
        RolloutBatch.from_groups(groups[start:stop])
        for start, stop in zip([0, *cuts], cuts, strict=False)
    ]
    assert_equal(built(parts), RolloutBatch.from_groups(groups))


def built(parts: Sequence[RolloutBatch]) -> RolloutBatch:
    builder = BatchBuilder()
    for part in parts:
        builder.add(part)
    return builder.build()


def test_a_part_without_masks_is_trained_on_whole():
    plain = RolloutGroup(prompt=(1,), responses=((2, 3),), rewards=(0.0,), source="a")
    masked = dataclasses.replace(plain, loss_mask=((False, True),))
    groups = [plain, masked, plain]
    parts = [RolloutBatch.from_groups([group]) for group in groups]
    found = built(parts)
    assert_equal(found, RolloutBatch.from_groups(groups))
    assert found.loss_mask.tolist() == [True, True, False] + [True] * 3


def test_tokens_without_keys_have_key_0():
    plain = RolloutGroup(prompt=(1,), responses=((2, 3),), rewards=(0.0,), source="a")
    keyed = dataclasses.replace(plain, prompt_keys=(7,), keys=((8, 9),))
    groups = [plain, keyed, dataclasses.replace(keyed, keys=None), plain]
    found = built([RolloutBatch.from_groups([group]) for group in groups])
    assert_equal(found, RolloutBatch.from_groups(groups))
    assert found.prompt_keys.tolist() == [0, 7, 7, 0]
    assert found.keys.tolist() == [0, 0, 8, 9, 0, 0, 0, 0]
    assert built([RolloutBatch.from_groups([plain])]).keys is None


def test_a_response_is_repeated_where_tokens_and_keys_are():
    group = RolloutGroup(
        prompt=(1,),
        responses=((2, 3),) * 3,
        keys=((0, 5), (0, 6), (0, 5)),
        rewards=(0.0,) * 3,
        source="a",
    )
    found = RolloutBatch.from_groups([group]).summary()
    assert found.repeated.tolist() == [False, False, True]


def test_a_long_batch_grows_in_place():
    rng = np.random.default_rng(0)
    groups = [
        RolloutGroup(
            prompt=rng.integers(0, 9, 30),
            responses=[rng.integers(0, 9, size) for size in rng.integers(1, 900, 3)],
            rewards=rng.normal(size=3),
            source=str(i),
        )
        for i in range(60)
    ]
    parts = [RolloutBatch.from_groups([group]) for group in groups]
    assert_equal(built(parts), RolloutBatch.from_groups(groups))


def _changed(values: Any, index: int, value: Any) -> tuple[Any, ...]:
    return tuple(value if i == index else old for i, old in enumerate(values))


BAD_TOKENS = st.sampled_from([-1, VOCAB_SIZE, 2**31 - 1, -(2**31)])
BAD_LOGPROBS = st.sampled_from([0.2, 7.0, np.nan, np.inf, -np.inf])


@st.composite
def broken(draw: st.DrawFn, group: RolloutGroup) -> RolloutGroup:
    """The group with one fault."""
    r = draw(st.integers(0, len(group.responses) - 1))
    response = group.responses[r]
    t = draw(st.integers(0, len(response) - 1))
    faults = ["prompt", "empty prompt", "long prompt", "response", "empty response", "reward"]
    faults += ["long response", "no response"]
    faults += ["old_logprobs"] * (group.old_logprobs is not None)
    faults += ["loss_mask"] * (group.loss_mask is not None)
    faults += ["turn_rewards"] * (group.turn_rewards is not None)
    faults += ["advantages"] * (group.advantages is not None)
    fault = draw(st.sampled_from(faults))
    changes: dict[str, Any] = {}
    if fault == "prompt":
        changes["prompt"] = (*group.prompt[:-1], draw(BAD_TOKENS))
    elif fault in ("empty prompt", "long prompt"):
        length = 0 if fault == "empty prompt" else MAX_POSITIONS + 1
        changes |= {"prompt": (1,) * length, "prompt_keys": None}
    elif fault == "response":
        token = draw(BAD_TOKENS)
        changes["responses"] = _changed(group.responses, r, _changed(response, t, token))
    elif fault == "reward":
        reward = draw(st.sampled_from([np.nan, np.inf]))
        changes["rewards"] = _changed(group.rewards, r, reward)
    elif fault == "old_logprobs":
        values = _changed(group.old_logprobs[r], t, draw(BAD_LOGPROBS))
        changes["old_logprobs"] = _changed(group.old_logprobs, r, values)
    elif fault == "turn_rewards":
        values = _changed(group.turn_rewards[r], 0, np.inf)
        changes["turn_rewards"] = _changed(group.turn_rewards, r, values)
    elif fault == "advantages":
        values = _changed(group.advantages[r], t, -np.inf)
        changes["advantages"] = _changed(group.advantages, r, values)
    elif fault == "loss_mask":
        changes["turn_rewards"] = None
        changes["loss_mask"] = _changed(group.loss_mask, r, (False,) * len(response))
    elif fault == "no response":
        nothing = {"responses": (), "rewards": (), "old_logprobs": None, "loss_mask": None}
        changes |= {**nothing, "finished": None, "turn_rewards": None, "advantages": None}
        changes["keys"] = None
    else:
        length = 0 if fault == "empty response" else MAX_POSITIONS + 1
        changes["responses"] = _changed(group.responses, r, (1,) * length)
        changes["turn_rewards"] = None
        per_token = {"old_logprobs": -1.0, "loss_mask": True, "advantages": 1.0, "keys": 1}
        for name, value in per_token.items():
            if (lists := getattr(group, name)) is not None:
                changes[name] = _changed(lists, r, (value,) * length)
    return dataclasses.replace(group, **changes)


def _error(check: Callable[[], Any]) -> str | None:
    try:
        check()
    except ValueError as error:
        return str(error)
    return None


@settings(max_examples=200, deadline=None)
@given(groups_strategy(max_size=3), st.data())
def test_a_batch_is_refused_with_the_words_for_its_first_bad_group(groups, data):
    groups = [dataclasses.replace(group, source=f"f:{i}") for i, group in enumerate(groups)]
    index = data.draw(st.integers(0, len(groups) - 1))
    bad = data.draw(broken(groups[index]))
    # All or none: a group without responses has none to have log-probabilities of.
    if bad.old_logprobs is None and groups[0].old_logprobs is not None:
        bad = dataclasses.replace(bad, old_logprobs=())
    groups[index] = bad
    found = _error(lambda: validate_batch(RolloutBatch.from_groups(groups), LIMITS))
    assert found is not None and found == _error(lambda: validate_group(bad, LIMITS))
    assert found.startswith(f"f:{index}: ")
    # Of arrays it is the same fault in the same words.
    assert found == _error(lambda: validate_group(_of_arrays(bad), LIMITS))


def _of_arrays(group: RolloutGroup) -> RolloutGroup:
    """The group with an array in place of each list of numbers."""
    dtypes = {"responses": np.int64, "loss_mask": np.bool_, "keys": np.int64}
    floats = dict.fromkeys(("old_logprobs", "turn_rewards", "advantages"), np.float64)
    changes = {
        name: [np.array(values, dtype) for values in lists]
        for name, dtype in {**dtypes, **floats}.items()
        if (lists := getattr(group, name)) is not None
    }
    return dataclasses.replace(
        group, prompt=np.array(group.prompt, np.int64), rewards=np.array(group.rewards), **changes
    )


@settings(max_examples=20, deadline=None)
@given(groups_strategy())
def test_rollouts_that_wait_beside_a_checkpoint_come_back_bit_for_bit(tmp_path_factory, groups):
    folder = tmp_path_factory.mktemp("step")
    batch = RolloutBatch.from_groups(groups)
    assert read_waiting(folder) is None
    write_waiting(folder, batch, {"number": 3, "files": [["a.jsonl", 5]]})
    found, state = read_waiting(folder)
    assert_equal(found, batch)
    assert state == {"number": 3, "files": [["a.jsonl", 5]]}
    assert [path.name for path in folder.iterdir()] == ["waiting_rollouts.npz"]

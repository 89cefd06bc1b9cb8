"""Several rewards of a response: their weighted sum, by hand; and what is refused, by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup
from megatron_prefix.rollouts.rewards import WeightedReward, exact_match, load_reward, reward_batch
from megatron_prefix.training.waiting import read_waiting, write_waiting

from .files import FORMATS, engine, write

WEIGHTS = {"correct": 1.0, "brief": 0.5, "polite": 0.0}
NAMED = {"correct": [1.0, 0.0], "brief": [0.25, 0.75], "polite": [7.0, 9.0]}
GROUP = {"prompt": [5, 7], "responses": [[1, 2], [3]], "rewards": NAMED}
TOTALS = [1.125, 0.375]


def _responses(record: dict[str, Any], group: int) -> list[dict[str, Any]]:
    """The records of one response each of a record of a group."""
    return [
        {
            "group": group,
            "prompt": record["prompt"],
            "response": response,
            "reward": {name: values[i] for name, values in record["rewards"].items()},
        }
        for i, response in enumerate(record["responses"])
    ]


def _read(path: Path, groups: int = 1, **options: Any) -> RolloutBatch:
    batch = engine(path, **{"reward_weights": WEIGHTS, **options}).next_rollouts(groups, step=0)
    assert batch is not None
    return batch


def _named(batch: RolloutBatch) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in batch.named_rewards.items()}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("flat", [False, True])
def test_a_record_gives_rewards_by_name_and_is_trained_by_their_weighted_sum(
    tmp_path: Path, suffix: str, flat: bool
) -> None:
    records = [r for i in range(2) for r in (_responses(GROUP, i) if flat else [GROUP])]
    batch = _read(write(tmp_path / f"rollouts{suffix}", records), groups=2)
    assert batch.rewards.tolist() == 2 * TOTALS
    assert _named(batch) == {name: 2 * values for name, values in NAMED.items()}
    summary = batch.summary().of_groups(range(1, 2))
    assert {n: v.tolist() for n, v in summary.named_rewards.items()} == NAMED
    # As resampling takes a batch apart and makes one of its groups.
    again = RolloutBatch.from_groups(batch.groups())
    assert _named(again) == _named(batch)


def test_equal_rewards_have_equal_sums_to_the_bit(tmp_path: Path) -> None:
    """Sums of 0.1 and 0.2 are rounded; their advantage has to be 0 all the same."""
    count = 7
    record = {
        "prompt": [5],
        "responses": [[1]] * count,
        "rewards": {"correct": [0.1] * count, "brief": [0.3] * count, "polite": [0.2] * count},
    }
    weights = {"correct": 0.1, "brief": 1 / 3, "polite": -0.7}
    batch = _read(write(tmp_path / "r.jsonl", [record]), reward_weights=weights)
    assert len(set(batch.rewards.tolist())) == 1


def brevity(prompt: Sequence[int], response: Sequence[int], answer: Any) -> float:
    return 1 / len(response)


def test_functions_by_name_are_weighed_and_fill_what_records_leave_open(tmp_path: Path) -> None:
    """The first group gives its rewards, the second has an answer; so has a response of a third."""
    weights = {"correct": 1.0, "brief": -0.5}
    reward = WeightedReward({"correct": exact_match, "brief": brevity}, weights)
    given = {"correct": [3.0, 4.0], "brief": [2.0, 0.0]}
    third = _responses({**GROUP, "rewards": given}, 3)
    del third[1]["reward"]
    third = [{**record, "answer": [3]} for record in third]
    records = [
        {**GROUP, "rewards": given},
        {"prompt": [5], "responses": [[1, 2], [3]], "answer": [1, 2]},
        *third,
    ]
    path = write(tmp_path / "rollouts.jsonl", records)
    batch = _read(path, groups=3, reward=reward, reward_weights=weights)
    assert _named(batch) == {
        "correct": [3, 4, 1, 0, 3, 1],
        "brief": [2, 0, 0.5, 1, 2, 1],
    }
    assert batch.rewards.tolist() == [2, 4, 0.75, -0.5, 2, 0.5]
    # As an engine that samples: no group has a reward before.
    path = write(tmp_path / "answers.jsonl", records[1:2])
    only = _read(path, reward=reward, reward_weights=weights)
    assert _named(only) == {"correct": [1, 0], "brief": [0.5, 1]}
    assert _named(reward_batch(reward, only)) == _named(only)
    assert reward((5,), (1, 2), [1, 2]) == 0.75


def test_functions_by_name_run_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "named_rewards_of_a_user.py").write_text(
        "def length(prompt, response, answer):\n    return len(response)\n"
        "def wrong(prompt, response, answer):\n    return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    group = RolloutGroup(
        prompt=(1,), responses=((2, 3), (4,)), rewards=(0, 0), answer=[4], source="file.jsonl:3"
    )
    weights = {"length": 0.5, "right": 1.0}
    functions = {"length": load_reward("named_rewards_of_a_user:length"), "right": exact_match}
    batch = reward_batch(WeightedReward(functions, weights), RolloutBatch.from_groups([group]))
    assert batch.rewards.tolist() == [1.0, 1.5]
    functions["length"] = load_reward("named_rewards_of_a_user:wrong")
    with pytest.raises(ValueError, match=r"file.jsonl:3: responses\[0\]: reward named_.*:wrong"):
        reward_batch(WeightedReward(functions, weights), RolloutBatch.from_groups([group]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": {"correct": [1, 0], "brief": [1, 0]}}, r"rewards\.polite: missing, and"),
        (
            {"rewards": {**NAMED, "polite": None}},
            r"rewards\.polite: missing, and objective\.reward",
        ),
        ({"rewards": {**NAMED, "kind": [1, 0]}}, r"rewards\.kind: has no weight in objective\.rew"),
        ({"rewards": [1.0, 0.0]}, r"rewards: has no names, and objective\.reward_weights"),
        ({"rewards": {**NAMED, "brief": [1.0]}}, r"rewards\.brief: 1, and 2 of correct; there"),
        ({"rewards": {n: v[:1] for n, v in NAMED.items()}}, r"rewards: 1 for 2 responses"),
        ({"rewards": {**NAMED, "brief": [1.0, "a"]}}, r"rewards\.brief\[1\]: 'a' is not a number"),
        ({"rewards": {**NAMED, "brief": 3}}, r"rewards\.brief: 3 is not a list"),
        ({"rewards": {**NAMED, "polite": [0.0, 1e999]}}, r"rewards\.polite\[1\]: inf is not a fin"),
        ({"rewards": None, "turn_rewards": [[1.0], [0.0]]}, r"turn_rewards: have no names, and"),
        ({"rewards": None}, r"rewards: missing, and so is answer"),
    ],
)
def test_what_does_not_go_with_the_weights_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "rollouts.jsonl", [{**GROUP, **change}])
    with pytest.raises(ValueError, match=message) as caught:
        _read(path)
    assert str(caught.value).startswith(f"{path}:1: ")


@pytest.mark.parametrize("flat", [False, True])
def test_rewards_by_name_without_weights_are_refused(tmp_path: Path, flat: bool) -> None:
    path = write(tmp_path / "r.jsonl", _responses(GROUP, 1) if flat else [GROUP])
    with pytest.raises(ValueError, match=r"r\.jsonl:1: rewards?: several by name \(correct, brief"):
        _read(path, reward_weights=None)


def test_the_field_of_the_other_kind_of_record_is_not_passed_over(tmp_path: Path) -> None:
    """Beside an answer it would be lost to what the reward function says."""
    whole = {"prompt": [5], "responses": [[1]], "reward": [1.0], "answer": [1]}
    flat = {"group": 1, "prompt": [5], "response": [1], "rewards": 1.0, "answer": [1]}
    for record, message in (
        (whole, "reward: a record of a whole group has rewards; rename it"),
        (flat, "rewards: a record of one response has reward; rename it"),
    ):
        path = write(tmp_path / "rollouts.jsonl", [record])
        with pytest.raises(ValueError, match=rf"jsonl:1: {message}"):
            _read(path, reward=exact_match, reward_weights=None)


def test_a_trajectory_of_another_program_may_have_several(tmp_path: Path) -> None:
    record = {"group": 1, "input_ids": [4, 5], "loss_mask": [0, 1], "rewards": {"a": 1, "b": 2}}
    path = write(tmp_path / "rollouts.jsonl", [record])
    batch = _read(path, reward_weights={"a": 1.0, "b": 10.0})
    assert (batch.rewards.tolist(), _named(batch)) == ([21], {"a": [1], "b": [2]})


def test_a_stopped_run_keeps_them(tmp_path: Path) -> None:
    batch = _read(write(tmp_path / "rollouts.jsonl", [GROUP]))
    write_waiting(tmp_path, batch, {"epoch": 1})
    found = read_waiting(tmp_path)
    assert found is not None
    assert _named(found[0]) == _named(batch)
    assert found[0].rewards.tolist() == TOTALS
    assert all(isinstance(values, np.ndarray) for values in found[0].named_rewards.values())
    json.dumps(found[1])

"""verl's trainers deal whole groups to data-parallel ranks."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hypothesis import given
from hypothesis import strategies as st
from transfer_queue import KVBatchMeta
from verl import DataProto

from megatron_prefix.layout.dealing import order_by_groups
from tests.integrations.verl.trainers import PPOTrainerSync, RayPPOTrainer

RANKS = 2
OFF = "+actor_rollout_ref.actor.megatron.override_mcore_model_config.megatron_prefix=false"
UIDS = ["a"] * 4 + ["b"] * 4 + ["c"] * 4 + ["d"] * 4
# Balanced by length, no rank has a whole group.
LENGTHS = [10, 80, 30, 60, 90, 20, 70, 40, 15, 85, 35, 65, 95, 25, 75, 45]


def config(*changed: str, engine: str = "megatron") -> Any:
    """verl's own configuration of a run, with a command line laid over it."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(
            "ppo_trainer",
            overrides=[
                f"model_engine={engine}",
                "actor_rollout_ref.model.external_lib=megatron_prefix.integrations.verl",
                "actor_rollout_ref.actor.ppo_mini_batch_size=4",
                "actor_rollout_ref.rollout.n=4",
                *changed,
            ],
        )


def worker_group() -> Any:
    """As verl's has it once it has asked its workers: the data-parallel rank of each."""
    return types.SimpleNamespace(_dispatch_info={"actor": list(range(RANKS))})


def v1_order(trainer_config: Any) -> list[str]:
    trainer = object.__new__(PPOTrainerSync)
    trainer.config, trainer.actor_rollout_wg = trainer_config, worker_group()
    trainer.use_critic, trainer.global_steps = False, 1
    trainer.tokenizer = types.SimpleNamespace(eos_token_id=0)
    sessions = {uid: 0 for uid in UIDS}
    keys = []
    for uid in UIDS:
        keys.append(f"{uid}_{sessions[uid]}_0")
        sessions[uid] += 1
    tags = [{"prompt_len": 8, "seq_len": length} for length in LENGTHS]
    metrics: dict[str, Any] = {}
    batch = KVBatchMeta(partition_id="train", keys=keys, tags=tags)
    batch = trainer._balance_batch(batch, metrics)
    assert sorted(batch.keys) == sorted(keys)
    assert [LENGTHS[keys.index(k)] for k in batch.keys] == [t["seq_len"] for t in batch.tags]
    return batch.keys


def v0_order(trainer_config: Any, **kwargs: Any) -> list[str]:
    trainer = object.__new__(RayPPOTrainer)
    trainer.config, trainer.actor_rollout_wg = trainer_config, worker_group()
    mask = torch.zeros(len(UIDS), 8 + 90, dtype=torch.int64)
    for row, length in zip(mask, LENGTHS, strict=True):
        row[:length] = 1
    batch = DataProto.from_single_dict(
        {
            "attention_mask": mask,
            "responses": torch.zeros(len(UIDS), 90, dtype=torch.int64),
            "uid": np.array(UIDS, dtype=object),
        }
    )
    trainer._balance_batch(batch, {}, **kwargs)
    return batch.non_tensor_batch["uid"].tolist()


def ranks_of_groups(uids: list[str]) -> dict[str, set[int]]:
    part = len(uids) // RANKS
    found: dict[str, set[int]] = {}
    for place, uid in enumerate(uids):
        found.setdefault(uid.split("_")[0], set()).add(place // part)
    return found


@pytest.mark.parametrize("order", [v1_order, v0_order])
def test_groups_are_whole_on_a_rank_and_in_a_mini_batch(order: Any) -> None:
    uids = [uid.split("_")[0] for uid in order(config())]
    assert all(len(ranks) == 1 for ranks in ranks_of_groups(uids).values())
    # A mini-batch of four prompts is a group of each half.
    assert all(len(set(uids[start : start + 4])) == 1 for start in range(0, 16, 4))


@pytest.mark.parametrize("order", [v1_order, v0_order])
@pytest.mark.parametrize(("changed", "engine"), [((), "dp"), ((OFF,), "megatron")])
def test_other_engines_keep_verls_order(order: Any, changed: tuple[str, ...], engine: str) -> None:
    found = ranks_of_groups(order(config(*changed, engine=engine)))
    assert any(len(ranks) > 1 for ranks in found.values())


def test_mini_batches_in_an_order_of_their_own_are_left_alone() -> None:
    found = ranks_of_groups(v0_order(config(), keep_minibatch=True))
    assert any(len(ranks) > 1 for ranks in found.values())


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    num_ranks=st.integers(1, 4),
    data=st.data(),
)
def test_every_rank_has_as_many_samples_and_few_groups_are_split(
    sizes: list[int], num_ranks: int, data: st.DataObject
) -> None:
    sizes = [*sizes, *[1] * (-sum(sizes) % num_ranks)]
    groups = data.draw(st.permutations([g for g, size in enumerate(sizes) for _ in range(size)]))
    lengths = data.draw(
        st.lists(st.integers(6, 50), min_size=len(groups), max_size=len(groups)), label="lengths"
    )
    order = order_by_groups(groups, [5] * len(groups), lengths, num_ranks=num_ranks)
    assert sorted(order) == list(range(len(groups)))
    part = len(order) // num_ranks
    ranks: dict[int, set[int]] = {}
    for place, sample in enumerate(order):
        ranks.setdefault(groups[sample], set()).add(place // part)
    # A split fills a rank up.
    assert sum(len(found) - 1 for found in ranks.values()) < num_ranks


def test_ranks_are_even_in_packed_tokens() -> None:
    prompts = [100, 100, 10, 10, 60, 60, 50, 50]
    lengths = [p + 5 for p in prompts]
    order = order_by_groups("aabbccdd", prompts, lengths, num_ranks=2)
    packed = [sum(prompts[i] // 2 + 5 for i in order[half : half + 4]) for half in (0, 4)]
    assert packed == [130, 130]

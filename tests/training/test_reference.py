"""The reference policy and its penalty: refreshed, scheduled, in the reward; over a restart too."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prefix.config import ParallelConfig
from megatron_prefix.config.packing import packing_of_run
from megatron_prefix.model.build import build_model_chunks, model_shape
from megatron_prefix.model.full_tensors import FullTensors, full_parameters
from megatron_prefix.objective import ObjectiveConfig, group_advantages
from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup
from megatron_prefix.training.kl_reward import put_kl_into_advantages
from megatron_prefix.training.minibatch import build_minibatch
from megatron_prefix.training.update import ReferencePolicy
from tests.distributed import run_distributed
from tests.megatron.models import (
    ON_CPU,
    TRAINING,
    model_config,
    relative_error,
    single_process,
)
from tests.training.runs import (
    CONTEXT,
    DATA,
    PIPELINE,
    good_records,
    read_rows,
    run_values,
    trainer,
    write_records,
)


def _values(folder: Path, name: str, steps: int) -> dict[str, Any]:
    return run_values(
        folder / name,
        records=folder / "records.jsonl",
        training={"steps": steps},
        objective={
            "kl_coefficient": 0.4,
            "kl_final_coefficient": 0.1,
            "kl_decay_steps": 3,
            "reference_refresh_steps": 2,
        },
        optimizer={"lr": 1e-2},
        output={"save_every": 1, "keep": 2},
    )


def _train(values: dict[str, Any]) -> FullTensors | None:
    with trainer(values) as run:
        run.run()
        return full_parameters(run.chunks)


def _runs(rank: int, world_size: int, folder: Path) -> list[FullTensors | None]:
    _train(_values(folder, "parts", 3))
    return [_train(_values(folder, "parts", 5)), _train(_values(folder, "whole", 5))]


def test_the_reference_is_refreshed_and_a_run_continues_bit_for_bit(tmp_path: Path) -> None:
    write_records(tmp_path / "records.jsonl", good_records(10))
    resumed, whole = run_distributed(_runs, 2, tmp_path)[0]
    for name, expected in whole.items():
        assert torch.equal(resumed[name], expected), name
    for name in ("parts", "whole"):
        rows = read_rows(tmp_path / name)
        # Steps 1, 3 and 5 begin at their reference.
        assert [row["kl"] > 1e-9 for row in rows] == [False, True, False, True, False]
        coefficients = [row["kl_coefficient"] for row in rows]
        assert coefficients == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.1])
        # When the last one was taken, the older of two checkpoints was that of step 2.
        kept = sorted(path.name for path in (tmp_path / name / "checkpoints").glob("reference*"))
        assert kept == ["reference_000002", "reference_000004"]


def test_the_reference_has_expert_biases_of_its_own() -> None:
    experts = {
        "num_moe_experts": 4,
        "moe_ffn_hidden_size": 24,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    }
    with single_process():
        chunks = build_model_chunks(
            model_config(experts), ParallelConfig(), TRAINING, use_distributed_optimizer=False
        )
        biases = chunks.expert_biases()
        assert len(biases) == 2
        reference = ReferencePolicy(chunks)
        for bias in biases:
            bias.add_(0.1)  # as steps move them
        with reference.in_place():
            assert not any(bias.any() for bias in biases)
        assert all((bias == 0.1).all() for bias in biases)
        reference.refresh()
        with reference.in_place():
            assert all((bias == 0.1).all() for bias in biases)


@pytest.mark.parametrize("sharing", ["groups", "none"])
def test_a_kl_penalty_in_the_reward_changes_the_advantages(sharing: Any) -> None:
    rng = np.random.default_rng(3)
    groups = [
        RolloutGroup(
            prompt=rng.integers(0, 61, 20),
            responses=[rng.integers(0, 61, n) for n in lengths],
            rewards=rng.normal(size=len(lengths)),
            old_logprobs=[-np.ones(n) for n in lengths],
            source=f"group {index}",
        )
        for index, lengths in enumerate([(4, 2, 7), (3, 5)])
    ]
    batch = RolloutBatch.from_groups(groups)
    objective = ObjectiveConfig(advantage="mean", kl_coefficient=0.5, kl_in="reward")
    with single_process():
        config = model_config({"hidden_size": 32})
        chunks = build_model_chunks(
            config, ParallelConfig(), TRAINING, use_distributed_optimizer=False
        )
        packing = packing_of_run(
            dataclasses.replace(TRAINING, token_budget=32, sharing=sharing),
            ParallelConfig(),
            model_shape=model_shape(config, chunks.config),
            data_parallel_size=1,
        )
        minibatch = build_minibatch(
            batch, objective, packing, attention=ON_CPU, data_parallel_rank=0
        )
        for row in minibatch.rows:
            # So that each trained token t of a response, from 0, drifts by t.
            row.reference_logprobs = row.old_logprobs - row.sequence_tokens
        put_kl_into_advantages(
            [minibatch], batch.summary(), objective, device=ON_CPU.device, contributes=True
        )
        found = {}
        for row, responses in zip(minibatch.rows, minibatch.responses_of_rows, strict=True):
            for entry, sequence in enumerate(row.sequence_ids.tolist()):
                found.setdefault(int(responses[sequence]), set()).add(float(row.advantages[entry]))
    # The sum of t is 6, 1, 21 and 3, 10; half of it is lost.
    penalties = ([3, 0.5, 10.5], [1.5, 5])
    expected = [
        value
        for group, penalty in zip(groups, penalties, strict=True)
        for value in group_advantages(group.rewards - np.array(penalty), "mean")
    ]
    assert len(minibatch.rows) > 1
    assert all(len(values) == 1 for values in found.values())
    assert [found[r].pop() for r in range(5)] == pytest.approx(expected)


def _with_kl_in_reward(rank: int, world_size: int, folder: Path) -> dict[str, FullTensors | None]:
    found = {}
    for name, parallel in LAYOUTS[world_size].items():
        values = run_values(
            folder / name,
            records=folder / "records.jsonl",
            parallel=parallel,
            training={"steps": 3, "dtype": "float64", "token_budget": 48},
            objective={"kl_coefficient": 0.3, "kl_in": "reward"},
            # No rounding of a gradient becomes a step, and no norm of 32 bits scales one.
            optimizer={"lr": 1e-2, "adam_eps": 1e-4, "clip_grad": 0.0},
            output={"save_last": False, "load": str(folder / "one" / "checkpoints" / "reference")},
        )
        if name == "one":
            del values["output"]["load"]
        found[name] = _train(values)
    return found


LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    1: {"one": DATA},
    2: {"data": DATA, "context": CONTEXT, "pipeline": PIPELINE},
}


def test_a_kl_penalty_in_the_reward_is_the_same_on_ranks(tmp_path: Path) -> None:
    write_records(tmp_path / "records.jsonl", good_records(6))
    (one,) = run_distributed(_with_kl_in_reward, 1, tmp_path)
    two = run_distributed(_with_kl_in_reward, 2, tmp_path)[0]
    for layout, parameters in two.items():
        for name, expected in one["one"].items():
            assert relative_error(parameters[name], expected) <= 1e-12, (layout, name)
    rows = read_rows(tmp_path / "one")
    assert rows[0]["kl"] < 1e-12 < rows[2]["kl"]

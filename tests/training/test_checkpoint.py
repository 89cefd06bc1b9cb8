"""Checkpoints: exact at the same layout, whole at any other, never half-written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.rollouts.records import RolloutGroup
from megatron_prefix.training.checkpoint import CheckpointFolder
from megatron_prefix.training.config import OptimizerSettings, ParallelConfig
from megatron_prefix.training.full_tensors import FullTensors, full_parameters
from megatron_prefix.training.minibatch import PackingConfig, build_minibatch
from megatron_prefix.training.model import build_model_chunks, model_shape
from megatron_prefix.training.optimizer import build_optimizer, build_scheduler
from megatron_prefix.training.runtime import runtime
from megatron_prefix.training.step import train_step
from tests.distributed import RankError, run_distributed
from tests.megatron.models import TRAINING, model_config

SETTINGS = OptimizerSettings(lr=1e-2, weight_decay=0.1, lr_decay_style="cosine", lr_decay_steps=10)


def _groups(seed: int) -> list[RolloutGroup]:
    rng = np.random.default_rng(seed)
    return [
        RolloutGroup(
            prompt=tuple(rng.integers(0, 61, 6).tolist()),
            responses=tuple(tuple(rng.integers(0, 61, n).tolist()) for n in (3, 5, 1)),
            rewards=(0.0, 1.0, 0.5),
            source=f"group {i}",
        )
        for i in range(4)
    ]


def _run(
    rank: int,
    world_size: int,
    layout: dict[str, int],
    folder: Path,
    steps: range,
    *,
    load: bool,
    save: bool,
    dtype: str = "float64",
) -> FullTensors | None:
    """Train for `steps` (after loading), optionally save, and return the whole parameters."""
    parallel = ParallelConfig(**layout)
    training = dataclasses.replace(TRAINING, dtype=dtype)
    config = model_config({"num_layers": 4}, vocab_size=64)
    with runtime(
        parallel, device="cpu", seed=rank, timeout_minutes=1, float64=dtype == "float64"
    ) as place:
        chunks = build_model_chunks(config, parallel, training, use_distributed_optimizer=True)
        optimizer = build_optimizer(SETTINGS, chunks)
        scheduler = build_scheduler(SETTINGS, optimizer, total_steps=10)
        checkpoints = CheckpointFolder(folder, keep=1)
        if load:
            state = checkpoints.load_latest(chunks, optimizer, scheduler)
            assert state["step"] == steps.start
        packing = PackingConfig(
            token_budget=64,
            data_parallel_size=place.data_parallel_size,
            model_shape=model_shape(config, chunks.config),
            pad_to_multiple=parallel.tensor_model_parallel_size,
            microbatch_multiple=2,
        )
        for step in steps:
            minibatch = build_minibatch(
                _groups(step),
                ObjectiveConfig(),
                packing,
                data_parallel_rank=place.data_parallel_rank,
                device=place.device,
            )
            train_step(chunks, optimizer, scheduler, minibatch.batches, ObjectiveConfig())
        if save:
            checkpoints.save(steps.stop, chunks, optimizer, scheduler, state={"step": steps.stop})
        return full_parameters(chunks)


def _train(
    world_size: int, layout: dict[str, int], folder: Path, steps: range, **options: Any
) -> FullTensors:
    return run_distributed(_run_with, world_size, layout, folder, steps, options)[0]


def _run_with(
    rank: int,
    world_size: int,
    layout: dict[str, int],
    folder: Path,
    steps: range,
    options: dict[str, Any],
) -> FullTensors | None:
    return _run(rank, world_size, layout, folder, steps, **options)


def _assert_identical(found: FullTensors, expected: FullTensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


TENSOR = {"tensor_model_parallel_size": 2}
PIPELINE = {"pipeline_model_parallel_size": 2}
INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(2, TENSOR), (2, INTERLEAVED), (2, {})],
    ids=["tensor", "interleaved", "data"],
)
def test_a_resumed_run_continues_bit_for_bit(
    tmp_path: Path, world_size: int, layout: dict[str, int], dtype: str
) -> None:
    undisturbed = _train(
        world_size, layout, tmp_path / "a", range(4), load=False, save=False, dtype=dtype
    )
    _train(world_size, layout, tmp_path / "b", range(2), load=False, save=True, dtype=dtype)
    resumed = _train(
        world_size, layout, tmp_path / "b", range(2, 4), load=True, save=False, dtype=dtype
    )
    _assert_identical(resumed, undisturbed)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(2, TENSOR), (2, PIPELINE), (2, INTERLEAVED), (2, {})],
    ids=["tensor", "pipeline", "interleaved", "data"],
)
def test_another_layout_loads_the_same_weights_and_optimizer_state(
    tmp_path: Path, world_size: int, layout: dict[str, int]
) -> None:
    saved = _train(1, {}, tmp_path, range(2), load=False, save=True)
    loaded = _train(world_size, layout, tmp_path, range(2, 2), load=True, save=False)
    _assert_identical(loaded, saved)
    # The optimizer's state shows in the next steps; float64 rounding is all that may differ.
    expected = _train(1, {}, tmp_path, range(2, 4), load=True, save=False)
    continued = _train(world_size, layout, tmp_path, range(2, 4), load=True, save=False)
    for name, tensor in expected.items():
        torch.testing.assert_close(continued[name], tensor, rtol=1e-9, atol=1e-11, msg=name)


def test_a_checkpoint_that_was_cut_off_is_never_read(tmp_path: Path) -> None:
    _train(1, {}, tmp_path, range(1), load=False, save=True)
    (tmp_path / "step_000007.partial").mkdir()
    (tmp_path / "step_000007.partial" / "metadata.json").write_text("{")
    assert CheckpointFolder(tmp_path, keep=1).steps() == [1]
    _train(1, {}, tmp_path, range(1, 2), load=True, save=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002"]


def test_a_model_of_another_size_is_refused_by_the_checkpoints_name(tmp_path: Path) -> None:
    _train(1, {}, tmp_path, range(1), load=False, save=True)
    with pytest.raises(RankError, match=r"step_000001: does not fit this model"):
        run_distributed(_load_into_a_larger_model, 1, tmp_path)


def _load_into_a_larger_model(rank: int, world_size: int, folder: Path) -> None:
    with runtime(ParallelConfig(), device="cpu", seed=0, timeout_minutes=1, float64=True):
        chunks = build_model_chunks(
            model_config({"num_layers": 4, "ffn_hidden_size": 64}, vocab_size=64),
            ParallelConfig(),
            TRAINING,
            use_distributed_optimizer=True,
        )
        optimizer = build_optimizer(SETTINGS, chunks)
        CheckpointFolder(folder, keep=1).load_latest(
            chunks, optimizer, build_scheduler(SETTINGS, optimizer, total_steps=1)
        )

"""Checkpoints: exact at the same layout, whole at any other, never half-written."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.checkpoints.folder import CheckpointFolder
from megatron_prefix.config import OptimizerSettings, ParallelConfig
from megatron_prefix.config.packing import packing_of_run
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.megatron.torch_adam import initialise_adam
from megatron_prefix.model.build import build_model_chunks, model_shape
from megatron_prefix.model.full_tensors import FullTensors, full_parameters
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.rollouts.records import RolloutGroup
from megatron_prefix.training.minibatch import build_minibatch
from megatron_prefix.training.optimizer import build_optimizer, build_scheduler
from megatron_prefix.training.step import train_step
from tests.distributed import RankError, run_distributed
from tests.megatron.models import (
    HAS_GATED_DELTA_NET,
    HAS_HYBRID_MODEL,
    HYBRID,
    MAMBA,
    TRAINING,
    model_config,
    relative_error,
)
from tests.small_disk import SmallDisk

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
    *,
    folder: Path,
    steps: range,
    load: bool = False,
    save: bool = False,
    dtype: str = "float64",
    sharded: bool = True,
    model: dict[str, Any] | None = None,
) -> FullTensors | None:
    """Train for `steps` (after loading), optionally save, and return the whole parameters."""
    parallel = ParallelConfig(**layout)
    training = dataclasses.replace(TRAINING, dtype=dtype)
    options = {"transformer": {"num_layers": 4}, **(model or {})}
    config = model_config(**options, vocab_size=64)
    with runtime(
        parallel, device="cpu", seed=rank, timeout_minutes=1, float64=dtype == "float64"
    ) as place:
        chunks = build_model_chunks(config, parallel, training, use_distributed_optimizer=sharded)
        settings = dataclasses.replace(SETTINGS, use_distributed_optimizer=sharded)
        optimizer = build_optimizer(settings, chunks)
        scheduler = build_scheduler(SETTINGS, optimizer, total_steps=10)
        checkpoints = CheckpointFolder(folder, keep=1)
        if load:
            state = checkpoints.load_latest(chunks, optimizer, scheduler)
            assert state["step"] == steps.start
        packing = dataclasses.replace(
            packing_of_run(
                dataclasses.replace(training, token_budget=64),
                parallel,
                model_shape=model_shape(config, chunks.config),
                data_parallel_size=place.data_parallel_size,
            ),
            microbatch_multiple=2,
        )
        for step in steps:
            minibatch = build_minibatch(
                _groups(step),
                ObjectiveConfig(),
                packing,
                attention=AttentionSetup.of(
                    chunks.config,
                    place.device,
                    context_parallel_group=place.context_parallel_group,
                ),
                data_parallel_rank=place.data_parallel_rank,
            )
            train_step(chunks, optimizer, scheduler, minibatch.batches, ObjectiveConfig())
        if save:
            checkpoints.save(steps.stop, chunks, optimizer, scheduler, state={"step": steps.stop})
            # Else a killed rank would leave them behind.
            assert not multiprocessing.active_children()
        return full_parameters(chunks)


def _train(
    world_size: int, layout: dict[str, int], phases: list[dict[str, Any]]
) -> list[FullTensors]:
    """The whole parameters after each phase: an argument set of `_run`, begun from nothing."""
    return run_distributed(_run_phases, world_size, layout, phases, timeout=240)[0]


def _run_phases(
    rank: int, world_size: int, layout: dict[str, int], phases: list[dict[str, Any]]
) -> list[FullTensors | None]:
    return [_run(rank, world_size, layout, **phase) for phase in phases]


def _assert_identical(found: FullTensors, expected: FullTensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


TENSOR = {"tensor_model_parallel_size": 2}
PIPELINE = {"pipeline_model_parallel_size": 2}
CONTEXT = {"context_parallel_size": 2}
INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("layout", "dtype", "sharded"),
    [
        (TENSOR, "float32", True),
        (INTERLEAVED, "bfloat16", True),
        (CONTEXT, "float32", True),
        ({}, "bfloat16", True),
        ({}, "float32", False),
    ],
    ids=["tensor", "interleaved", "context", "data", "data, whole optimizer"],
)
def test_a_resumed_run_continues_bit_for_bit(
    tmp_path: Path, layout: dict[str, int], dtype: str, sharded: bool
) -> None:
    common = {"folder": tmp_path, "dtype": dtype, "sharded": sharded}
    undisturbed, _, resumed = _train(
        2,
        layout,
        [
            {**common, "steps": range(4)},
            {**common, "steps": range(2), "save": True},
            {**common, "steps": range(2, 4), "load": True},
        ],
    )
    _assert_identical(resumed, undisturbed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FullTensors, FullTensors]:
    """A checkpoint of one process, its parameters, and those two steps later."""
    folder = tmp_path_factory.mktemp("saved")
    # Megatron stores the optimizer's weights in float32, so float64 would come back rounded.
    common = {"folder": folder, "dtype": "float32"}
    parameters, continued = _train(
        1,
        {},
        [
            {**common, "steps": range(2), "save": True},
            {**common, "steps": range(2, 4), "load": True},
        ],
    )
    return folder, parameters, continued


@pytest.mark.parametrize(
    "layout",
    [TENSOR, PIPELINE, INTERLEAVED, CONTEXT, {}],
    ids=["tensor", "pipeline", "interleaved", "context", "data"],
)
def test_another_layout_loads_the_same_weights_and_optimizer_state(
    saved: tuple[Path, FullTensors, FullTensors], layout: dict[str, int]
) -> None:
    folder, parameters, expected = saved
    common = {"folder": folder, "dtype": "float32"}
    loaded, continued = _train(
        2,
        layout,
        [
            {**common, "steps": range(2, 2), "load": True},
            {**common, "steps": range(2, 4), "load": True},
        ],
    )
    _assert_identical(loaded, parameters)
    # The optimizer's state shows in the next steps: without it they would differ by 1e-2 (the
    # learning rate); the order of float32 sums is all that may differ.
    for name, tensor in expected.items():
        assert relative_error(continued[name], tensor) < 1e-4, name


RECURRENT = {"gated delta nets": {"transformer": {"num_layers": 4, **HYBRID}}}
if HAS_HYBRID_MODEL:
    RECURRENT["Mamba"] = {"transformer": MAMBA, "hybrid_layer_pattern": "M*-M"}


@pytest.mark.skipif(not HAS_GATED_DELTA_NET, reason="megatron-core before 0.16")
@pytest.mark.parametrize("model", RECURRENT.values(), ids=RECURRENT.keys())
def test_projections_of_recurrent_layers_are_divided_anew_by_another_layout(
    tmp_path: Path, model: dict[str, Any]
) -> None:
    """A rank has its heads' part of queries, keys, values and gates, one behind the other."""
    common = {"folder": tmp_path, "dtype": "float32", "model": model}
    steps = [{**common, "steps": range(2, n), "load": True} for n in (2, 4)]
    saved, undisturbed, resumed = _train(
        2,
        TENSOR,
        [
            {**common, "steps": range(2), "save": True},
            {**common, "steps": range(4)},
            steps[1],
        ],
    )
    _assert_identical(resumed, undisturbed)
    loaded, continued = _train(1, {}, steps)
    _assert_identical(loaded, saved)
    for name, tensor in undisturbed.items():
        assert relative_error(continued[name], tensor) < 1e-4, name


def test_a_checkpoint_that_was_cut_off_is_never_read(tmp_path: Path) -> None:
    _train(1, {}, [{"folder": tmp_path, "steps": range(1), "save": True}])
    (tmp_path / "step_000007.partial").mkdir()
    (tmp_path / "step_000007.partial" / "metadata.json").write_text("{")
    assert CheckpointFolder(tmp_path, keep=1).steps() == [1]
    _train(1, {}, [{"folder": tmp_path, "steps": range(1, 2), "load": True, "save": True}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002"]


def test_whatever_a_full_disk_cuts_off_is_reported_as_that_and_leaves_the_rest(
    tmp_path: Path,
) -> None:
    with SmallDisk(tmp_path / "disk", 2**24) as disk:
        run_distributed(_fill, 1, disk, timeout=240)


def _fill(rank: int, world_size: int, disk: SmallDisk) -> None:
    """Try a second checkpoint with more and more room for it."""
    config = model_config({"num_layers": 2}, vocab_size=64)
    training = dataclasses.replace(TRAINING, dtype="float32")
    with runtime(ParallelConfig(), device="cpu", seed=0, timeout_minutes=1):
        chunks = build_model_chunks(
            config, ParallelConfig(), training, use_distributed_optimizer=True
        )
        optimizer = build_optimizer(SETTINGS, chunks)
        initialise_adam(optimizer)
        contents = chunks, optimizer, build_scheduler(SETTINGS, optimizer, total_steps=1)
        checkpoints = CheckpointFolder(disk.path, keep=3)
        first = checkpoints.save(1, *contents, state={})
        needed = disk.used
        coarse, fine = needed // 8, 4096  # the last files are small: the table of contents, state
        rooms = [*range(0, needed - coarse, coarse), *range(needed - coarse, 2 * needed, fine)]
        failures = 0
        for room in rooms:
            disk.resize(needed + room)
            try:
                checkpoints.save(2, *contents, state={})
                break
            except ValueError as error:
                message = str(error)
            failures += 1
            assert message.startswith(f"{disk.path}/step_000002: could not be written: ")
            assert "No space left on device; the checkpoints before it are as they" in message
            assert list(disk.path.iterdir()) == [first]
        assert failures >= 10
        assert checkpoints.steps() == [1, 2]


def test_a_writer_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"output\.checkpoint_writer: nvrx .*: mcore$"):
        CheckpointFolder(tmp_path, keep=1, writer="nvrx")


def test_a_model_of_another_size_is_refused_by_the_checkpoints_name(
    saved: tuple[Path, FullTensors, FullTensors],
) -> None:
    with pytest.raises(RankError, match=r"step_000002: does not fit this model: .*linear_fc1"):
        run_distributed(_load_into_another_model, 1, saved[0], {"ffn_hidden_size": 64})


def test_a_tensor_that_a_checkpoint_has_not_is_named_alone(
    saved: tuple[Path, FullTensors, FullTensors],
) -> None:
    fault = r"model: it has no decoder\.layers\.\S+\.[qk]_layernorm\.weight\. Set the model section"
    with pytest.raises(RankError, match=fault):
        run_distributed(_load_into_another_model, 1, saved[0], {"qk_layernorm": True})


def _load_into_another_model(
    rank: int, world_size: int, folder: Path, changes: dict[str, Any]
) -> None:
    with runtime(ParallelConfig(), device="cpu", seed=0, timeout_minutes=1, float64=True):
        chunks = build_model_chunks(
            model_config({"num_layers": 4, **changes}, vocab_size=64),
            ParallelConfig(),
            TRAINING,
            use_distributed_optimizer=True,
        )
        optimizer = build_optimizer(SETTINGS, chunks)
        CheckpointFolder(folder, keep=1).load_latest(
            chunks, optimizer, build_scheduler(SETTINGS, optimizer, total_steps=1)
        )

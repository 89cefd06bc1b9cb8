"""A frozen expert bias, through training steps and a checkpoint.

That routing by it is exact with shared prefixes is tested in `test_layers.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from megatron_prefix.checkpoints.folder import CheckpointFolder
from megatron_prefix.config import OptimizerSettings, ParallelConfig
from megatron_prefix.config.packing import packing_of_run
from megatron_prefix.model.build import ModelChunks, build_model_chunks, model_shape
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.rollouts.records import RolloutGroup
from megatron_prefix.training.minibatch import build_minibatch
from megatron_prefix.training.optimizer import build_optimizer, build_scheduler
from megatron_prefix.training.step import train_step
from tests.megatron.models import ON_CPU, TRAINING, model_config, single_process

MODEL = model_config(
    {
        "num_moe_experts": 4,
        "moe_ffn_hidden_size": 24,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
    },
    vocab_size=64,
)
SETTINGS = OptimizerSettings(lr=1e-2)


def _biases(chunks: ModelChunks) -> list[torch.Tensor]:
    return [layer.mlp.router.expert_bias for layer in chunks.bare[0].decoder.layers]


def _groups() -> list[RolloutGroup]:
    rng = np.random.default_rng(0)
    return [
        RolloutGroup(
            prompt=tuple(rng.integers(0, 61, 6).tolist()),
            responses=tuple(tuple(rng.integers(0, 61, n).tolist()) for n in (3, 5)),
            rewards=(0.0, 1.0),
            source="group",
        )
    ]


def test_steps_leave_it_as_it_is_and_a_checkpoint_keeps_it(tmp_path: Path) -> None:
    expected = [torch.tensor([0.3, -0.2, 0.1, 0.0]), torch.tensor([-0.1, 0.0, 0.2, -0.4])]
    checkpoints = CheckpointFolder(tmp_path, keep=1)
    with single_process():
        chunks = build_model_chunks(
            MODEL, ParallelConfig(), TRAINING, use_distributed_optimizer=True
        )
        for bias, value in zip(_biases(chunks), expected, strict=True):
            bias.copy_(value)
        optimizer = build_optimizer(SETTINGS, chunks)
        scheduler = build_scheduler(SETTINGS, optimizer, total_steps=2)
        packing = packing_of_run(
            TRAINING,
            ParallelConfig(),
            model_shape=model_shape(MODEL, chunks.config),
            data_parallel_size=1,
        )
        batches = build_minibatch(
            _groups(),
            ObjectiveConfig(),
            packing,
            attention=ON_CPU,
            data_parallel_rank=0,
        ).batches
        before = chunks.bare[0].decoder.layers[0].mlp.router.weight.clone()
        for _ in range(2):
            train_step(chunks, optimizer, scheduler, batches, ObjectiveConfig())
        assert not torch.equal(chunks.bare[0].decoder.layers[0].mlp.router.weight, before)
        assert all(map(torch.equal, _biases(chunks), expected))
        checkpoints.save(2, chunks, optimizer, scheduler, state={"step": 2})
        checkpoints.finish()
    with single_process():
        chunks = build_model_chunks(
            MODEL, ParallelConfig(), TRAINING, use_distributed_optimizer=True
        )
        assert not any(bias.any() for bias in _biases(chunks))
        optimizer = build_optimizer(SETTINGS, chunks)
        scheduler = build_scheduler(SETTINGS, optimizer, total_steps=2)
        checkpoints.load_latest(chunks, optimizer, scheduler)
        assert all(map(torch.equal, _biases(chunks), expected))

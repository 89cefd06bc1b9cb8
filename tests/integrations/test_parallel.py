"""A framework's model trains the same with and without shared prefixes, in its parallel layouts."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from megatron.core.transformer.moe.router import TopKRouter

from megatron_prefix.config import ParallelConfig
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.integrations import share_prefixes, token_counter
from megatron_prefix.training.step import finalize_without_division
from tests.distributed import run_distributed
from tests.integrations.framework import (
    Output,
    build_chunks,
    lean_scores_of,
    logits_of,
    losses_of,
    pack_batch,
    random_sequences,
    scores_of,
    train,
    worst_error,
)
from tests.megatron.models import TRAINING, model_config

TOLERANCE = 1e-10
"""Of relative L2 errors in float64."""

EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16}

LAYOUTS: dict[str, tuple[int, ParallelConfig, dict[str, Any], str]] = {
    "tensor and sequence parallel": (
        2,
        ParallelConfig(tensor_model_parallel_size=2),
        {},
        "none",
    ),
    "two stages": (2, ParallelConfig(pipeline_model_parallel_size=2), {}, "none"),
    "two stages of two chunks": (
        2,
        ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        {"num_layers": 4},
        "full",
    ),
    "expert parallel": (2, ParallelConfig(expert_model_parallel_size=2), EXPERTS, "none"),
    "tensor, sequence and expert parallel, layers computed again": (
        2,
        ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2),
        EXPERTS,
        "full",
    ),
    "data parallel, layers computed again": (2, ParallelConfig(), {}, "full"),
    "attention computed again": (1, ParallelConfig(), {}, "selective"),
}
OUTPUTS: dict[str, tuple[Output, Output]] = {
    "logits": (logits_of, logits_of),
    "losses of labels": (losses_of, losses_of),
    "log-probabilities without logits": (scores_of, lean_scores_of),
}
"""What a framework asks the plain model for, and the model that shares prefixes."""


def _errors(rank: int, world_size: int, layout: str) -> tuple[dict[str, float], float]:
    """Of outputs and gradients, and the part of the tokens that was not computed."""
    _, parallel, transformer, recompute = LAYOUTS[layout]
    training = dataclasses.replace(TRAINING, recompute=recompute)
    with runtime(parallel, device="cpu", seed=3, timeout_minutes=2, float64=True) as place:
        chunks, _ = build_chunks(model_config(transformer), parallel, training)
        rng = np.random.default_rng(place.data_parallel_rank)
        batches = [
            pack_batch(random_sequences(rng, [(12, [3, 1, 5]), (9, [2, 4])]), pad_each_to=4),
            pack_batch(random_sequences(rng, [(15, [2, 2])]), pad_sequence_to=8),
            # Nothing is shared here.
            pack_batch(random_sequences(rng, [(5, [3]), (1, [1])]), pad_sequence_to=2),
            pack_batch([*random_sequences(rng, [(20, [1, 4, 2])]), [7]], pad_each_to=2),
        ]
        expected = {name: train(chunks, batches, plain) for name, (plain, _) in OUTPUTS.items()}
        for chunk in chunks:
            share_prefixes(chunk)
        errors = {}
        for name, (_, sharing) in OUTPUTS.items():
            outputs, gradients = train(chunks, batches, sharing)
            of_plain, gradients_of_plain = expected[name]
            errors[name] = worst_error(dict(enumerate(outputs)), dict(enumerate(of_plain)))
            errors[f"gradients of {name}"] = worst_error(gradients, gradients_of_plain)
        return errors, token_counter(chunks).saved_fraction


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_gradients_are_those_of_the_row_with_all_repetitions(layout: str) -> None:
    world_size = LAYOUTS[layout][0]
    for errors, saved in run_distributed(_errors, world_size, layout, init_process_group=False):
        assert max(errors.values()) <= TOLERANCE, errors
        assert saved > 0.1


def _errors_of_router_losses(rank: int, world_size: int, per_token: bool) -> float:
    """Of gradients, in rows without padding, which Megatron's own losses would count."""
    model = model_config(
        {
            **EXPERTS,
            "moe_z_loss_coeff": 0.3,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 0.5,
        }
    )
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    with runtime(parallel, device="cpu", seed=3, timeout_minutes=2, float64=True):
        chunks, config = build_chunks(model, parallel)
        config.calculate_per_token_loss = per_token
        config.finalize_model_grads_func = finalize_without_division
        for module in chunks[0].modules():
            if isinstance(module, TopKRouter):
                module.calculate_per_token_loss = per_token
        rng = np.random.default_rng(0)
        shapes = [[(40, [3, 1, 6]), (9, [2, 4])], [(30, [2, 2])]]
        batches = [pack_batch(random_sequences(rng, groups)) for groups in shapes]
        _, expected = train(chunks, batches)
        share_prefixes(chunks[0])
        _, found = train(chunks, batches)
        assert token_counter(chunks).shared_rows == len(batches)
        return worst_error(found, expected)


@pytest.mark.parametrize("per_token", [False, True], ids=["", "per token"])
def test_losses_of_routers_are_scaled_as_megatron_scales_them(per_token: bool) -> None:
    errors = run_distributed(_errors_of_router_losses, 2, per_token, init_process_group=False)
    assert max(errors) <= TOLERANCE, errors

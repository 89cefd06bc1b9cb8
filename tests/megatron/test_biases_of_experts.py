"""Biases of experts count once each in the norm of gradients, wherever the experts are.

That their gradients are exact is tested in `tests/tools/test_verify_models.py`.
"""

from __future__ import annotations

import pytest
import torch

from megatron_prefix.config import OptimizerSettings, ParallelConfig
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.model.build import build_model_chunks
from megatron_prefix.model.full_tensors import full_parameters
from megatron_prefix.training.optimizer import build_optimizer
from tests.distributed import run_distributed
from tests.megatron.models import HAS_WINDOWS, TRAINING, model_config

MODEL = model_config(
    {"num_moe_experts": 4, "moe_ffn_hidden_size": 24, "add_bias_linear": True}, vocab_size=64
)


def _norms(rank: int, world_size: int) -> tuple[float, float] | None:
    """Of gradients that are the parameters' values: the optimizer's, and that of all tensors."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1
    )
    with runtime(parallel, device="cpu", seed=3, timeout_minutes=1, float64=True):
        chunks = build_model_chunks(MODEL, parallel, TRAINING, use_distributed_optimizer=False)
        optimizer = build_optimizer(OptimizerSettings(use_distributed_optimizer=False), chunks)
        for parameter in chunks.bare[0].parameters():
            torch.nn.init.normal_(parameter)  # whatever the release has left in it
        # What tensor-parallel ranks have copies of differs now: rank 0 has what counts.
        for _, parameter in chunks.named_parameters():
            parameter.main_grad.copy_(parameter.detach())
        optimizer.prepare_grads()
        found = optimizer.get_grad_norm()
        full = full_parameters(chunks)
    if full is None:
        return None
    return float(found), float(torch.stack([x.norm() for x in full.values()]).norm())


@pytest.mark.skipif(not HAS_WINDOWS, reason="megatron-core 0.14 has no experts with biases")
def test_the_norm_of_gradients_has_every_bias_once() -> None:
    found, expected = run_distributed(_norms, 2, timeout=120)[0]
    assert found == pytest.approx(expected, rel=1e-6)  # it is summed in float32

"""Which norms a model without Transformer Engine has."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import get_tensor_model_parallel_group

from megatron_prefix.config import ParallelConfig
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.layer_spec import prefix_grouped_layer_spec
from megatron_prefix.megatron.norms import PrefixTorchNorm
from megatron_prefix.model.transformer_config import transformer_config
from tests.distributed import run_distributed
from tests.megatron.models import TRAINING, model_config


def test_with_apex_every_norm_of_a_model_is_one_that_can_run() -> None:
    # A process of its own: Megatron looks for Apex at import.
    done = subprocess.run(
        [sys.executable, "-m", "tests.megatron.build_with_apex"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 12
    for model, norms in found.items():
        normalization, _, device = model.split(", ")
        fused = normalization == "LayerNorm" and device == "gpu"
        assert norms == ["FusedLayerNorm" if fused else normalization] * 3, model


def _last_norm(rank: int, world_size: int) -> tuple[str, bool]:
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    with runtime(parallel, device="cpu", seed=3, timeout_minutes=1, float64=True):
        assert get_tensor_model_parallel_group().size() == 2
        config = transformer_config(model_config(), parallel, TRAINING)
        model = GPTModel(config, prefix_grouped_layer_spec, vocab_size=62, max_sequence_length=64)
        norm = model.decoder.final_layernorm
        return type(norm).__name__, norm.weight.sequence_parallel


def test_the_ready_layer_spec_builds_under_sequence_parallelism() -> None:
    assert run_distributed(_last_norm, 2, init_process_group=False) == [("RMSNorm", True)] * 2


def test_what_torchs_norms_do_not_have_is_refused_by_name() -> None:
    config = transformer_config(model_config(), ParallelConfig(), TRAINING)
    config.memory_efficient_layer_norm = True
    with pytest.raises(
        ValueError, match=r"memory_efficient_layer_norm=True is not an option of torch's norms"
    ):
        PrefixTorchNorm(config, 32)


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_the_weights_of_zero_centred_norms_are_less_1(normalization: str) -> None:
    config = transformer_config(model_config(), ParallelConfig(), TRAINING)
    config.normalization = normalization
    plain = PrefixTorchNorm(config, 32).double()
    config.layernorm_zero_centered_gamma = True
    centred = PrefixTorchNorm(config, 32).double()
    assert not centred.weight.any()
    with torch.no_grad():
        for parameter, of_plain in zip(centred.parameters(), plain.parameters(), strict=True):
            parameter.copy_(torch.randn_like(parameter))
            of_plain.copy_(parameter)
        plain.weight += 1
    x = torch.randn(5, 32, dtype=torch.float64)
    torch.testing.assert_close(centred(x), plain(x), rtol=1e-14, atol=1e-14)

"""Fewer query groups than tensor-parallel ranks, which Megatron shares between ranks since 0.16."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prefix.config import ParallelConfig
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.layer_spec import prefix_grouped
from megatron_prefix.layout import pack
from megatron_prefix.model.transformer_config import transformer_config
from tests.distributed import run_distributed
from tests.megatron.models import (
    TRAINING,
    model_config,
    packed_logits,
    random_groups,
    relative_error,
)

PARALLEL = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=False)


def _takes_few_groups() -> bool:
    config: Any = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 4}
    try:
        TransformerConfig(**config, num_query_groups=1, tensor_model_parallel_size=2)
    except ValueError:
        return False
    return True


def _trimmed_error(rank: int, world_size: int) -> float:
    layout = pack(random_groups(np.random.default_rng(1), [(20, [4, 6])]))
    needed = np.arange(19, 29)
    with runtime(PARALLEL, device="cpu", seed=3, timeout_minutes=1, float64=True):
        # A run's own config refuses it before Megatron could.
        config = transformer_config(model_config({"num_query_groups": 2}), PARALLEL, TRAINING)
        config = dataclasses.replace(config, num_query_groups=1)
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
        model = GPTModel(config, prefix_grouped(spec), vocab_size=62, max_sequence_length=64)
        whole = packed_logits(model, layout)
        return relative_error(packed_logits(model, layout, needed)[needed], whole[needed])


@pytest.mark.skipif(not _takes_few_groups(), reason="this megatron-core refuses it")
def test_a_trimmed_last_layer_computes_what_the_whole_layer_does() -> None:
    for error in run_distributed(_trimmed_error, 2, init_process_group=False):
        assert error <= 1e-12

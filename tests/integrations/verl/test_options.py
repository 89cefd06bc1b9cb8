"""What is asked of the integration, and what of verl's options it refuses by name."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from verl.workers.config import McoreEngineConfig
from verl.workers.config.engine import EngineRouterReplayConfig, QATEngineConfig
from verl.workers.config.model import MtpConfig

from megatron_prefix.integrations.verl.engine import PrefixMegatronEngine
from megatron_prefix.integrations.verl.options import (
    PrefixOptions,
    refuse_in_batch,
    refuse_verl_options,
)
from megatron_prefix.integrations.verl.samples import temperature_of


def model_config(**changed: Any) -> Any:
    """The fields of `HFModelConfig` that are read; building one reads a model's folder."""
    values = {
        "hf_config": types.SimpleNamespace(model_type="qwen3"),
        "mtp": MtpConfig(),
        "use_fused_kernels": False,
    }
    return types.SimpleNamespace(**{**values, **changed})


def engine_config(**changed: Any) -> McoreEngineConfig:
    return McoreEngineConfig(**changed)


def test_without_options_it_is_on() -> None:
    assert PrefixOptions.of({}) == PrefixOptions.of(None) == PrefixOptions()
    assert PrefixOptions().enabled and PrefixOptions().split_groups == "refuse"


def test_false_turns_it_off() -> None:
    assert not PrefixOptions.of({"megatron_prefix": False}).enabled
    assert not PrefixOptions.of({"megatron_prefix": {"enabled": False}}).enabled


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"kernl": "x"}, r"megatron_prefix\.kernl: no such option; there are enabled, kernel"),
        ({"split_groups": "maybe"}, "split_groups: 'maybe' must be 'refuse' or 'allow'"),
        ({"log_prob_chunk_tokens": 0}, "log_prob_chunk_tokens: 0 must be at least 1"),
        (3, "megatron_prefix: 3 must be a mapping"),
    ],
)
def test_a_wrong_option_is_named(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixOptions.of({"megatron_prefix": value})


def test_verls_defaults_are_not_refused() -> None:
    refuse_verl_options(model_config(), engine_config())


@pytest.mark.parametrize(
    ("model", "engine", "message"),
    [
        ({"use_fused_kernels": True}, {}, "model.use_fused_kernels=True"),
        ({}, {"use_fused_kernels": True}, "model.use_fused_kernels=True"),
        ({"mtp": MtpConfig(enable=True)}, {}, "model.mtp.enable=True"),
        (
            {"hf_config": types.SimpleNamespace(model_type="qwen3_vl", vision_config={})},
            {},
            "the model qwen3_vl has a vision_config",
        ),
        ({}, {"use_remove_padding": False}, r"model.use_remove_padding=False \(.*bshd\)"),
        ({}, {"router_replay": EngineRouterReplayConfig(mode="R2")}, "router_replay.mode='R2'"),
        (
            {},
            {"dynamic_context_parallel": True, "max_seqlen_per_dp_cp_rank": 64},
            "megatron.dynamic_context_parallel=True",
        ),
        ({}, {"pad_to_length": True}, "megatron.pad_to_length=True"),
        ({}, {"use_megatron_fsdp": True}, "megatron.use_megatron_fsdp=True"),
        ({}, {"qat": QATEngineConfig(enable=True)}, "megatron.qat.enable=True"),
    ],
)
def test_an_engine_is_refused_before_it_is_built(
    model: dict[str, Any], engine: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        PrefixMegatronEngine(model_config(**model), engine_config(**engine), None, None)
    text = str(raised.value)
    assert "\n" not in text
    assert "set override_mcore_model_config.megatron_prefix=false" in text


@pytest.mark.parametrize(
    "name", ["distillation_use_topk", "calculate_sum_pi_squared", "enable_routing_replay"]
)
def test_a_batch_that_needs_logits_is_refused(name: str) -> None:
    refuse_in_batch({name: False})
    with pytest.raises(ValueError, match=f"{name}=True"):
        refuse_in_batch({name: True})


def test_a_batch_has_one_temperature() -> None:
    assert temperature_of({"temperature": 0.75}) == 0.75
    assert temperature_of({"temperature": torch.full((3,), 0.75)}) == 0.75
    with pytest.raises(ValueError, match=r"temperatures from 0\.5 to 1\.0"):
        temperature_of({"temperature": torch.tensor([0.5, 1.0])})

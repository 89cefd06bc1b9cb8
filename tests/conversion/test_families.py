"""What one family says and Megatron cannot compute is refused by name, in both directions."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_prefix.conversion import ConversionError
from megatron_prefix.conversion.architecture import FAMILIES, Architecture
from megatron_prefix.conversion.hf_config import (
    REFUSED,
    SAME_AS,
    config_values,
    read_architecture,
)
from megatron_prefix.conversion.hf_folder import write_json
from megatron_prefix.conversion.model_section import from_model_config, to_model_config
from tests.conversion.models import CASES, GPT_OSS, MINIMAX, QWEN2_MOE, QWEN3_NEXT, SIZES, YARN
from tests.readmes import ROOT

DEEPSEEK, GLM, WINDOWS = "deepseek_v3, yarn", "glm4_moe", "qwen3, windows in some layers"


def _architecture(folder: Path, case: str, **changes: Any) -> Architecture:
    """Of a config.json without weights."""
    family, options = CASES[case]
    values = {
        "num_experts_per_tok": 2,
        **SIZES,
        **options,
        "hidden_act": "silu",
        "model_type": family,
        **changes,
    }
    write_json(folder / "config.json", values)
    return read_architecture(folder)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (DEEPSEEK, {"rope_interleave": False}, r"rope_interleave: False"),
        (DEEPSEEK, {"attention_bias": True}, r"attention_bias: (t|T)rue"),
        (DEEPSEEK, {"num_key_value_heads": 2}, r"num_key_value_heads: 2 .*num_attention_heads: 4"),
        (DEEPSEEK, {"norm_topk_prob": False}, r"norm_topk_prob: False with .*per_tok: 4"),
        (DEEPSEEK, {"topk_group": 1}, r"topk_group: 1 with .* by its 4 best"),
        (DEEPSEEK, {"scoring_func": "softmax"}, r"scoring_func: 'softmax'"),
        (DEEPSEEK, {"rope_parameters": {**YARN, "mscale_all_dim": 1.0}}, r"all_dim: 1.0 without"),
        (DEEPSEEK, {"rope_parameters": {**YARN, "truncate": False}}, r"truncate: false"),
        (DEEPSEEK, {"rope_parameters": {**YARN, "attention_factor": 2.0}}, r"attention_factor"),
        (GLM, {"rope_parameters": YARN}, r"rope_type: 'yarn' is not supported with glm4_moe"),
        (GPT_OSS, {"attention_bias": False}, r"attention_bias: False with mlp_bias: True"),
        (GPT_OSS, {"swiglu_alpha": 1.5}, r"swiglu_alpha: 1.5 .* 1.702"),
        (QWEN2_MOE, {"use_sliding_window": True}, r"use_sliding_window: True"),
        (QWEN2_MOE, {"decoder_sparse_step": 4}, r"decoder_sparse_step: 4 leaves no layer"),
        (WINDOWS, {"layer_types": ["chunked_attention"] * 3}, r"layer_types"),
        ("qwen2", {"model_type": "qwen3_5_moe"}, r"'qwen3_5_moe' is not supported: .*images too"),
        ("qwen2", {"model_type": "glm_moe_dsa"}, r"'glm_moe_dsa' is not supported: .*indexer"),
        (MINIMAX, {"qk_norm_type": "per_head"}, r"qk_norm_type: 'per_head' .* 'per_layer'"),
        (MINIMAX, {"attn_type_list": [1, 0]}, r"attn_type_list: \[1, 0\] has layers"),
        (MINIMAX, {"scoring_func": "softmax"}, r"scoring_func: 'softmax'"),
        (MINIMAX, {"shared_intermediate_size": 8}, r"shared_intermediate_size: 8"),
        (MINIMAX, {"router_jitter_noise": 0.1}, r"router_jitter_noise: 0.1"),
    ],
)
def test_a_config_that_megatron_cannot_compute_is_refused(
    tmp_path: Path, case: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConversionError, match=message):
        _architecture(tmp_path, case, **changes)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (DEEPSEEK, {"moe_router_enable_expert_bias": False}, r"enable_expert_bias: False"),
        (DEEPSEEK, {"moe_layer_freq": [1, 0, 1]}, r"a dense layer after experts"),
        (DEEPSEEK, {"moe_shared_expert_intermediate_size": 25}, r"intermediate_size: 25"),
        (DEEPSEEK, {"moe_shared_expert_intermediate_size": None}, r"intermediate_size: None"),
        (DEEPSEEK, {"qk_layernorm": False}, r"qk_layernorm: false"),
        (DEEPSEEK, {"window_size": [3, 0]}, r"window_size .* deepseek_v3"),
        (GLM, {"add_bias_linear": True}, r"add_bias_linear: true .* glm4_moe"),
        (GPT_OSS, {"softmax_type": "vanilla"}, r"softmax_type: learnable and .* which has both"),
        (GPT_OSS, {"softmax_type": "off-by-one"}, r"softmax_type: 'off-by-one'"),
        (GPT_OSS, {"glu_linear_offset": 0.0}, r"glu_linear_offset: 0.0"),
        (GPT_OSS, {"activation_func_clamp_value": None}, r"clamp_value: None"),
        (GPT_OSS, {"add_bias_linear": False}, r"add_bias_linear: false .* gpt_oss"),
        (GPT_OSS, {"moe_layer_freq": [0, 1]}, r"a layer without experts"),
        (GPT_OSS, {"qk_layernorm": True}, r"qk_layernorm: true .* gpt_oss"),
        (MINIMAX, {"moe_router_num_groups": 2, "moe_router_group_topk": 1}, r"router_num_groups"),
        (MINIMAX, {"moe_router_topk_scaling_factor": 2.0}, r"topk_scaling_factor .* minimax_m2"),
        (MINIMAX, {"add_qkv_bias": True}, r"add_qkv_bias .* minimax_m2"),
        (QWEN2_MOE, {"moe_shared_expert_intermediate_size": None}, r"no shared expert"),
        (QWEN2_MOE, {"qk_layernorm": True}, r"qk_layernorm: true .* qwen2_moe"),
        ("llama, tied", {"softmax_type": "learnable"}, r"softmax_type: learnable"),
        ("llama, tied", {"mtp_num_layers": 1}, r"mtp_num_layers: 1 is nothing .* of llama can say"),
        (
            QWEN3_NEXT,
            {"mtp_num_layers": 1},
            r"mtp_num_layers: 1 with a gated delta net as the last",
        ),
        ("mixtral", {"moe_shared_expert_intermediate_size": 24}, r"without .*sigmoid"),
        ("mistral, window", {"add_bias_linear": True}, r"add_bias_linear: true with window_size"),
    ],
)
def test_a_model_section_that_no_family_has_is_refused(
    tmp_path: Path, case: str, changes: dict[str, Any], message: str
) -> None:
    section = to_model_config(_architecture(tmp_path, case))
    section = dataclasses.replace(section, transformer={**section.transformer, **changes})
    with pytest.raises(ConversionError, match=message):
        from_model_config(section)


def test_layers_get_the_windows_that_transformers_gives_them(tmp_path: Path) -> None:
    by_layer = _architecture(tmp_path, WINDOWS)
    assert (by_layer.window, by_layer.windowed_layers) == (5, (False, True, True))
    transformer = to_model_config(by_layer).transformer
    # Megatron counts the keys before a query's own.
    assert transformer["window_size"] == [4, 0]
    assert transformer["window_attn_skip_freq"] == [0, 1, 1]
    everywhere = _architecture(tmp_path, "mixtral, window")
    assert everywhere.windowed_layers == (True, True)
    for changes in ({"use_sliding_window": False}, {"max_window_layers": 3}):
        assert _architecture(tmp_path, WINDOWS, **changes).window is None


def test_published_folders_of_minimax_m2_say_in_another_key_what_is_turned(tmp_path: Path) -> None:
    published = {"rope_parameters": None, "rope_theta": 5000000, "rotary_dim": 8}
    found = _architecture(tmp_path, MINIMAX, **published)
    assert (found.rotary_fraction, found.rotary_base) == (0.25, 5000000)
    written = config_values(found, "bfloat16")
    assert written["rotary_dim"] == 8


def test_a_window_in_some_layers_is_nothing_that_mistral_can_say(tmp_path: Path) -> None:
    architecture = _architecture(tmp_path, "mistral, window")
    some = dataclasses.replace(architecture, windowed_layers=(True, False))
    with pytest.raises(ConversionError, match=r"window_attn_skip_freq: .* mistral"):
        config_values(some, "bfloat16")


def test_the_table_of_families_says_what_is_converted_and_what_is_refused(tmp_path: Path) -> None:
    text = (ROOT / "megatron_prefix" / "conversion" / "README.md").read_text(encoding="utf-8")
    table = text.split("| models |")[1].split("\n\n")[0]
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for row in table.splitlines()[2:]:
        _, _, types, conversion, _, _ = row.split("|")
        refused = conversion.strip().startswith("refused")
        assert refused or conversion.strip().startswith("equal"), row
        found[refused].update(re.findall(r"`(\w+)`", types))
    assert found[False] == {*FAMILIES, *SAME_AS}
    assert found[True] == set(REFUSED)
    # Each that is equal is a case of the test that the README names.
    assert {family for family, _ in CASES.values()} == set(FAMILIES)
    for name in REFUSED:
        write_json(tmp_path / "config.json", {"model_type": name})
        with pytest.raises(ConversionError, match=rf"'{name}' is not supported: "):
            read_architecture(tmp_path)

"""Layers with shared prefixes against the unmodified GPTModel, one whole sequence at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prefix.config import ParallelConfig, YarnConfig
from megatron_prefix.config.loader import ConfigError
from megatron_prefix.layer_spec import prefix_grouped, prefix_grouped_layer_spec
from megatron_prefix.layers.attention import _PrefixCoreAttention, _PrefixSelfAttention
from megatron_prefix.layout import PrefixTree, pack
from megatron_prefix.model.transformer_config import transformer_config
from tests.megatron.models import (
    HAS_YARN,
    TRAINING,
    assert_equal_training,
    model_config,
    model_pair,
    packed_logits,
    random_groups,
    relative_error,
    sequence_logits,
    single_process,
)

SHAPES = [(9, [4, 6, 1]), (1, [5, 1]), (12, [3]), (5, [1, 17, 2])]

MODELS: dict[str, dict[str, Any]] = {
    "rope": {},
    "llama 3 scaled rope": {"rope_scaling": True, "rope_scaling_factor": 4.0},
    "partial rotary": {"rotary_percent": 0.5},
    "another rotary base": {"rotary_base": 500},
    "learned absolute positions": {"position_embedding_type": "learned_absolute"},
    "no positions": {"position_embedding_type": "none"},
    "tied embeddings": {"share_embeddings_and_output_weights": True},
    "padded vocabulary": {"make_vocab_size_divisible_by": 16},
    "qk norm": {"transformer": {"qk_layernorm": True}},
    "qk norm over all heads": {
        "qk_norm_all_heads": True,
        "transformer": {"qk_layernorm": True, "kv_channels": 16},
    },
    "biases": {"transformer": {"add_bias_linear": True, "add_qkv_bias": True}},
    "layer norm, gelu": {
        "activation": "gelu",
        "transformer": {"normalization": "LayerNorm", "gated_linear_unit": False},
    },
    "interleaved rotary": {"transformer": {"rotary_interleaved": True}},
    "multi-head": {"transformer": {"num_query_groups": 4}},
    "multi-query": {"transformer": {"num_query_groups": 1}},
    "wide heads": {"transformer": {"kv_channels": 80}},
    "softmax scale": {"transformer": {"softmax_scale": 0.7}},
    "experts": {
        "transformer": {
            "num_moe_experts": 4,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 24,
            "moe_grouped_gemm": False,
        }
    },
    "experts in every other layer": {
        "transformer": {
            "num_moe_experts": 4,
            "moe_router_topk": 2,
            "moe_layer_freq": [0, 1],
            "moe_shared_expert_intermediate_size": 16,
            "moe_ffn_hidden_size": 24,
        }
    },
    # As DeepSeek-V3 routes.
    "frozen expert bias": {
        "transformer": {
            "num_moe_experts": 8,
            "moe_ffn_hidden_size": 24,
            "moe_router_topk": 2,
            "moe_router_score_function": "sigmoid",
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
            "moe_router_topk_scaling_factor": 2.5,
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 0.0,
        }
    },
    "no rotary embedding in every other layer": {"transformer": {"no_rope_freq": 2}},
    "scores by layer number, residuals in float32": {
        "transformer": {"apply_query_key_layer_scaling": True, "fp32_residual_connection": True}
    },
}
if "moe_shared_expert_gate" in TransformerConfig.__dataclass_fields__:
    MODELS["gate of the shared expert"] = {
        "transformer": {
            "num_moe_experts": 4,
            "moe_router_pre_softmax": True,
            "moe_ffn_hidden_size": 24,
            "moe_shared_expert_intermediate_size": 16,
            "moe_shared_expert_gate": True,
            "add_qkv_bias": True,
        }
    }
if HAS_YARN:
    MODELS["yarn"] = {
        "position_embedding_type": "yarn",
        "yarn": YarnConfig(rotary_scaling_factor=4.0, original_max_position_embeddings=16),
    }


@pytest.mark.parametrize("trim_last_layer", [False, True], ids=["", "trimmed last layer"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_training_equals_the_unmodified_model(
    options: dict[str, Any], trim_last_layer: bool
) -> None:
    rng = np.random.default_rng()
    with single_process():
        reference, grouped = model_pair(model_config(**options))
        tree = random_groups(rng, SHAPES)
        assert_equal_training(reference, grouped, tree, 1e-11, trim_last_layer=trim_last_layer)


def test_a_trimmed_last_layer_computes_nothing_for_other_rows() -> None:
    tree = random_groups(np.random.default_rng(), [(30, [4, 6])])
    layout = pack(tree)
    rows: dict[str, list[int]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, inputs: rows.setdefault(name, []).append(len(inputs[0]))

    with single_process():
        _, grouped = model_pair(model_config())
        for number, layer in enumerate(grouped.decoder.layers, start=1):
            layer.self_attention.linear_qkv.register_forward_pre_hook(note(f"{number} qkv"))
            layer.self_attention.core_attention.register_forward_pre_hook(note(f"{number} query"))
            layer.self_attention.linear_proj.register_forward_pre_hook(note(f"{number} projection"))
            layer.mlp.register_forward_pre_hook(note(f"{number} mlp"))
        grouped.output_layer.register_forward_pre_hook(note("output"))
        packed_logits(grouped, layout, np.arange(29, 39))
    first = {f"1 {name}": [39] for name in ("qkv", "query", "projection", "mlp")}
    # Its keys and values do not come from the whole projection.
    last = {f"2 {name}": [10] for name in ("query", "projection", "mlp")}
    assert rows == {**first, **last, "output": [10]}


@pytest.mark.parametrize("trim_last_layer", [False, True], ids=["", "trimmed last layer"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_give_the_same_gradients(
    recompute: str, trim_last_layer: bool
) -> None:
    training = dataclasses.replace(TRAINING, recompute=recompute)
    with single_process():
        reference, grouped = model_pair(model_config(), training)
        tree = random_groups(np.random.default_rng(), SHAPES)
        assert_equal_training(reference, grouped, tree, 1e-11, trim_last_layer=trim_last_layer)


def test_deep_trees_of_common_prefixes_train_equally() -> None:
    rng = np.random.default_rng()
    stems = [rng.integers(0, 3, 20) for _ in range(3)]
    sequences = [
        np.concatenate([stems[rng.integers(3)][: rng.integers(2, 20)], rng.integers(0, 61, 5)])
        for _ in range(8)
    ]
    with single_process():
        reference, grouped = model_pair(model_config())
        assert_equal_training(reference, grouped, PrefixTree.from_sequences(sequences), 1e-11)


def test_float32_and_bfloat16_stay_within_their_rounding() -> None:
    # Two layers in each format, against the same weights in it; relative L2 error.
    for dtype, tolerance in (("float32", 2e-5), ("bfloat16", 6e-2)):
        training = dataclasses.replace(TRAINING, dtype=dtype)
        with single_process(float64=False):
            reference, grouped = model_pair(model_config(), training)
            if dtype == "bfloat16":
                reference.bfloat16()
                grouped.bfloat16()
            assert_equal_training(
                reference, grouped, random_groups(np.random.default_rng(), SHAPES), tolerance
            )


def test_a_batch_without_prefix_params_runs_as_megatrons_own() -> None:
    tokens = np.random.default_rng().integers(0, 61, 20)
    with single_process():
        reference, grouped = model_pair(model_config())
        assert torch.equal(sequence_logits(grouped, tokens), sequence_logits(reference, tokens))


def test_the_ready_layer_spec_trains_equally_and_keeps_the_parameters_names() -> None:
    config = model_config({"qk_layernorm": True})
    with single_process():
        reference, _ = model_pair(config)
        model = GPTModel(
            config=transformer_config(config, ParallelConfig(), TRAINING),
            transformer_layer_spec=prefix_grouped_layer_spec,
            vocab_size=61,
            max_sequence_length=64,
            position_embedding_type="rope",
        )
        model.load_state_dict(reference.state_dict())
        assert_equal_training(
            reference, model, random_groups(np.random.default_rng(), SHAPES), 1e-11
        )


def test_the_ready_layer_spec_says_what_it_cannot_build() -> None:
    config = model_config({"num_moe_experts": 2, "moe_layer_freq": 2, "moe_ffn_hidden_size": 8})
    with (
        single_process(),
        pytest.raises(ValueError, match=r"moe_layer_freq=2 .*get_gpt_decoder_block_spec"),
    ):
        GPTModel(
            config=transformer_config(config, ParallelConfig(), TRAINING),
            transformer_layer_spec=prefix_grouped_layer_spec,
            vocab_size=61,
            max_sequence_length=64,
        )


def test_rewriting_a_spec_leaves_the_original_alone_and_may_be_repeated() -> None:
    config = model_config()
    with single_process():
        spec = get_gpt_decoder_block_spec(
            transformer_config(config, ParallelConfig(), TRAINING), use_transformer_engine=False
        )
        grouped = prefix_grouped(prefix_grouped(spec))
    attention = spec.layer_specs[0].submodules.self_attention
    assert not issubclass(attention.module, _PrefixSelfAttention)
    for layer in grouped.layer_specs:
        attention = layer.submodules.self_attention
        assert issubclass(attention.module, _PrefixSelfAttention)
        assert issubclass(attention.submodules.core_attention, _PrefixCoreAttention)


def test_a_spec_without_self_attention_is_refused() -> None:
    mlp = get_gpt_layer_local_spec().submodules.mlp
    with pytest.raises(ValueError, match="no self attention"):
        prefix_grouped(mlp)


REFUSED: dict[str, Any] = {
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "window_size": [4, 4],
    "mrope_section": [2, 1, 1],
}
REFUSED_WITH_EXPERTS: dict[str, Any] = {
    "moe_expert_capacity_factor": 1.0,
    "moe_input_jitter_eps": 0.01,
}


@pytest.mark.parametrize("option", [*REFUSED, *REFUSED_WITH_EXPERTS])
def test_what_would_differ_from_the_repeated_prompt_is_refused_by_name(option: str) -> None:
    transformer = {option: {**REFUSED, **REFUSED_WITH_EXPERTS}[option]}
    if option in REFUSED_WITH_EXPERTS:
        transformer |= {
            "num_moe_experts": 4,
            "moe_ffn_hidden_size": 8,
            "moe_router_score_function": "sigmoid",
        }
    with pytest.raises(ConfigError, match=rf"{option}="):
        transformer_config(model_config(transformer), ParallelConfig(), TRAINING)


def test_building_the_model_refuses_too_when_the_config_is_the_users_own() -> None:
    config = transformer_config(model_config(), ParallelConfig(), TRAINING)
    config.attention_dropout = 0.1
    with single_process(), pytest.raises(ValueError, match=r"attention_dropout=0\.1 .* Set"):
        GPTModel(
            config=config,
            transformer_layer_spec=prefix_grouped(get_gpt_layer_local_spec()),
            vocab_size=61,
            max_sequence_length=64,
        )


def test_relative_error_is_zero_only_for_equals() -> None:
    values = torch.randn(5)
    assert relative_error(values, values) == 0
    assert relative_error(values + 1e-3, values) > 0


class _Adapter(torch.nn.Module):
    """A LoRA adapter around a linear layer, as frameworks put it into a model that is built."""

    def __init__(self, linear: torch.nn.Module, dropout: float) -> None:
        super().__init__()
        self.linear = linear
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> Any:
        out, bias = self.linear(x)
        return out + 0 * self.dropout(x).sum(), bias


def test_dropout_of_an_adapter_is_refused_while_training_shared_prefixes() -> None:
    layout = pack(random_groups(np.random.default_rng(), SHAPES))
    with single_process():
        _, grouped = model_pair(model_config())
        mlp = grouped.decoder.layers[1].mlp
        mlp.linear_fc1 = _Adapter(mlp.linear_fc1, 0.1)
        grouped.eval()
        packed_logits(grouped, layout)
        grouped.train()
        with pytest.raises(ValueError, match=r"layer 2, mlp\.linear_fc1\.dropout: .*p=0\.1 cannot"):
            packed_logits(grouped, layout)
        mlp.linear_fc1.dropout.p = 0.0
        packed_logits(grouped, layout)


def test_a_recurrent_layer_beside_attention_is_refused_where_it_is_built() -> None:
    block = TransformerBlockSubmodules(
        layer_specs=[
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            ModuleSpec(module=MambaLayer, submodules=MambaLayerSubmodules()),
        ]
    )
    config = transformer_config(model_config(), ParallelConfig(), TRAINING)
    with single_process(), pytest.raises(ValueError, match="MambaLayer cannot be combined with"):
        GPTModel(config, prefix_grouped(block), vocab_size=61, max_sequence_length=64)

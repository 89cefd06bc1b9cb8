"""What is refused of Megatron's options, what is not, and how it is said."""

from __future__ import annotations

from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prefix.megatron.options import (
    OPTIONS,
    Option,
    UnsupportedOptionError,
    refuse_unsupported,
)
from megatron_prefix.megatron.options.record import refused
from megatron_prefix.megatron.releases import has_global_auxiliary_loss
from tests.megatron.option_fields import what_is_wrong


def _config(**options: Any) -> TransformerConfig:
    """A config that is refused nothing but what `options` say, which Megatron does not check."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
    )
    for name, value in options.items():
        setattr(config, name, value)
    return config


def _refusal(**options: Any) -> str:
    with pytest.raises(UnsupportedOptionError) as error:
        refuse_unsupported(_config(**options))
    assert len(error.value.refusals) == 1
    return str(error.value)


EXPERTS = {"num_moe_experts": 4, "moe_router_load_balancing_type": "none"}


def test_megatrons_default_config_is_refused_both_dropouts_in_one_error() -> None:
    config = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4)
    with pytest.raises(UnsupportedOptionError) as error:
        refuse_unsupported(config)
    assert [r.option for r in error.value.refusals] == ["attention_dropout", "hidden_dropout"]
    assert str(error.value).splitlines() == [
        "2 options cannot be combined with shared prefixes:",
        "  attention_dropout=0.1: a shared prefix has one dropout mask where repeated prompts "
        "would have had many. Set attention_dropout to 0.0",
        "  hidden_dropout=0.1: a shared prefix has one dropout mask where repeated prompts would "
        "have had many. Set hidden_dropout to 0.0",
    ]


def test_what_to_set_is_right_for_python_and_for_yaml() -> None:
    assert _refusal(tp_comm_overlap=True).endswith("Set tp_comm_overlap to False")
    assert _refusal(fp8="hybrid").endswith("Set fp8 to None (null in YAML)")
    assert _refusal(transformer_impl="inference_optimized").endswith(
        "Set transformer_impl to 'transformer_engine'"
    )


def test_what_megatron_adds_to_an_error_while_it_builds_is_left_away() -> None:
    error = UnsupportedOptionError("Set a to 0 when instantiating B when instantiating C")
    assert str(error) == "Set a to 0"


VALUES: dict[str, Any] = {
    "cuda_graph_impl": "local",
    "transformer_impl": "inference_optimized",
    "gtp_weight_remat_size": 2,
    "expert_gtp_weight_remat_size": 2,
    "mlp_chunks_for_training": 2,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
}
COMBINED: dict[str, tuple[str, dict[str, Any]]] = {
    "sinkhorn": (
        "moe_router_load_balancing_type",
        {**EXPERTS, "moe_router_load_balancing_type": "sinkhorn"},
    ),
    "quantile balancing without a coefficient": (
        "moe_router_load_balancing_type",
        {**EXPERTS, "moe_router_load_balancing_type": "quantile_balancing"},
    ),
    "auxiliary loss of experts that run again": (
        "moe_aux_loss_coeff",
        {
            **EXPERTS,
            "moe_router_load_balancing_type": ["none", "seq_aux_loss"],
            "moe_aux_loss_coeff": [0.1, 0.1],
            "moe_layer_recompute": True,
        },
    ),
    "allgather over expert-parallel ranks": (
        "moe_token_dispatcher_type",
        {**EXPERTS, "expert_model_parallel_size": 2, "moe_token_dispatcher_type": "allgather"},
    ),
    "hybridep without padding": (
        "moe_token_dispatcher_type",
        {
            **EXPERTS,
            "expert_model_parallel_size": 2,
            "moe_token_dispatcher_type": "flex",
            "moe_flex_dispatcher_backend": "hybridep",
        },
    ),
    "multi-token prediction of Megatron's own GPTModel": ("mtp_num_layers", {"mtp_num_layers": 1}),
    "a window without a limit": ("window_size", {"window_size": (-1, 0)}),
    "a window that is not causal": ("window_size", {"window_size": (4, 4)}),
    "fused rotary embedding and YaRN": (
        "apply_rope_fusion",
        {"apply_rope_fusion": True, "yarn_rotary_scaling_factor": 4.0},
    ),
}
ALWAYS = [option.name for option in OPTIONS if option.kind == "refused"]


@pytest.mark.parametrize("name", [n for n in ALWAYS if not n.startswith("moe_router_load_balanc")])
def test_every_refused_option_is_refused_by_name_and_not_at_its_default(name: str) -> None:
    assert _refusal(**{name: VALUES.get(name, True)}).startswith(f"{name}=")
    refuse_unsupported(_config())


@pytest.mark.parametrize(("name", "options"), COMBINED.values(), ids=COMBINED.keys())
def test_combinations_are_refused_by_the_option_to_change(
    name: str, options: dict[str, Any]
) -> None:
    assert _refusal(**options).startswith(f"{name}=")


ALLOWED: dict[str, dict[str, Any]] = {
    "auxiliary losses": {
        **EXPERTS,
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
        "moe_aux_loss_coeff": [0.1, 0.2],
    },
    "experts that run again, an auxiliary loss with a coefficient of 0": {
        **EXPERTS,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.0,
        "moe_layer_recompute": True,
    },
    "allgather on one rank": {**EXPERTS, "moe_token_dispatcher_type": "allgather"},
    "hybridep with padding": {
        **COMBINED["hybridep without padding"][1],
        "moe_hybridep_pad_uneven_dispatch_inputs": True,
    },
    "a frozen expert bias": {
        **EXPERTS,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
    },
}


@pytest.mark.parametrize("options", ALLOWED.values(), ids=ALLOWED.keys())
def test_what_stays_exact_is_not_refused(options: dict[str, Any]) -> None:
    refuse_unsupported(_config(**options))


def test_the_global_auxiliary_loss_is_refused_where_megatron_leaves_it_out() -> None:
    options = {
        **EXPERTS,
        "moe_router_load_balancing_type": "global_aux_loss",
        "moe_aux_loss_coeff": 0.1,
    }
    if has_global_auxiliary_loss():
        refuse_unsupported(_config(**options))
    else:
        assert "this release of Megatron-Core does not compute it" in _refusal(**options)


def test_statistics_of_tokens_are_refused_with_experts_that_run_again() -> None:
    moves = {**EXPERTS, "moe_router_enable_expert_bias": True}
    refuse_unsupported(_config(**moves))
    selective = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]}
    for recompute in (selective, {"moe_layer_recompute": True}):
        message = _refusal(**moves, **recompute)
        assert message.startswith("moe_router_enable_expert_bias=True with")
        assert "moe_router_bias_update_rate=0.001" in message
        refuse_unsupported(_config(**moves, **recompute, moe_router_bias_update_rate=0.0))
        message = _refusal(**EXPERTS, **recompute, moe_z_loss_coeff=0.1)
        assert message.startswith("moe_z_loss_coeff=0.1 with recomputed experts")


def test_a_field_without_a_row_is_named_with_what_to_do() -> None:
    fields = {option.name for option in OPTIONS if option.declared and option.last is None}
    (wrong,) = what_is_wrong({*fields, "moe_tokens_from_the_moon"}, "0.19")
    assert wrong.startswith("moe_tokens_from_the_moon: megatron-core 0.19 has this option")
    assert "add one" in wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "has no such option"),
        ({"last": "0.18"}, None),
        ({"declared": False}, None),
        ({"first": "0.30"}, "are no known releases"),
    ],
)
def test_a_row_without_a_field_is_named(changes: dict[str, Any], message: str | None) -> None:
    fields = {option.name for option in OPTIONS if option.declared and option.last is None}
    row = Option(name="window_width", kind="harmless", why="a typing error", **changes)
    wrong = what_is_wrong(fields, "0.19", (*OPTIONS, row))
    assert [message in sentence for sentence in wrong] == ([True] if message else [])


def test_a_field_that_its_row_takes_for_absent_is_named() -> None:
    fields = {option.name for option in OPTIONS if option.declared and option.last is None}
    (wrong,) = what_is_wrong({*fields, "dynamic_context_parallel"}, "0.19")
    assert wrong.startswith("dynamic_context_parallel: megatron-core 0.19 has this option")


def test_rows_of_one_call_tell_to_set_their_own_name() -> None:
    first, second = refused("a", "b", when=bool, why="w", instead=0)
    config = type("Config", (), {"a": 1, "b": 1})
    assert first.refusal(config).instead == "Set a to 0"
    assert second.refusal(config).instead == "Set b to 0"

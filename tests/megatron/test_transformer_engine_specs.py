"""Specs that Megatron makes for Transformer Engine, rewritten; STUBS stand in for its modules."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import numpy as np
import pytest
from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.transformer.enums import AttnMaskType

from megatron_prefix import layer_spec
from megatron_prefix.config import ParallelConfig
from megatron_prefix.layer_spec import prefix_grouped, prefix_grouped_layer_spec
from megatron_prefix.layers.attention import _PrefixCoreAttention, _PrefixSelfAttention
from megatron_prefix.layout import pack
from megatron_prefix.megatron import gated_delta_net
from megatron_prefix.model.build import ModelChunks
from megatron_prefix.model.full_tensors import full_parameters, load_full_parameters
from megatron_prefix.model.transformer_config import transformer_config
from tests.megatron import stub_transformer_engine as stubs
from tests.megatron.models import (
    HAS_GATED_DELTA_NET,
    HYBRID,
    TRAINING,
    assert_equal_training,
    model_config,
    packed_logits,
    random_groups,
    randomise,
    relative_error,
    single_process,
)

SHAPES = [(9, [4, 6, 1]), (12, [3]), (5, [1, 17, 2])]


@pytest.fixture(autouse=True)
def stubs_in_megatrons_specs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", stubs.StubProvider, raising=False)
    monkeypatch.setattr(gpt_layer_specs, "TENorm", stubs.StubTENorm, raising=False)


def _model(options: dict[str, Any], *, grouped: bool, ready: bool = False) -> GPTModel:
    config = transformer_config(model_config(options), ParallelConfig(), TRAINING)
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    if grouped:
        spec = prefix_grouped(spec)
    return GPTModel(
        config,
        prefix_grouped_layer_spec if ready else spec,
        vocab_size=61,
        max_sequence_length=64,
        position_embedding_type="rope",
    )


def _pair(options: dict[str, Any]) -> tuple[GPTModel, GPTModel]:
    reference, grouped = _model(options, grouped=False), _model(options, grouped=True)
    randomise(reference)
    grouped.load_state_dict(reference.state_dict())
    return reference, grouped


@pytest.mark.parametrize("trim_last_layer", [False, True], ids=["", "trimmed last layer"])
@pytest.mark.parametrize(
    "options",
    [{}, {"softmax_scale": 0.7}, {"qk_layernorm": True}],
    ids=["", "softmax scale", "qk norm"],
)
def test_training_equals_the_model_of_the_spec_that_was_rewritten(
    options: dict[str, Any], trim_last_layer: bool
) -> None:
    with single_process():
        reference, grouped = _pair({"softmax_scale": 8**-0.5, **options})
        tree = random_groups(np.random.default_rng(), SHAPES)
        assert_equal_training(reference, grouped, tree, 1e-11, trim_last_layer=trim_last_layer)


def test_only_attention_and_its_layer_are_replaced() -> None:
    with single_process():
        reference, grouped = _pair({})
    for plain, ours in zip(reference.decoder.layers, grouped.decoder.layers, strict=True):
        attention = ours.self_attention
        assert isinstance(attention, _PrefixSelfAttention)
        assert isinstance(attention.core_attention, _PrefixCoreAttention)
        assert isinstance(attention.core_attention, stubs.StubTEDotProductAttention)
        assert type(attention.linear_qkv) is stubs.StubTELayerNormColumnParallelLinear
        assert type(attention.linear_proj) is stubs.StubTERowParallelLinear
        assert type(ours.mlp) is type(plain.mlp)
        assert type(ours.mlp.linear_fc1) is stubs.StubTELayerNormColumnParallelLinear
    assert list(grouped.state_dict()) == list(reference.state_dict())


def test_core_attention_is_built_with_all_that_megatron_says() -> None:
    with single_process():
        reference, grouped = _pair({"softmax_scale": 0.7})
        for plain, ours in zip(reference.decoder.layers, grouped.decoder.layers, strict=True):
            expected = plain.self_attention.core_attention.built_with
            found = ours.self_attention.core_attention.built_with
            assert found["config"] is ours.config
            assert found["layer_number"] == ours.layer_number
            assert found["attn_mask_type"] == AttnMaskType.causal
            assert found["softmax_scale"] == 0.7
            assert (found["pg_collection"] or found["model_comm_pgs"]) is not None
            same = found.keys() - {"config", "pg_collection", "model_comm_pgs"}
            assert {k: found[k] for k in same} == {k: expected[k] for k in same}


def test_a_trimmed_last_layer_computes_its_whole_projection_where_that_holds_the_norm_too() -> None:
    layout = pack(random_groups(np.random.default_rng(), [(30, [4, 6])]))
    with single_process():
        grouped = _model({"softmax_scale": 8**-0.5}, grouped=True)
        packed_logits(grouped, layout, np.arange(29, 39))
    projected = [layer.self_attention.linear_qkv.rows for layer in grouped.decoder.layers]
    fed = [layer.mlp.linear_fc1.rows for layer in grouped.decoder.layers]
    assert projected == [[39], [39]] and fed == [[39], [10]]


def test_the_ready_layer_spec_takes_transformer_engine_where_megatron_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layer_spec, "have_transformer_engine", lambda: True)
    with single_process():
        reference = _model({"softmax_scale": 8**-0.5}, grouped=False)
        ready = _model({"softmax_scale": 8**-0.5}, grouped=False, ready=True)
        ready.load_state_dict(reference.state_dict())
        attention = ready.decoder.layers[0].self_attention
        assert isinstance(attention.core_attention, stubs.StubTEDotProductAttention)
        tree = random_groups(np.random.default_rng(), SHAPES)
        assert_equal_training(reference, ready, tree, 1e-11)


@pytest.mark.skipif(not HAS_GATED_DELTA_NET, reason="megatron-core before 0.16")
def test_gated_delta_nets_of_the_local_spec_have_the_weights_of_megatrons_own_spec(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same checkpoint keys, and from them the same logits."""
    provider = stubs.StubProvider
    monkeypatch.setattr(gated_delta_net.variants, "TESpecProvider", provider, raising=False)
    tree = random_groups(np.random.default_rng(), SHAPES)
    logits, weights = [], None
    with single_process():
        for use_transformer_engine in (True, False):
            options = {**HYBRID, "softmax_scale": 8**-0.5}
            config = transformer_config(model_config(options), ParallelConfig(), TRAINING)
            spec = gated_delta_net.hybrid_block_spec(
                config, use_transformer_engine=use_transformer_engine
            )
            model = GPTModel(
                config,
                prefix_grouped(spec),
                vocab_size=61,
                max_sequence_length=64,
                position_embedding_type="rope",
            )
            chunks = ModelChunks(wrapped=[], bare=[model], config=config, head=None)
            if weights is None:
                randomise(model)
                weights = full_parameters(chunks)
            else:
                assert full_parameters(chunks).keys() == weights.keys()
                load_full_parameters(chunks, weights)
            logits.append(packed_logits(model, pack(tree)))
    assert relative_error(*logits) <= 1e-12


@pytest.mark.parametrize(
    "name", ["TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"]
)
def test_stubs_take_what_megatrons_wrappers_take(name: str) -> None:
    """An argument that a release adds to a wrapper is to be added to its stub."""
    # Without Transformer Engine the wrapper is no class, so it is read and not asked.
    source = ast.parse(inspect.getsource(transformer_engine))
    (wrapper,) = (n for n in ast.walk(source) if isinstance(n, ast.ClassDef) and n.name == name)
    (init,) = (n for n in wrapper.body if getattr(n, "name", None) == "__init__")
    theirs = {argument.arg for argument in init.args.args + init.args.kwonlyargs}
    ours = inspect.signature(getattr(stubs, f"Stub{name}").__init__).parameters
    assert {"self", "config"} <= theirs <= set(ours)

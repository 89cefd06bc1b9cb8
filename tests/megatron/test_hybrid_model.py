"""Megatron's HybridModel over shared prefixes, against the unmodified one on whole sequences.

Its norms are torch's. Transformer Engine's spec is Megatron's own, with STUBS of its modules.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt import moe_module_specs
from megatron.core.transformer.identity_op import IdentityOp

from megatron_prefix.attention.layer_kinds import set_hybrid_pattern
from megatron_prefix.config import ModelConfig, ParallelConfig
from megatron_prefix.config.loader import ConfigError
from megatron_prefix.layer_spec import prefix_grouped
from megatron_prefix.layers.hybrid import prefix_hybrid_model
from megatron_prefix.layout import PrefixTree, pack
from megatron_prefix.megatron.gated_delta_net import is_gated_delta_net
from megatron_prefix.megatron.hybrid_model import HybridModel, hybrid_stack_spec
from megatron_prefix.megatron.mamba import is_mamba_layer
from megatron_prefix.megatron.options import UnsupportedOptionError, refuse_unsupported
from megatron_prefix.model.build import ModelChunks, build_model
from megatron_prefix.model.full_tensors import full_parameters, load_full_parameters
from megatron_prefix.model.transformer_config import transformer_config
from tests.megatron import stub_transformer_engine as stubs
from tests.megatron.mamba_reference import run_token_by_token
from tests.megatron.models import (
    BASE,
    DELTA_NET,
    HAS_GATED_DELTA_NET,
    HAS_HYBRID_MODEL,
    MAMBA,
    TRAINING,
    assert_equal_training,
    model_config,
    packed_logits,
    random_groups,
    randomise,
    relative_error,
    single_process,
)

if HAS_GATED_DELTA_NET:
    from tests.megatron.test_gated_delta_net import TokenByToken

needs_hybrid_model = pytest.mark.skipif(not HAS_HYBRID_MODEL, reason="megatron-core before 0.18")
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
STATISTICS = {"moe_z_loss_coeff": 0.1}


def hybrid(pattern: str, **transformer: Any) -> ModelConfig:
    experts = EXPERTS if "E" in pattern else {}
    sizes = {**DELTA_NET, **MAMBA, **experts, **transformer}
    return model_config(sizes, hybrid_layer_pattern=pattern)


def deep_tree() -> PrefixTree:
    """Three levels of sharing, prompts shorter than the convolution, responses of one token."""
    rng = np.random.default_rng()

    def tokens(count: int) -> np.ndarray:
        return rng.integers(0, 61, count)

    prompt, turns = tokens(30), [tokens(n) for n in (9, 1)]
    deep = [np.concatenate((prompt, turn, tokens(n))) for turn in turns for n in (5, 1, 8)]
    short = tokens(2)
    return PrefixTree.from_sequences([*deep, *(np.append(short, tokens(n)) for n in (3, 1))])


def unmodified(model: ModelConfig) -> torch.nn.Module:
    """Megatron's own model; its recurrent layers as their equations."""
    config = transformer_config(model, ParallelConfig(), TRAINING)
    config.deterministic_mode = True
    built = build_model(model, config, shared_prefixes=False)
    for module in built.modules():
        if is_gated_delta_net(type(module)):
            module.__class__ = TokenByToken
    run_token_by_token(built)
    return built


@needs_hybrid_model
@pytest.mark.parametrize("trim_last_layer", [False, True], ids=["", "trimmed last layers"])
@pytest.mark.parametrize("pattern", ["GE*-G-*E-", "*-G", "--G*", "M*-M", "ME*-", "GMM"])
def test_training_equals_every_sequence_alone(pattern: str, trim_last_layer: bool) -> None:
    with single_process():
        model = hybrid(pattern)
        reference = unmodified(model)
        grouped = build_model(model, transformer_config(model, ParallelConfig(), TRAINING))
        randomise(reference)
        grouped.load_state_dict(reference.state_dict())
        assert_equal_training(
            reference, grouped, deep_tree(), 1e-10, trim_last_layer=trim_last_layer
        )


@needs_hybrid_model
@pytest.mark.parametrize(
    ("pattern", "options", "rows"),
    [
        ("*-G-E", {}, [39, 39, 39, 10, 10]),
        ("G-*E-", {}, [39, 39, 39, 10, 10]),
        ("G-*E-", STATISTICS, [39, 39, 39, 39, 10]),
        ("G-*-E", STATISTICS, [39, 39, 39, 39, 39]),
        ("*-M-E", {}, [39, 39, 39, 10, 10]),
    ],
)
def test_layers_behind_the_last_one_that_mixes_compute_the_needed_rows_only(
    pattern: str, options: dict[str, Any], rows: list[int]
) -> None:
    """[layers] rows that each is given; a layer whose experts count tokens is given all."""
    layout = pack(random_groups(np.random.default_rng(), [(30, [4, 6])]))
    with single_process():
        model = hybrid(pattern, **options)
        grouped = build_model(model, transformer_config(model, ParallelConfig(), TRAINING))
        found: list[int] = []
        for layer in grouped.decoder.layers:
            if is_mamba_layer(type(layer)):
                norm = layer.norm
            else:
                mixes = not isinstance(layer.self_attention, IdentityOp)
                norm = layer.input_layernorm if mixes else layer.pre_mlp_layernorm
            norm.register_forward_pre_hook(lambda _, args: found.append(len(args[0])))
        grouped.eval()
        packed_logits(grouped, layout, np.arange(29, 39))
    assert found == rows


@needs_hybrid_model
def test_megatrons_own_stack_spec_has_the_same_weights_and_gives_the_same_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same checkpoint keys as the local one, and from them the same logits."""
    from megatron.core.models.hybrid import hybrid_block, hybrid_layer_specs

    for name in vars(transformer_engine).copy():
        if name.startswith("TE"):
            # Of layers that the pattern has not, any class will do.
            stub = getattr(stubs, f"Stub{name}", type(name, (torch.nn.Module,), {}))
            monkeypatch.setattr(transformer_engine, name, stub)
    monkeypatch.setattr(moe_module_specs, "TESpecProvider", stubs.StubProvider, raising=False)
    monkeypatch.setattr(hybrid_block, "TENorm", stubs.StubTENorm)
    model = hybrid("G-*-M", softmax_scale=8**-0.5)
    tree = deep_tree()
    logits, weights = [], None
    try:
        importlib.reload(hybrid_layer_specs)
        with single_process():
            for use_transformer_engine in (True, False):
                config = transformer_config(model, ParallelConfig(), TRAINING)
                spec = hybrid_stack_spec(config, use_transformer_engine=use_transformer_engine)
                built = prefix_hybrid_model()(
                    config,
                    prefix_grouped(spec),
                    vocab_size=61,
                    max_sequence_length=64,
                    hybrid_layer_pattern="G-*-M",
                    position_embedding_type="rope",
                )
                chunks = ModelChunks(wrapped=[], bare=[built], config=config, head=None)
                if weights is None:
                    randomise(built)
                    weights = full_parameters(chunks)
                else:
                    assert full_parameters(chunks).keys() == weights.keys()
                    load_full_parameters(chunks, weights)
                logits.append(packed_logits(built, pack(tree)))
    finally:
        monkeypatch.undo()
        importlib.reload(hybrid_layer_specs)
    assert relative_error(logits[1], logits[0]) <= 1e-12


@needs_hybrid_model
def test_what_cannot_share_prefixes_is_refused_by_its_place_in_the_pattern() -> None:
    def build(pattern: str | None, *, grouped: bool = True, num_layers: int = 3) -> None:
        config = transformer_config(hybrid("G-*"), ParallelConfig(), TRAINING)
        config.num_layers = num_layers
        spec = hybrid_stack_spec(config, use_transformer_engine=False)
        prefix_hybrid_model()(
            config,
            prefix_grouped(spec) if grouped else spec,
            vocab_size=61,
            max_sequence_length=64,
            hybrid_layer_pattern=pattern,
        )

    with single_process():
        for pattern, message in (
            ("-DG", r"'-DG': layer 2 is D: DeepSeek's sparse attention, .* use \* \(attention\)"),
            ("+-G", r"layer 1 is \+: multi-latent attention, which shares prefixes in a GPTModel"),
            ("G-X", r"layer 3 is X, which is no kind of layer that shares prefixes"),
            ("G-*/G-", r"/ begins layers of multi-token prediction"),
            ("G-|*|", r"a stage has no layer"),
            ("G-", r"'G-' has 2 layers, and num_layers is 3"),
            (None, r"hybrid_layer_pattern: give it by name"),
        ):
            with pytest.raises(ValueError, match=message):
                build(pattern)
        with pytest.raises(ValueError, match=r"LocalHybridStack cannot share prefixes; pass"):
            build("G-*", grouped=False)
        config = transformer_config(hybrid("G-*"), ParallelConfig(), TRAINING)
        set_hybrid_pattern(config, "")
        spec = prefix_grouped(hybrid_stack_spec(config, use_transformer_engine=False))
        with pytest.raises(ValueError, match=r"needs the pattern .* build prefix_hybrid_mo"):
            HybridModel(config, spec, 61, 64, hybrid_layer_pattern="G-*")
        config.is_hybrid_model = True
        del config.prefix_hybrid_layer_pattern
        with pytest.raises(UnsupportedOptionError, match=r"is_hybrid_model=True.*prefix_hybrid"):
            refuse_unsupported(config)


@needs_hybrid_model
@pytest.mark.parametrize(
    ("pattern", "options", "parallel", "message"),
    [
        ("GD*", {}, {}, r"hybrid_layer_pattern: GD\*: layer 2 is D: DeepSeek's"),
        ("", {}, {}, r"hybrid_layer_pattern: '' has no layer"),
        ("G*", {"transformer": {"num_moe_experts": 2}}, {}, r"num_moe_experts: 2: layers with exp"),
        ("GE", {"transformer": {"num_moe_experts": None}}, {}, r"num_moe_experts: None: layers wi"),
        ("G*", {"transformer": {"qk_layernorm": True}}, {}, r"HybridModel has no such norms"),
        ("G*", {"transformer": {"mtp_num_layers": 1}}, {}, r"shares prefixes in a GPTModel only"),
        ("G*", {"transformer": {"num_layers": 2}}, {}, r"num_layers: 2 is decided by hybrid_layer"),
        ("G*", {"position_embedding_type": "mrope"}, {}, r"a HybridModel has .*rope, yarn, none"),
        ("G*", {"rope_scaling": True}, {}, r"a HybridModel has no such scaling"),
        ("G*", {}, {"pipeline_model_parallel_size": 2}, r"G\* has 1 stages, and the run has 2"),
        ("G|*", {}, {}, r"G\|\* has 2 stages, and the run has 1"),
    ],
)
def test_what_a_run_cannot_do_with_a_pattern_is_refused_by_name(
    pattern: str, options: dict[str, Any], parallel: dict[str, Any], message: str
) -> None:
    sizes = {name: value for name, value in BASE.items() if name != "num_layers"}
    transformer = {**sizes, **DELTA_NET, **options.get("transformer", {})}
    options = {**options, "transformer": transformer}
    with pytest.raises(ConfigError, match=message):
        model = ModelConfig(
            vocab_size=61,
            max_sequence_length=64,
            hybrid_layer_pattern=pattern,
            **options,
        )
        transformer_config(model, ParallelConfig(**parallel), TRAINING)


@pytest.mark.skipif(HAS_HYBRID_MODEL, reason="megatron-core 0.18 and newer have it")
def test_releases_without_it_say_so() -> None:
    with pytest.raises(ConfigError, match=r"hybrid_layer_pattern: \*-: .* install 0.18"):
        transformer_config(model_config(hybrid_layer_pattern="*-"), ParallelConfig(), TRAINING)
    with pytest.raises(ValueError, match=r"has no HybridModel: install 0.18 or newer"):
        prefix_hybrid_model()

"""Multi-latent attention against the unmodified GPTModel, sequence by sequence."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.config import ParallelConfig, YarnConfig
from megatron_prefix.config.loader import ConfigError
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.layers.built_model import share_in_layers
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layout import PrefixTree, pack
from megatron_prefix.megatron.latent_attention import normalised
from megatron_prefix.megatron.options import UnsupportedOptionError, refuse_unsupported
from megatron_prefix.model.build import build_gpt_model
from megatron_prefix.model.transformer_config import transformer_config
from tests.distributed import run_distributed
from tests.megatron.models import (
    BASE,
    HAS_WINDOWS,
    HAS_YARN,
    LATENT,
    ON_CPU,
    TRAINING,
    assert_equal_training,
    model_config,
    model_pair,
    random_groups,
    relative_error,
    single_process,
)
from tests.megatron.stub_transformer_engine import StubTELayerNormColumnParallelLinear

SHAPES = [(9, [4, 6, 1]), (1, [5, 1]), (12, [3]), (30, [1, 17, 2])]
YARN = YarnConfig(
    rotary_scaling_factor=4.0,
    original_max_position_embeddings=16,
    mscale=1.0,
    mscale_all_dim=0.7,
)
needs_yarn = pytest.mark.skipif(not HAS_YARN, reason="this megatron-core has no YaRN in GPTModel")
MODELS = {
    "plain": model_config(LATENT),
    "queries that are not compressed": model_config(
        {**LATENT, "q_lora_rank": None, "qk_layernorm": False}
    ),
    "values as large as keys": model_config({**LATENT, "v_head_dim": 16}),
    "another base, half of the dimensions": model_config(
        {**LATENT, "qk_pos_emb_head_dim": 8}, rotary_base=100, rotary_percent=0.5
    ),
}


def _yarn() -> Any:
    return model_config(LATENT, position_embedding_type="yarn", yarn=YARN)


@pytest.mark.parametrize("trim_last_layer", [False, True], ids=["", "trimmed last layer"])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_training_equals_the_unmodified_model(config: Any, trim_last_layer: bool) -> None:
    with single_process():
        reference, grouped = model_pair(config)
        tree = random_groups(np.random.default_rng(), SHAPES)
        assert_equal_training(reference, grouped, tree, 1e-11, trim_last_layer=trim_last_layer)


@needs_yarn
@pytest.mark.parametrize("recompute", ["none", "selective", "full", "mla_up_proj"])
def test_deep_trees_with_yarn_and_recompute(recompute: str) -> None:
    rng = np.random.default_rng()
    stems = [rng.integers(0, 3, 20) for _ in range(3)]
    sequences = [
        np.concatenate([stems[rng.integers(3)][: rng.integers(2, 20)], rng.integers(0, 61, 5)])
        for _ in range(8)
    ]
    config = _yarn()
    with single_process():
        if recompute == "mla_up_proj":
            reference, _ = model_pair(config)
            options = transformer_config(config, ParallelConfig(), TRAINING)
            options.recompute_granularity, options.recompute_modules = "selective", [recompute]
            grouped = build_gpt_model(config, options)
            grouped.load_state_dict(reference.state_dict())
        else:
            training = dataclasses.replace(TRAINING, recompute=recompute)
            reference, grouped = model_pair(config, training)
        assert_equal_training(reference, grouped, PrefixTree.from_sequences(sequences), 1e-11)


@pytest.mark.skipif(not HAS_WINDOWS, reason="megatron-core 0.14 has no windows and no sinks here")
def test_windows_and_sinks_go_with_it() -> None:
    options = {
        **LATENT,
        "window_size": [5, 0],
        "window_attn_skip_freq": 2,
        "softmax_type": "learnable",
    }
    with single_process():
        reference, grouped = model_pair(model_config(options))
        tree = random_groups(np.random.default_rng(), SHAPES)
        assert_equal_training(reference, grouped, tree, 1e-11)


def test_a_model_that_is_built_already_shares_prefixes() -> None:
    config = MODELS["plain"]
    with single_process():
        reference, _ = model_pair(config)
        built = build_gpt_model(config, reference.config, shared_prefixes=False)
        built.load_state_dict(reference.state_dict())
        share_in_layers(built, built.config)
        tree = random_groups(np.random.default_rng(), SHAPES)
        assert_equal_training(reference, built, tree, 1e-11)


def test_a_norm_that_the_projection_holds_is_taken_out_of_it() -> None:
    """STUB: stands in for Transformer Engine's projection with a norm in front of it."""
    with single_process():
        config = transformer_config(MODELS["plain"], ParallelConfig(), TRAINING)
        linear = StubTELayerNormColumnParallelLinear(
            14,
            6,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
        )
        torch.nn.init.normal_(linear.layer_norm_weight)
        x = torch.randn(5, 14, dtype=torch.float64)
        expected, _ = linear(x)
    found = torch.nn.functional.linear(normalised(linear, x, config), linear.weight)
    assert relative_error(found, expected) <= 1e-14


class _Whole(torch.nn.Module):
    """Transformer Engine's `parallel_mode="duplicated"`: every rank has all of the weight."""

    def __init__(self, shard: torch.Tensor) -> None:
        super().__init__()
        shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
        dist.all_gather(shards, shard.detach())
        self.weight = torch.nn.Parameter(torch.cat(shards))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(x, self.weight), None


def _whole_projections(rank: int, world_size: int, sequence_parallel: bool) -> list[float]:
    """Errors of a layer whose down projections are whole on every rank, against split ones."""
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    layout = pack(random_groups(np.random.default_rng(1), SHAPES), pad_to_multiple=2)
    params = PrefixPackedSeqParams.from_layout(layout, ON_CPU)
    names = ("linear_q_down_proj", "linear_kv_down_proj")
    with runtime(parallel, device="cpu", seed=3, timeout_minutes=1, float64=True):
        config = MODELS["plain"]
        model = build_gpt_model(config, transformer_config(config, parallel, TRAINING))
        attention = model.decoder.layers[0].self_attention
        tokens = layout.num_tokens // (2 if sequence_parallel else 1)
        torch.manual_seed(rank if sequence_parallel else 0)
        hidden = torch.randn(tokens, 1, 32, dtype=torch.float64, requires_grad=True)
        found = []
        for kind in ("split", "whole"):
            if kind == "whole":
                for name in names:
                    setattr(attention, name, _Whole(getattr(attention, name).weight))
            attention.zero_grad()
            hidden.grad = None
            tensors = attention.get_query_key_value_tensors(hidden, packed_seq_params=params)[:3]
            torch.manual_seed(5 + rank)
            sum((x * torch.randn_like(x)).sum() for x in tensors).backward()
            gradients = [getattr(attention, name).weight.grad for name in names]
            if kind == "whole":
                for gradient in gradients if sequence_parallel else ():
                    dist.all_reduce(gradient)
                gradients = [x.chunk(2)[rank] for x in gradients]
                # Split projections add up the ranks' shares of the input's gradient.
                if not sequence_parallel:
                    dist.all_reduce(hidden.grad)
                    hidden.grad /= 2
            found.append([*tensors, *gradients, hidden.grad])
        return [relative_error(x, y) for x, y in zip(*found, strict=True)]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_down_projections_that_every_rank_has_whole(sequence_parallel: bool) -> None:
    for errors in run_distributed(
        _whole_projections, 2, sequence_parallel, init_process_group=False
    ):
        assert max(errors) <= 1e-12


CONTEXT = ParallelConfig(context_parallel_size=2)


def _received(rank: int, world_size: int) -> dict[tuple[int, str], int]:
    """Bytes by layer and direction; the second layer gathers expanded keys and values."""
    layout = pack(
        random_groups(np.random.default_rng(2), [(40, [9, 8]), (3, [7])]), pad_to_multiple=2
    )
    kinds = {"cp_comm_type": ["latent_gather", "all_gather"]}
    with runtime(CONTEXT, device="cpu", seed=3, timeout_minutes=1, float64=True):
        config = model_config({**LATENT, **kinds})
        model = build_gpt_model(config, transformer_config(config, CONTEXT, TRAINING))
        group = parallel_state.get_context_parallel_group()
        setup = AttentionSetup.of(model.config, torch.device("cpu"), context_parallel_group=group)
        params = PrefixPackedSeqParams.from_layout(layout, setup)
        tokens, positions = params.own(layout.input_ids)[None], params.position_ids[None]
        model(tokens, positions, None, packed_seq_params=params)[0].sum().backward()
        return dict(params.attention.exchange.traffic.received)


def test_latents_travel_in_place_of_keys_and_values() -> None:
    latent, heads = (
        LATENT["kv_lora_rank"] + LATENT["qk_pos_emb_head_dim"],
        BASE["num_attention_heads"],
    )
    key_size = LATENT["qk_head_dim"] + LATENT["qk_pos_emb_head_dim"]
    expanded = heads * (key_size + LATENT["v_head_dim"])
    for received in run_distributed(_received, 2, init_process_group=False):
        for direction in ("forward", "backward"):
            of_latents, of_keys = received[1, direction], received[2, direction]
            assert 0 < of_latents * expanded == of_keys * latent
            assert of_latents / of_keys <= 1.05 * latent / expanded


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_query_groups": 2}, r"multi_latent_attention=True with num_query_groups=2"),
        ({"v_head_dim": 17}, r"with v_head_dim=17 .*: values larger than keys .* = 16"),
        ({"cache_mla_latents": True}, r"cache_mla_latents=True"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changed: dict[str, Any], message: str) -> None:
    config = transformer_config(MODELS["plain"], ParallelConfig(), TRAINING)
    for name, value in changed.items():
        setattr(config, name, value)
    with pytest.raises(UnsupportedOptionError, match=message):
        refuse_unsupported(config)


def test_a_config_without_the_sizes_of_latents_is_refused() -> None:
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, attention_dropout=0, hidden_dropout=0
    )
    config.multi_latent_attention = True
    with pytest.raises(UnsupportedOptionError, match="Use Megatron's MLATransformerConfig"):
        refuse_unsupported(config)


def test_the_rotary_embedding_is_that_of_the_model_section() -> None:
    config = transformer_config(
        model_config({**LATENT, "qk_pos_emb_head_dim": 8}, rotary_base=500, rotary_percent=0.5),
        ParallelConfig(),
        TRAINING,
    )
    assert (config.rope_type, config.rotary_base, config.rotary_percent) == ("rope", 500, 0.5)
    if HAS_YARN:
        config = transformer_config(_yarn(), ParallelConfig(), TRAINING)
        assert config.rope_type == "yarn"
        for name in ("rotary_scaling_factor", "original_max_position_embeddings", "mscale_all_dim"):
            assert getattr(config, name) == getattr(YARN, name)


@pytest.mark.parametrize(
    ("transformer", "options", "message"),
    [
        ({**LATENT, "rope_type": "rope"}, {}, r"rope_type: 'rope' is decided by model\.position_e"),
        ({**LATENT, "mscale": 1.0}, {}, r"mscale: 1\.0 is decided by model\.yarn\.mscale"),
        ({"kv_lora_rank": 8}, {}, r"kv_lora_rank: 8 needs multi_latent_attention: true"),
        ({**LATENT, "kv_lora_rank": "8"}, {}, r"kv_lora_rank: '8' is not of type int"),
        (LATENT, {"rope_scaling": True}, r"rope_scaling: true with multi_latent_attention"),
        (LATENT, {"position_embedding_type": "none"}, r"position_embedding_type: none with multi"),
        ({**LATENT, "qk_pos_emb_head_dim": 5}, {}, r"qk_pos_emb_head_dim: 5 .* gives 5 rotated"),
    ],
)
def test_what_the_model_section_cannot_say_is_refused(
    transformer: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        transformer_config(model_config(transformer, **options), ParallelConfig(), TRAINING)

"""A user's own GPTModel on context-parallel ranks: Megatron's modules around the attention.

The row on one process, which other tests compare with the unmodified model, is the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_prefix.attention.comm_types import layer_comm_type
from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.config import ModelConfig, ParallelConfig, YarnConfig
from megatron_prefix.config.loader import ConfigError
from megatron_prefix.distributed.agreement import check_same_row
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layout import PackedLayout, pack
from megatron_prefix.megatron.options.attention import _say_what_runs, yarn_takes_packed_rows
from megatron_prefix.model.build import build_gpt_model
from megatron_prefix.model.transformer_config import transformer_config
from tests.distributed import run_distributed
from tests.megatron.models import (
    HAS_WINDOWS,
    HAS_YARN,
    LATENT,
    TRAINING,
    model_config,
    model_pair,
    packed_logits,
    random_groups,
    relative_error,
    single_process,
)

PARALLEL = ParallelConfig(context_parallel_size=2)

MODELS: dict[str, dict[str, Any]] = {
    "rope, a kind for each layer": {"transformer": {"cp_comm_type": ["p2p", "a2a"]}},
    "scaled, partial and interleaved rotary": {
        "rope_scaling": True,
        "rotary_percent": 0.5,
        "transformer": {"rotary_interleaved": True, "qk_layernorm": True},
    },
    "learned absolute positions": {"position_embedding_type": "learned_absolute"},
    "no positions": {"position_embedding_type": "none"},
    "multi-query": {"transformer": {"num_query_groups": 1}},
    "multi-latent, latents and a ring": {
        "transformer": {**LATENT, "cp_comm_type": ["latent_gather", "p2p"]}
    },
    "multi-latent, expanded keys": {
        "transformer": {**LATENT, "cp_comm_type": ["all_gather", "a2a"]}
    },
}
if HAS_WINDOWS:
    MODELS["windows and learnable sinks"] = {
        "transformer": {
            "window_size": [5, 0],
            "window_attn_skip_freq": 2,
            "softmax_type": "learnable",
        }
    }
YARN = {
    "position_embedding_type": "yarn",
    "yarn": YarnConfig(rotary_scaling_factor=4.0, original_max_position_embeddings=16),
}
if HAS_YARN and yarn_takes_packed_rows():
    MODELS["yarn"] = YARN


def _layout() -> PackedLayout:
    rng = np.random.default_rng(11)
    shapes = [(23, [9, 14, 3, 8]), (1, [5, 2]), (6, [20])]
    return pack(random_groups(rng, shapes), pad_to_multiple=2)


def _loss_weights(layout: PackedLayout, vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(layout.num_tokens, vocab_size, generator=generator, dtype=torch.float64)
    weights[layout.num_tokens - layout.num_padding :] = 0
    return weights


def _train_on_ranks(
    rank: int, world_size: int, states: dict[str, dict[str, torch.Tensor]]
) -> dict[str, Any]:
    """[model] -> this rank's rows, logits, and gradients added up over the ranks."""
    results = {}
    layout = _layout()
    with runtime(PARALLEL, device="cpu", seed=3, timeout_minutes=2, float64=True):
        group = parallel_state.get_context_parallel_group()
        for name, state in states.items():
            config = model_config(**MODELS[name])
            model = build_gpt_model(config, transformer_config(config, PARALLEL, TRAINING))
            model.load_state_dict(state)
            setup = AttentionSetup.of(
                model.config, torch.device("cpu"), context_parallel_group=group
            )
            params = PrefixPackedSeqParams.from_layout(layout, setup)
            logits = model(
                params.own(layout.input_ids)[None],
                params.position_ids[None],
                None,
                packed_seq_params=params,
            )[0]
            weights = params.own(_loss_weights(layout, logits.shape[-1]).numpy())
            (logits * weights).sum().backward()
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad, group=group)
            gradients = {n: p.grad for n, p in model.named_parameters()}
            results[name] = (params.own_rows, logits.detach(), gradients)
    return results


def test_logits_and_gradients_of_every_kind_of_positions_equal_one_process() -> None:
    layout = _layout()
    states, expected = {}, {}
    with single_process():
        for name, options in MODELS.items():
            _, model = model_pair(model_config(**options))
            # Extra states (none on the CPU) are not tensors.
            states[name] = {k: v for k, v in model.state_dict().items() if torch.is_tensor(v)}
            logits = packed_logits(model, layout)
            (logits * _loss_weights(layout, logits.shape[-1])).sum().backward()
            gradients = {n: p.grad for n, p in model.named_parameters()}
            expected[name] = (logits.detach(), gradients)
    ranks = run_distributed(_train_on_ranks, 2, states, init_process_group=False)
    real = layout.num_tokens - layout.num_padding
    for name, (logits, gradients) in expected.items():
        found = torch.full_like(logits, float("nan"))
        for rank in ranks:
            rows, rank_logits, rank_gradients = rank[name]
            found[rows[rows >= 0]] = rank_logits[rows >= 0]
            for parameter, gradient in gradients.items():
                error = relative_error(rank_gradients[parameter], gradient)
                assert error <= 1e-11, (name, parameter)
        assert relative_error(found[:real], logits[:real]) <= 1e-12, name


def _messages(rank: int, world_size: int) -> dict[str, str]:
    """What is refused on two ranks, and how."""

    def message(action: Callable[[], Any]) -> str:
        try:
            action()
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing was raised"

    rng = np.random.default_rng(rank)  # other lengths on every rank
    lengths = rng.integers(10, 30, 4).tolist()
    different = pack(random_groups(rng, [(12, lengths)]), pad_to_multiple=16)
    uneven = pack(random_groups(np.random.default_rng(0), [(5, [4, 3])]), pad_to=11)
    with runtime(PARALLEL, device="cpu", seed=3, timeout_minutes=1, float64=True):
        group = parallel_state.get_context_parallel_group()
        config = model_config()
        model = build_gpt_model(config, transformer_config(config, PARALLEL, TRAINING))
        setup = AttentionSetup.of(model.config, torch.device("cpu"), context_parallel_group=group)

        def checked_params(layout: PackedLayout) -> None:
            params = PrefixPackedSeqParams.from_layout(layout, setup)
            check_same_row(params.shards, group)

        tokens = torch.zeros(1, 6, dtype=torch.int64)
        mask = torch.ones(6, 6, dtype=torch.bool).triu(1)[None, None]
        return {
            "other lengths": message(lambda: checked_params(different)),
            "uneven": message(lambda: checked_params(uneven)),
            "ordinary batch": message(lambda: model(tokens, torch.arange(6)[None], mask)),
        }


def test_different_rows_and_batches_that_cannot_run_are_refused_on_every_rank() -> None:
    for messages in run_distributed(_messages, 2, init_process_group=False):
        different = messages["other lengths"]
        assert different.startswith("RuntimeError: the packed row differs between ranks (rank 0: ")
        # The summaries of both plans.
        assert different.count("5 segments in") == 2 and "; rank 1: " in different
        assert "11 tokens does not divide by the 2 context-parallel ranks" in messages["uneven"]
        assert (
            "context_parallel_size=2: batches without PrefixPackedSeqParams need"
            in (messages["ordinary batch"])
        )


@pytest.mark.parametrize(
    ("transformer", "message"),
    [
        (
            {"cp_comm_type": ["p2p", "ring"]},
            r"cp_comm_type=\['p2p', 'ring'\] cannot .* no kind 'ring'.* Set cp_comm_type to all_ga",
        ),
        ({"cp_comm_type": "a2a", "num_query_groups": 1}, r"num_query_groups=1 to be a multiple of"),
        ({"cp_comm_type": ["p2p"]}, r"Length of cp_comm_type"),
        ({"cp_comm_type": "latent_gather"}, r"only multi-latent attention has latents"),
    ],
)
def test_a_kind_that_is_not_ours_or_does_not_divide_the_heads_is_refused(
    transformer: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        transformer_config(model_config(transformer), PARALLEL, TRAINING)


@pytest.mark.skipif(
    yarn_takes_packed_rows() or not HAS_YARN, reason="this megatron-core has no such YaRN"
)
def test_yarn_is_refused_where_megatron_cuts_its_table() -> None:
    with pytest.raises(ConfigError, match=r"context_parallel_size=2 cannot .* YaRN .* install"):
        transformer_config(model_config(**YARN), PARALLEL, TRAINING)


def test_each_layer_has_the_kind_of_its_place_in_the_list() -> None:
    def kinds(config: ModelConfig) -> list[str]:
        built = transformer_config(config, PARALLEL, TRAINING)
        return [layer_comm_type(built, layer) for layer in range(1, built.num_layers + 1)]

    listed = ["p2p", "all_gather", "a2a"]
    assert kinds(model_config({"num_layers": 3, "cp_comm_type": listed})) == listed
    assert kinds(model_config({"cp_comm_type": "p2p"})) == ["p2p", "p2p"]
    assert kinds(model_config()) == ["all_gather", "all_gather"]


def test_heads_within_a_node_and_a_ring_between_nodes_run_as_a_ring_which_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _say_what_runs.cache_clear()
    for kinds in ("a2a+p2p", ["a2a+p2p", "a2a"]):
        built = transformer_config(model_config({"cp_comm_type": kinds}), PARALLEL, TRAINING)
        assert layer_comm_type(built, 1) == "p2p"
    assert layer_comm_type(built, 2) == "a2a"
    assert [r.message for r in caplog.records if "a2a+p2p" in r.message] == [
        "cp_comm_type a2a+p2p runs as p2p with shared prefixes"
    ]

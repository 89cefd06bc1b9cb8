"""Multi-token prediction over shared prefixes against Megatron's own on whole sequences."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_prefix.config import ParallelConfig
from megatron_prefix.config.loader import ConfigError
from megatron_prefix.layer_spec import prefix_grouped
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layers.predicting_model import prefix_gpt_model
from megatron_prefix.layers.predictions import add_predictions
from megatron_prefix.layout import PackedLayout, PrefixTree, pack
from megatron_prefix.megatron.latent_attention import complete_local_spec
from megatron_prefix.model.head import LogProbHead, PredictedLabels
from megatron_prefix.model.transformer_config import transformer_config
from tests.megatron.models import (
    HAS_PREDICTIONS,
    HYBRID,
    ON_CPU,
    TRAINING,
    model_config,
    randomise,
    single_process,
)

if not HAS_PREDICTIONS:
    pytest.skip("megatron-core before 0.16 has another model", allow_module_level=True)

DEPTHS = 3
PREDICTING = {"mtp_num_layers": DEPTHS, "mtp_loss_scaling_factor": 0.6}


def three_levels() -> PrefixTree:
    """Prompts below a system prompt, one of them of one token; responses shorter than the depth;
    a sequence that ends where others go on."""
    rng = np.random.default_rng(5)

    def tokens(count: int) -> list[int]:
        return rng.integers(0, 64, count).tolist()

    system, short = tokens(6), tokens(1)
    first, second = system + tokens(5), system + tokens(2)
    turn = first + tokens(3)
    return PrefixTree.from_sequences(
        [
            *(first + tokens(count) for count in (1, 1, 2, 7)),
            turn,
            *(turn + tokens(count) for count in (1, 4)),
            *(second + tokens(count) for count in (2, 9)),
            *(short + tokens(count) for count in (4, 5)),
        ]
    )


def build(base: type, *, grouped: bool, **transformer: Any) -> GPTModel:
    config = transformer_config(
        model_config({**PREDICTING, **transformer}, vocab_size=64), ParallelConfig(), TRAINING
    )
    # A mean over each sequence, which every release understands alike.
    config.calculate_per_token_loss = False
    decoder = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    if config.multi_latent_attention and not grouped:
        complete_local_spec(decoder)
    predictions = get_gpt_mtp_block_spec(config, decoder, use_transformer_engine=False)
    return base(
        config,
        prefix_grouped(decoder) if grouped else decoder,
        vocab_size=64,
        max_sequence_length=64,
        position_embedding_type="rope",
        mtp_block_spec=prefix_grouped(predictions) if grouped else predictions,
    )


def models(**transformer: Any) -> tuple[GPTModel, GPTModel]:
    """Megatron's own, and one with shared prefixes, of equal weights."""
    reference = build(GPTModel, grouped=False, **transformer)
    grouped = build(prefix_gpt_model(), grouped=True, **transformer)
    randomise(reference)
    grouped.load_state_dict(reference.state_dict())
    # In training Megatron's own keeps a record of its losses.
    return reference.eval(), grouped


def gradients(model: GPTModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def whole_sequences(model: GPTModel, tree: PrefixTree) -> dict[str, Tensor]:
    """Gradients of all cross-entropies, and of Megatron's loss of further tokens."""
    MTPLossAutoScaler.set_loss_scale(torch.ones(()))
    for i in range(tree.num_sequences):
        tokens = torch.from_numpy(tree.sequence_tokens(i))[None]
        length = tokens.shape[1] - 1
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
        positions = torch.arange(length)[None]
        model(tokens[:, :-1], positions, causal, labels=tokens[:, 1:]).sum().backward()
    return gradients(model)


def with_predictions(layout: PackedLayout, depths: int = DEPTHS) -> PrefixPackedSeqParams:
    params = PrefixPackedSeqParams.from_layout(layout, ON_CPU)
    add_predictions(params, layout, ON_CPU, depths)
    return params


def run(model: GPTModel, layout: PackedLayout, params: PrefixPackedSeqParams) -> Tensor:
    """[T] log-probabilities of the row's labels; behind them those of each depth."""
    head = LogProbHead.of(model, vocab_size=64, chunk_tokens=16)
    rows = torch.arange(layout.num_tokens)

    def call(**how: Any) -> Tensor:
        return model(
            params.own(layout.input_ids)[None],
            params.position_ids[None],
            None,
            packed_seq_params=params,
            **how,
        )

    return head.log_probs(
        call,
        rows,
        params.own(layout.labels),
        temperature=1.0,
        with_entropy=False,
        predictions=[
            PredictedLabels(depth=depth, positions=rows, labels=depth.labels)
            for depth in params.predictions or ()
        ],
    )[0, :, 0]


def loss_of(logprobs: Tensor, layout: PackedLayout) -> Tensor:
    """Of all sequences: sums of cross-entropies, and for each depth their mean."""
    main, *depths = logprobs.split(layout.num_tokens)
    loss = -(main * torch.from_numpy(layout.multiplicity)).sum()
    for depth, of_depth in enumerate(depths, start=1):
        weights = np.zeros(layout.num_tokens)
        following = pack(layout.tree, pad_to=layout.num_tokens, shift=depth + 1)
        for i in range(layout.tree.num_sequences):
            rows = following.sequence_positions(i)
            weights[rows] += 1 / len(rows)
        loss = loss - 0.6 / DEPTHS * (of_depth * torch.from_numpy(weights)).sum()
    return loss


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        error = float((found[name] - gradient).norm() / gradient.norm())
        # The promise of float64; what is left is rounding.
        assert error <= 1e-9, f"{name}: {error:.1e}"


LATENT_EXPERTS = {
    "multi_latent_attention": True,
    "num_query_groups": None,
    "kv_lora_rank": 14,
    "qk_head_dim": 10,
    "qk_pos_emb_head_dim": 6,
    "v_head_dim": 12,
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        LATENT_EXPERTS,
        pytest.param(
            {"mtp_use_repeated_layer": True},
            marks=pytest.mark.skipif(
                not hasattr(TransformerConfig, "mtp_use_repeated_layer"), reason="0.17 and newer"
            ),
        ),
    ],
    ids=["dense", "latent with experts", "one layer for all depths"],
)
def test_every_depth_trains_as_on_whole_sequences(options: dict[str, Any]) -> None:
    tree = three_levels()
    layout = pack(tree, pad_to_multiple=8)
    with single_process():
        reference, grouped = models(**options)
        expected = whole_sequences(reference, tree)
        loss_of(run(grouped, layout, with_predictions(layout)), layout).backward()
        assert_close(gradients(grouped), expected)


def test_detached_predictions_train_their_own_layers_alone_and_these_the_same() -> None:
    layout = pack(three_levels())
    with single_process():
        _, grouped = models()
        loss_of(run(grouped, layout, with_predictions(layout)), layout).backward()
        attached = gradients(grouped)
        params = PrefixPackedSeqParams.from_layout(layout, ON_CPU)
        loss_of(run(grouped, layout, params), layout).backward()
        without = gradients(grouped)
        assert not any(name.startswith("mtp.") for name in without)

        grouped.detach_predictions = True
        loss_of(run(grouped, layout, with_predictions(layout)), layout).backward()
        detached = gradients(grouped)
    of_predictions = {name: g for name, g in attached.items() if name.startswith("mtp.")}
    assert_close(detached, without | of_predictions)
    difference = attached["output_layer.weight"] - without["output_layer.weight"]
    assert float(difference.norm()) > 1e-3, "attached ones train the output layer"


def test_routers_count_what_megatrons_own_send_from_rows_that_predict() -> None:
    tree = three_levels()
    layout = pack(tree, pad_to_multiple=8)
    options = {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 16,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 1e-3,
    }
    with single_process():
        reference, grouped = models(**options)
        expected = {
            # Its trunk's routers count by themselves; the last k rows of a sequence predict
            # nothing at depth k.
            router: _routed_without_last_rows(router, depth)
            for depth, part in enumerate([reference.decoder, *reference.mtp.layers])
            for router in _routers(part)
        }
        whole_sequences(reference, tree)
        run(grouped, layout, with_predictions(layout))
        found = [router.local_tokens_per_expert for router in _routers(grouped)]
    assert [counts.tolist() for counts in found] == [
        sum(maps).tolist() for maps in expected.values()
    ]
    lengths = tree.sequence_lengths - 1
    totals = [lengths, *(np.maximum(lengths - depth, 0) for depth in range(DEPTHS + 1))]
    # Two layers and three depths; each token goes to two experts.
    assert [int(counts.sum()) for counts in found] == [2 * int(of.sum()) for of in totals]


def _routers(module: torch.nn.Module) -> list[TopKRouter]:
    return [m for m in module.modules() if isinstance(m, TopKRouter)]


def _routed_without_last_rows(router: TopKRouter, last: int) -> list[Tensor]:
    """Of each sequence to come: rows that go to each expert, [experts]."""
    found: list[Tensor] = []
    router.register_forward_hook(
        lambda _module, _inputs, output: found.append(output[1][: len(output[1]) - last].sum(0))
    )
    return found


def test_what_does_not_fit_is_refused_by_name() -> None:
    layout = pack(three_levels())
    with single_process():
        _, grouped = models()
        with pytest.raises(ValueError, match=r"2 depths .* mtp_num_layers=3"):
            run(grouped, layout, with_predictions(layout, depths=2))
        plain = build(GPTModel, grouped=False)
        with pytest.raises(ValueError, match=r"mtp_block_spec: .* prefix_grouped"):
            prefix_gpt_model()(
                plain.config,
                plain.transformer_layer_spec,
                vocab_size=64,
                max_sequence_length=64,
                mtp_block_spec=plain.mtp_block_spec,
            )


@pytest.mark.parametrize(
    "options",
    [
        {"cp_comm_type": ["p2p", "a2a"]},
        {"window_size": (4, 0), "window_attn_skip_freq": [1, 0]},
        {"no_rope_freq": [0, 1]},
        {**HYBRID, "linear_attention_freq": [0, 1]},
    ],
    ids=lambda options: [*options][-1],
)
def test_options_that_count_rows_or_layers_otherwise_are_refused(options: dict[str, Any]) -> None:
    name = "linear_attention_freq" if "linear_attention_freq" in options else [*options][-1]
    with pytest.raises(ConfigError, match=rf"mtp_num_layers=3 with {name}="):
        transformer_config(model_config({**PREDICTING, **options}), ParallelConfig(), TRAINING)


@pytest.mark.skipif(
    not hasattr(TransformerConfig, "mtp_use_repeated_layer"), reason="0.17 and newer"
)
def test_one_layer_for_all_depths_and_a_loss_of_counts_so_far_are_refused() -> None:
    options = {
        "mtp_use_repeated_layer": True,
        "num_moe_experts": 2,
        "moe_router_load_balancing_type": "global_aux_loss",
        "moe_aux_loss_coeff": 1e-3,
    }
    with pytest.raises(ConfigError, match=r"mtp_use_repeated_layer=True and .*global_aux_loss"):
        transformer_config(model_config({**PREDICTING, **options}), ParallelConfig(), TRAINING)


def test_rows_that_follow_one_another_are_refused_with_it() -> None:
    training = dataclasses.replace(TRAINING, share_across_microbatches=True)
    with pytest.raises(ConfigError, match=r"share_across_microbatches: true .*mtp_num_layers: 3"):
        transformer_config(model_config(PREDICTING), ParallelConfig(), training)


@pytest.mark.parametrize(
    "options",
    [
        {"share_embeddings_and_output_weights": True},
        {"position_embedding_type": "learned_absolute"},
    ],
)
def test_what_a_last_stage_holds_twice_is_refused(options: dict[str, Any]) -> None:
    model = model_config(PREDICTING, **options)
    with pytest.raises(ConfigError, match=f"{next(iter(options))}: .*the last stage"):
        transformer_config(model, ParallelConfig(pipeline_model_parallel_size=2), TRAINING)
    transformer_config(model, ParallelConfig(), TRAINING)

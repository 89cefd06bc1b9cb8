"""Replayed routes against Megatron's own replay, one whole sequence after the other."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.config import ParallelConfig
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layout import PackedLayout, PrefixTree, pack, route_keys, routes_of_row
from megatron_prefix.model.build import ModelChunks, build_gpt_model
from megatron_prefix.model.full_tensors import (
    full_parameters,
    load_full_parameters,
)
from megatron_prefix.model.transformer_config import transformer_config
from tests.distributed import run_distributed
from tests.megatron.models import (
    ON_CPU,
    TRAINING,
    model_config,
    model_pair,
    relative_error,
    sequence_logits,
    single_process,
    whole_gradients,
)

try:
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
except ImportError:
    RouterReplay = None
needs_replay = pytest.mark.skipif(RouterReplay is None, reason="megatron-core before 0.16")

EXPERTS, TOPK, LAYERS = 6, 2, 2
MODEL = model_config(
    {
        "num_layers": 3,
        "moe_layer_freq": [0, 1, 1],
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOPK,
        "moe_ffn_hidden_size": 24,
        "moe_shared_expert_intermediate_size": 24,
    },
    vocab_size=62,
)


def random_routes(rng: np.random.Generator, num_tokens: int) -> np.ndarray:
    return rng.random((num_tokens, LAYERS, EXPERTS)).argsort(-1)[..., :TOPK]


def sampled(rng: np.random.Generator) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Sequences with their routes: two groups, and one of which a rollout was routed otherwise."""
    sequences, routes = [], []
    for prefix, lengths in [(9, [4, 6, 1]), (12, [3, 5]), (20, [7, 2, 9])]:
        prompt, of_prompt = rng.integers(0, 61, prefix), random_routes(rng, prefix)
        for length in lengths:
            sequences.append(np.concatenate([prompt, rng.integers(0, 61, length)]))
            routes.append(np.concatenate([of_prompt, random_routes(rng, length - 1)]))
    # The last group's last rollout: its prompt parts from the others' in the middle.
    routes[-1][8:] = random_routes(rng, len(routes[-1]) - 8)
    return sequences, routes


def tree_of(sequences: list[np.ndarray], routes: list[np.ndarray]) -> PrefixTree:
    return PrefixTree.from_sequences(sequences, keys=route_keys(routes))


def replayed_logits(model: GPTModel, tokens: np.ndarray, routes: np.ndarray) -> torch.Tensor:
    """Of the unmodified model, by Megatron's own replay."""
    RouterReplay.set_replay_data([torch.from_numpy(routes[:, i]) for i in range(LAYERS)])
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    return sequence_logits(model, tokens)


def unmodified(reference: GPTModel) -> GPTModel:
    """With Megatron's replay, and the weights of another model."""
    RouterReplay.clear_global_router_replay_instances()
    config = dataclasses.replace(reference.config, moe_enable_routing_replay=True)
    model = build_gpt_model(MODEL, config, shared_prefixes=False)
    model.load_state_dict(reference.state_dict())
    return model


@needs_replay
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("trim_last_layer", [False, True], ids=["", "trimmed last layer"])
def test_training_equals_the_unmodified_model_with_the_same_routes(
    recompute: str, trim_last_layer: bool
) -> None:
    sequences, routes = sampled(np.random.default_rng())
    tree = tree_of(sequences, routes)
    layout = pack(tree, pad_to_multiple=8)
    needed = np.flatnonzero(layout.multiplicity == 1) if trim_last_layer else None
    training = dataclasses.replace(TRAINING, recompute=recompute)
    with single_process():
        reference, grouped = model_pair(MODEL, training)
        reference = unmodified(reference)
        params = PrefixPackedSeqParams.from_layout(
            layout,
            ON_CPU,
            needed=needed,
            routes=routes_of_row(layout, routes, num_experts=EXPERTS),
        )
        logits = grouped(
            torch.from_numpy(layout.input_ids)[None],
            params.position_ids[None],
            None,
            packed_seq_params=params,
        )[0]
        place = np.full(layout.num_tokens, -1)
        place[params.output_rows] = np.arange(len(params.output_rows))
        loss = expected_loss = 0.0
        for i, tokens in enumerate(sequences):
            expected = replayed_logits(reference, tokens, routes[i])
            rows = place[layout.sequence_positions(i)]
            found, expected = logits[rows[rows >= 0]], expected[torch.from_numpy(rows >= 0)]
            assert relative_error(found, expected) <= 1e-12
            weights = torch.randn_like(expected)
            loss = loss + (found * weights).sum()
            expected_loss = expected_loss + (expected * weights).sum()
        loss.backward()
        expected_loss.backward()
        for (name, parameter), other in zip(
            grouped.named_parameters(), reference.parameters(), strict=True
        ):
            assert relative_error(parameter.grad, other.grad) <= 1e-10, name


def test_tokens_with_other_routes_are_not_shared() -> None:
    sequences, routes = sampled(np.random.default_rng(4))  # no two responses begin alike
    tree = tree_of(sequences, routes)
    same_ids = PrefixTree.from_sequences(sequences)
    # 12 of the last group's 20 tokens of prompt are routed otherwise in one rollout.
    assert tree.grouped_tokens == same_ids.grouped_tokens + 12
    with pytest.raises(ValueError, match=r"sequences 6 and 7 share token 8, but have different"):
        routes_of_row(pack(same_ids), routes, num_experts=EXPERTS)


@needs_replay
def test_the_routers_choose_again_once_the_batch_has_run() -> None:
    sequences, routes = sampled(np.random.default_rng())
    layout = pack(tree_of(sequences, routes))
    with single_process():
        _, grouped = model_pair(MODEL)

        def logits(**options: Any) -> torch.Tensor:
            params = PrefixPackedSeqParams.from_layout(layout, ON_CPU, **options)
            tokens, positions = torch.from_numpy(layout.input_ids)[None], params.position_ids[None]
            return grouped(tokens, positions, None, packed_seq_params=params)[0]

        chosen = logits()
        replayed = logits(routes=routes_of_row(layout, routes, num_experts=EXPERTS))
        assert relative_error(replayed, chosen) > 1e-3
        assert torch.equal(logits(), chosen)


LAYOUTS = {
    "tensor parallel": ParallelConfig(tensor_model_parallel_size=2),
    "spread experts": ParallelConfig(
        tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1
    ),
    "context parallel": ParallelConfig(context_parallel_size=2),
}


def _train(
    parallel: ParallelConfig, layout: PackedLayout, routes: np.ndarray, parameters: Any
) -> tuple[Any, Any]:
    """Whole parameters, and whole gradients of a fixed loss, on rank 0."""
    with runtime(parallel, device="cpu", seed=3, timeout_minutes=2, float64=True):
        config = transformer_config(MODEL, parallel, TRAINING)
        model = build_gpt_model(MODEL, config)
        chunks = ModelChunks(wrapped=[], bare=[model], config=config, head=None)
        if parameters is not None:
            load_full_parameters(chunks, parameters)
        group = parallel_state.get_context_parallel_group()
        setup = AttentionSetup.of(config, torch.device("cpu"), context_parallel_group=group)
        params = PrefixPackedSeqParams.from_layout(layout, setup, routes=routes)
        tokens = params.own(layout.input_ids)[None]
        logits = model(tokens, params.position_ids[None], None, packed_seq_params=params)[0]
        return full_parameters(chunks), whole_gradients(chunks, logits, params, layout)


def _on_ranks(rank: int, world_size: int, *inputs: Any) -> Any:
    return _train(*inputs)[1]


@needs_replay
@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_ranks_replay_their_parts_of_the_row(parallel: ParallelConfig) -> None:
    sequences, of_sequences = sampled(np.random.default_rng(7))
    layout = pack(tree_of(sequences, of_sequences), pad_to_multiple=4)
    routes = routes_of_row(layout, of_sequences, num_experts=EXPERTS)
    parameters, expected = _train(ParallelConfig(), layout, routes, None)
    inputs = (parallel, layout, routes, parameters)
    gradients = run_distributed(_on_ranks, 2, *inputs, init_process_group=False)[0]
    for name, gradient in expected.items():
        assert relative_error(gradients[name], gradient) <= 1e-10, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((1, 3, 1, 0, EXPERTS), r"sequence 1: token 3: layer 1: expert 6 is none of the model's 6"),
        ((2, 0, 0, 1, None), r"sequence 2: token 0: layer 0: the experts \[(\d), \1\] name one tw"),
    ],
)
def test_routes_that_cannot_be_are_named(change: tuple[Any, ...], message: str) -> None:
    sequences, routes = sampled(np.random.default_rng())
    layout = pack(tree_of(sequences, routes))
    sequence, token, layer, place, expert = change
    at = routes[sequence][token, layer]
    at[place] = at[1 - place] if expert is None else expert
    with pytest.raises(ValueError, match=message):
        routes_of_row(layout, routes, num_experts=EXPERTS)


def test_routes_of_another_model_are_refused() -> None:
    sequences, routes = sampled(np.random.default_rng())
    with pytest.raises(ValueError, match=r"sequence 1: routes \(\d+, 1, 2\), but those of seque"):
        route_keys([routes[0], routes[1][:, :1]])
    if RouterReplay is None:
        return
    layout = pack(tree_of(sequences, routes))
    row = routes_of_row(layout, routes, num_experts=EXPERTS)
    with single_process():
        _, grouped = model_pair(MODEL)
        params = PrefixPackedSeqParams.from_layout(layout, ON_CPU, routes=row[:, :1])
        tokens, positions = torch.from_numpy(layout.input_ids)[None], params.position_ids[None]
        with pytest.raises(ValueError, match=r"the model has 2 layers with experts and sends a"):
            grouped(tokens, positions, None, packed_seq_params=params)

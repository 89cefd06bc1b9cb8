"""Gated delta nets on context-parallel ranks, against the same row in one process.

That row is compared with every sequence alone, token after token, in test_gated_delta_net.py. All
layouts run in one world of four ranks. What these tests do not cover: NCCL.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.config import ParallelConfig
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layout import PackedLayout, PrefixTree, pack, shard_layout
from megatron_prefix.megatron.comm_type_list import repair_comm_type_list
from megatron_prefix.megatron.gated_delta_net import GatedDeltaNet
from megatron_prefix.model.build import ModelChunks
from megatron_prefix.model.full_tensors import full_parameters, load_full_parameters
from tests.distributed import run_distributed
from tests.megatron.models import random_groups, relative_error, whole_gradients

if GatedDeltaNet is None:
    pytest.skip("megatron-core before 0.16 has no gated delta net", allow_module_level=True)
from tests.megatron.test_gated_delta_net import build, config_of

FULL_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on some ranks."""

    pattern: list[int]
    """[layers] 1: a gated delta net, 0: attention."""
    kinds: list[str]
    """[layers] `cp_comm_type`"""
    parallel: ParallelConfig
    options: dict[str, Any] = field(default_factory=dict)
    """That every layout of the model has."""
    on_ranks: dict[str, Any] = field(default_factory=dict)
    """Options of the layout on ranks only."""
    trimmed: bool = False
    """The last layer computes the outputs of responses only."""

    def config(self, parallel: ParallelConfig) -> Any:
        """Megatron's config in one process, or on ranks."""
        options = dict(self.options)
        if parallel.context_parallel_size > 1:
            options.update(self.on_ranks, cp_comm_type=self.kinds)
        config = config_of(
            self.pattern,
            num_query_groups=4,
            linear_num_key_heads=4,
            linear_num_value_heads=8,
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            sequence_parallel=parallel.uses_sequence_parallel,
            context_parallel_size=parallel.context_parallel_size,
            **options,
        )
        repair_comm_type_list(config)
        return config


CASES = {
    "two ranks, trimmed last layer": Case(
        pattern=[1, 1, 0, 1],
        kinds=["all_gather", "a2a", "p2p", "p2p"],
        parallel=ParallelConfig(context_parallel_size=2),
        trimmed=True,
    ),
    "four ranks, heads in the last layer": Case(
        pattern=[1, 0, 1, 1],
        kinds=["p2p", "a2a", "all_gather", "a2a"],
        parallel=ParallelConfig(context_parallel_size=4),
        trimmed=True,
    ),
    "tensor parallel, experts, full recompute": Case(
        pattern=[1, 1, 1, 0],
        kinds=["all_gather", "a2a", "p2p", "all_gather"],
        parallel=ParallelConfig(
            tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2
        ),
        options=EXPERTS,
        on_ranks=FULL_RECOMPUTE,
    ),
}


def rows() -> dict[str, PackedLayout]:
    """Packed rows; the same on every rank."""
    rng = np.random.default_rng(5)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(0, 61, count)

    prompt, turns = tokens(150), [tokens(n) for n in (200, 3, 90)]
    levels = [np.concatenate((prompt, turn, tokens(n))) for turn in turns for n in (20, 1, 45)]
    groups = [(330, [20, 33, 1, 41]), (1, [5, 1]), (2, [3, 2])]
    trees = {
        "three levels": PrefixTree.from_sequences(levels),
        "prompts shorter than the convolution": random_groups(rng, groups),
        "ranks without tokens": random_groups(rng, [(3, [1])]),
    }
    return {name: pack(tree, pad_to_multiple=8) for name, tree in trees.items()}


def run_case(
    case: Case, parallel: ParallelConfig, parameters: dict[str, torch.Tensor] | None
) -> tuple[dict[str, torch.Tensor] | None, dict[str, Any]]:
    """Whole parameters, and for each row: positions, logits and, on rank 0, whole gradients."""
    found = {}
    with runtime(parallel, device="cpu", seed=3, timeout_minutes=2, float64=True) as place:
        config = case.config(parallel)
        model = build(config, grouped=True)
        chunks = ModelChunks(wrapped=[], bare=[model], config=config, head=None)
        if parameters is not None:
            load_full_parameters(chunks, parameters)
        setup = AttentionSetup.of(
            config, torch.device("cpu"), context_parallel_group=place.context_parallel_group
        )
        for name, layout in rows().items():
            needed = np.flatnonzero(layout.multiplicity == 1) if case.trimmed else None
            params = PrefixPackedSeqParams.from_layout(
                layout, setup, needed=needed, multiple=parallel.tensor_model_parallel_size
            )
            model.zero_grad()
            tokens = params.own(layout.input_ids)[None]
            logits = model(tokens, params.position_ids[None], None, packed_seq_params=params)[0]
            gradients = whole_gradients(chunks, logits, params, layout, needed)
            found[name] = (params.own_rows[params.output_rows], logits.detach(), gradients)
        return full_parameters(chunks), found


def _on_ranks(
    rank: int, world_size: int, parameters: dict[str, dict[str, torch.Tensor]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    torch.use_deterministic_algorithms(True)  # torch.empty is full of NaN
    found = {
        name: run_case(case, case.parallel, parameters[name])[1] for name, case in CASES.items()
    }
    return found, _of_one_layer()


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """[case] -> whole parameters, and logits and gradients of each row, in one process."""
    return {name: run_case(case, ParallelConfig(), None) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def on_ranks(expected: dict[str, Any]) -> list[Any]:
    """[rank] what `_on_ranks` returns."""
    parameters = {name: found[0] for name, found in expected.items()}
    return run_distributed(_on_ranks, 4, parameters, timeout=240)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_those_of_one_process(
    case: str, expected: dict[str, Any], on_ranks: list[Any]
) -> None:
    split = CASES[case].parallel.tensor_model_parallel_size
    for row, (positions, logits, gradients) in expected[case][1].items():
        whole = dict(zip(positions.tolist(), logits, strict=True))
        seen = set()
        for rank, (of_cases, _) in enumerate(on_ranks):
            own, found, _ = of_cases[case][row]
            is_needed = [position in whole for position in own.tolist()]
            own = own[is_needed]
            seen.update(own.tolist())
            if len(own):
                target = torch.stack([whole[position] for position in own.tolist()])
                target = target.tensor_split(split, dim=1)[rank % split]
                assert relative_error(found[is_needed], target) <= 1e-11, row
        layout = rows()[row]
        real = layout.num_tokens - layout.num_padding
        assert seen.issuperset(position for position in whole if position < real)
        norm = sum(float(x.norm()) ** 2 for x in gradients.values()) ** 0.5
        for name, gradient in gradients.items():
            error = float((on_ranks[0][0][case][row][2][name] - gradient).norm())
            # Heads that forget at once have gradients near zero, which have no relative error.
            assert error <= 1e-10 * max(float(gradient.norm()), 1e-6 * norm), (row, name)


def test_the_rows_have_what_is_hard() -> None:
    """Sharded segments on two levels and in uneven shards, pieces of several chunks, and ranks that
    have no part of a sharded segment."""
    shards = {name: shard_layout(layout, 4) for name, layout in rows().items()}
    levels = shards["three levels"]
    assert {levels.layout.segments[i].level for i in levels.sharded} == {0, 1}
    assert len(set(levels.shard_tokens.tolist())) > 1
    assert ((levels.early + levels.late) == 0).any()
    two = shard_layout(rows()["prompts shorter than the convolution"], 2)
    assert max(two.early.max(), two.late.max()) > 64
    assert (shards["ranks without tokens"].shard_tokens == 0).any()


def _of_one_layer() -> dict[str, Any]:
    """(bytes sent in forward, in backward, bytes kept for backward) of a layer on two ranks."""
    parallel = ParallelConfig(context_parallel_size=2)
    shapes = {
        "a prompt": (500, [60] * 8),
        "a longer prompt": (1000, [60] * 8),
        "longer responses": (500, [120] * 8),
        "one response": (128, [480]),
        "many responses": (128, [8] * 60),
    }
    found = {}
    with runtime(parallel, device="cpu", seed=3, timeout_minutes=2, float64=True) as place:
        config = config_of([1, 1], context_parallel_size=2, cp_comm_type=["p2p", "a2a"])
        repair_comm_type_list(config)
        layers = [layer.self_attention for layer in build(config, grouped=True).decoder.layers]
        setup = AttentionSetup.of(
            config, torch.device("cpu"), context_parallel_group=place.context_parallel_group
        )
        for name, shape in shapes.items():
            tree = random_groups(np.random.default_rng(2), [shape])
            layout = pack(tree, pad_to_multiple=2, pad_to=640 if shape[0] == 128 else None)
            params = PrefixPackedSeqParams.from_layout(layout, setup)
            hidden = torch.randn(len(params.own_rows), 1, 32, requires_grad=True)
            sizes: dict[int, int] = {}

            def note(x: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            kept = []
            for layer in layers:
                with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
                    out, _ = layer(hidden, None, packed_seq_params=params)
                kept.append(sum(sizes.values()))
                sizes.clear()
                out.sum().backward()
            sent = params.recurrence.exchange.traffic.sent
            for number, bytes_kept in enumerate(kept, 1):
                found[name, number] = (
                    sent[number, "forward"],
                    sent[number, "backward"],
                    bytes_kept,
                    len(hidden),
                )
    return found


def test_gathered_states_do_not_depend_on_the_prompts_length(on_ranks: list[Any]) -> None:
    heads, keys, values, channels, halo = 4, 8, 6, 2 * 16 + 24, 3
    for rank, (_, of_layer) in enumerate(on_ranks):
        forward, backward, *_ = of_layer["a prompt", 1]
        # Two pieces: one rank has the outer two, with a halo before the late one; the other rank's
        # halo is before its early one. The responses have theirs in the prompt's end.
        states = 2 * heads * keys * (keys + values) * 8
        assert (forward - states) % (halo * channels * 8) == 0
        assert states < forward <= states + 2 * halo * channels * 8
        begins = 2 * heads * keys * values * 8
        factors = 2 * heads * keys * keys * 8
        assert backward in [
            factors + begins + i * heads * keys * values * 8 + j * halo * channels * 8
            for i in (0, 1)
            for j in (1, 2)
        ]
        for other in ("a longer prompt", "longer responses"):
            assert of_layer[other, 1][:2] == (forward, backward), (rank, other)


def test_exchanged_heads_are_the_channels_of_the_row(on_ranks: list[Any]) -> None:
    for _, of_layer in on_ranks:
        for name in ("a prompt", "a longer prompt"):
            forward, backward, _, tokens = of_layer[name, 2]
            # q, k, v, beta and alpha of the other rank's heads, and its outputs.
            assert forward == backward == tokens * (2 * 16 + 24 + 4 + 4 + 24) // 2 * 8


def test_what_is_kept_for_backward_does_not_grow_with_the_branches(on_ranks: list[Any]) -> None:
    for _, of_layer in on_ranks:
        for number in (1, 2):
            one, many = (of_layer[what, number][2] for what in ("one response", "many responses"))
            assert many <= 1.01 * one

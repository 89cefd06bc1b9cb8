"""What Mamba's layers send each other and keep on context-parallel ranks.

Their results are compared with those of whole sequences in tests/tools/test_verify_hybrids.py.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.config import ParallelConfig
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layout import pack
from megatron_prefix.model.build import build_model
from megatron_prefix.model.transformer_config import transformer_config
from tests.distributed import run_distributed
from tests.megatron.models import HAS_HYBRID_MODEL, MAMBA, TRAINING, model_config, random_groups

if not HAS_HYBRID_MODEL:
    pytest.skip("megatron-core before 0.18 has no HybridModel", allow_module_level=True)

HEADS, GROUPS, VALUES, STATES = (
    MAMBA[f"mamba_{name}"] for name in ("num_heads", "num_groups", "head_dim", "state_dim")
)
CHANNELS = HEADS * VALUES + 2 * GROUPS * STATES
SHAPES = {
    "a prompt": (500, [60] * 8),
    "a longer prompt": (1000, [60] * 8),
    "longer responses": (500, [120] * 8),
    "one response": (128, [480]),
    "many responses": (128, [8] * 60),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """Of one layer and row: bytes sent, bytes kept for backward, and the rank's tokens."""

    forward: int
    backward: int
    kept: int
    tokens: int


def _of_layers(rank: int, world_size: int) -> dict[tuple[str, int], Found]:
    """Layer 1 gathers states, layer 2 exchanges heads."""
    parallel = ParallelConfig(context_parallel_size=world_size)
    model = model_config({**MAMBA, "cp_comm_type": ["p2p", "a2a"]}, hybrid_layer_pattern="MM")
    found = {}
    with runtime(parallel, device="cpu", seed=3, timeout_minutes=2, float64=True) as place:
        config = transformer_config(model, parallel, TRAINING)
        mixers = [layer.mixer for layer in build_model(model, config).decoder.layers]
        setup = AttentionSetup.of(
            config, torch.device("cpu"), context_parallel_group=place.context_parallel_group
        )
        for name, shape in SHAPES.items():
            tree = random_groups(np.random.default_rng(2), [shape])
            layout = pack(tree, pad_to_multiple=2, pad_to=640 if shape[0] == 128 else None)
            params = PrefixPackedSeqParams.from_layout(layout, setup)
            hidden = torch.randn(len(params.own_rows), 1, 32, requires_grad=True)
            kept: list[int] = []
            for mixer in mixers:
                sizes: dict[int, int] = {}

                def note(x: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
                    sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                    return x

                with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
                    out, _ = mixer(hidden, packed_seq_params=params)
                kept.append(sum(sizes.values()))
                out.sum().backward()
            sent = params.recurrence.exchange.traffic.sent
            for number, bytes_kept in enumerate(kept, 1):
                found[name, number] = Found(
                    forward=sent[number, "forward"],
                    backward=sent[number, "backward"],
                    kept=bytes_kept,
                    tokens=len(hidden),
                )
    return found


@pytest.fixture(scope="module")
def on_ranks() -> list[dict[tuple[str, int], Found]]:
    """[rank] what `_of_layers` returns."""
    return run_distributed(_of_layers, 2, timeout=240)


def test_gathered_states_do_not_depend_on_the_prompts_length(
    on_ranks: list[dict[tuple[str, int], Found]],
) -> None:
    halo = 3 * CHANNELS * 8
    state = HEADS * STATES * VALUES * 8
    factors = 2 * HEADS * STATES * 8
    for of_rank in on_ranks:
        found = of_rank["a prompt", 1]
        # Two pieces, of each a number for each row of the state and what is added to it; and one or
        # two halos, before pieces and the responses.
        assert found.forward - factors - 2 * state in (halo, 2 * halo)
        assert found.backward in [factors + n * state + i * halo for n in (2, 3) for i in (1, 2)]
        for other in ("a longer prompt", "longer responses"):
            same = dataclasses.replace(of_rank[other, 1], kept=found.kept, tokens=found.tokens)
            assert same == found


def test_exchanged_heads_are_the_channels_of_the_row(
    on_ranks: list[dict[tuple[str, int], Found]],
) -> None:
    for of_rank in on_ranks:
        for name in ("a prompt", "a longer prompt"):
            found = of_rank[name, 2]
            # x, B, C and dt of the other rank's heads, and its outputs.
            numbers = found.tokens * (CHANNELS + HEADS + HEADS * VALUES) // 2
            assert found.forward == found.backward == numbers * 8


def test_what_is_kept_for_backward_does_not_grow_with_the_branches(
    on_ranks: list[dict[tuple[str, int], Found]],
) -> None:
    for of_rank in on_ranks:
        for number in (1, 2):
            one, many = (of_rank[name, number].kept for name in ("one response", "many responses"))
            assert many <= 1.01 * one

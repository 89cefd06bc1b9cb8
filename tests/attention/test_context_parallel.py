"""Attention over a distributed row equals attention over the whole row, on real process groups.

What these tests do not cover: NCCL, and communication that really overlaps with computing.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_prefix.attention.comm_types import COMM_TYPES, CommType
from megatron_prefix.attention.exchange import Exchange
from megatron_prefix.attention.kernels import Kernel, select_kernel
from megatron_prefix.attention.row_attention import AttentionLayer, RowAttention
from megatron_prefix.device_copy import record_to_device
from megatron_prefix.layout import (
    PackedLayout,
    PrefixTree,
    RankRow,
    pack,
    rank_row,
    shard_layout,
)
from tests.attention.oracle import (
    assert_close,
    dense_attention,
    gradients,
    group,
    random_qkv,
    random_tree,
    visible_keys,
)
from tests.distributed import run_distributed

SCALE = 0.2
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 32

SHAPES: dict[str, list[tuple[int, list[int]]]] = {
    "long prefix": [(150, [20, 33, 27, 41, 18, 25])],
    "prefix shorter than chunks": [(4, [30, 31, 29, 35])],
    "prefix of one token": [(1, [40, 37])],
    "one long response": [(30, [9, 7, 200, 8])],
    "fewer responses than ranks": [(90, [31])],
    "many groups": [(40, [11, 30, 5]), (7, [60, 2]), (33, [8] * 9), (1, [1]), (80, [3])],
    "groups that fit": [(20, [5, 5]), (20, [5, 5]), (20, [5, 5]), (20, [5, 5])],
    "one token": [(2, [1])],
}


def layouts(seed: int, cp: int) -> dict[str, PackedLayout]:
    """Rows of every shape; the same on every rank."""
    rng = np.random.default_rng(seed)
    trees = {
        name: PrefixTree.from_groups([group(p, r) for p, r in groups])
        for name, groups in SHAPES.items()
    }
    trees["deep"] = random_tree(rng, num_nodes=30)
    trees["three levels"] = PrefixTree.from_sequences(
        [1] * 50 + [2 + turn] * 23 + [9 + i] * int(rng.integers(1, 40))
        for turn in range(3)
        for i in range(4)
    )
    trees["nothing"] = PrefixTree.from_groups([])
    return {name: pack(tree, pad_to_multiple=cp) for name, tree in trees.items()}


def _inputs(layout: PackedLayout, seed: int, dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(seed)
    inputs = random_qkv(layout.num_tokens, HEADS, KV_HEADS, HEAD_DIM, dtype)
    return inputs, torch.randn(layout.num_tokens, HEADS, HEAD_DIM, dtype=dtype)


def _on_rank(
    layout: PackedLayout, kernel: Kernel, comm_types: Sequence[CommType] = COMM_TYPES
) -> tuple[RankRow, RowAttention]:
    """This rank's part of a row, for every kind of communication."""
    group = dist.group.WORLD
    row = rank_row(
        layout,
        rank=dist.get_rank(group),
        num_ranks=dist.get_world_size(group),
        comm_types=comm_types,
    )
    attention = RowAttention(
        stages=record_to_device(row.model.stages, "cpu"),
        kernel=kernel,
        deterministic=False,
        exchange=Exchange(group, row.shards.shard_tokens.tolist()),
    )
    return row, attention


def run_all(
    rank: int, cp: int, seed: int, dtype: torch.dtype, kernel_name: str, kinds: Sequence[str]
) -> dict[str, Any]:
    """[shape][kind] -> this rank's rows, out, dq, dk, dv and bytes; twice, for their bits."""
    torch.use_deterministic_algorithms(True)  # torch.empty is full of NaN
    results: dict[str, Any] = {}
    kernel = select_kernel(kernel_name, device="cpu", dtype=dtype, head_dim=HEAD_DIM)
    for name, layout in layouts(seed, cp).items():
        for kind in kinds:
            runs = []
            for _ in range(2):
                row, attention = _on_rank(layout, kernel)
                rows = torch.from_numpy(row.rows)
                whole, dout = _inputs(layout, seed, dtype)
                mine = [torch.where(rows[:, None, None] < 0, 7.0, x[rows]) for x in whole]
                inputs = tuple(x.to(dtype).requires_grad_() for x in mine)
                out = attention(*inputs, AttentionLayer(number=3, scale=SCALE, comm_type=kind))
                mine_dout = torch.where(rows[:, None, None] < 0, 0.0, dout[rows]).to(dtype)
                runs.append((out.detach(), *gradients(out, mine_dout, inputs)))
            assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), (name, kind)
            received = dict(attention.exchange.traffic.received)
            results[name, kind] = (row.rows, runs[0], received)
    return results


def check(cp: int, dtype: torch.dtype, kernel: str, kinds: Sequence[str], tolerance: float) -> None:
    """out, dq, dk, dv of all ranks, put together, against a dense mask in float64."""
    seed = secrets.randbits(31)
    print(f"seed {seed}")
    found = run_distributed(run_all, cp, seed, dtype, kernel, kinds)
    for name, layout in layouts(seed, cp).items():
        if layout.num_padding == layout.num_tokens:
            continue  # it has run, that is all there is to it
        whole, dout = _inputs(layout, seed, dtype)
        exact = tuple(x.double().requires_grad_() for x in whole)
        expected_out = dense_attention(*exact, visible_keys(layout), SCALE)
        real = layout.num_tokens - layout.num_padding
        dout = dout.double()
        dout[real:] = 0
        expected = (expected_out, *gradients(expected_out, dout, exact))
        for kind in kinds:
            for part, what in enumerate(("out", "dq", "dk", "dv")):
                value = torch.full_like(expected[part], float("nan"))
                for rank in found:
                    rows, tensors, _ = rank[name, kind]
                    value[rows[rows >= 0]] = tensors[part][rows >= 0].double()
                assert_close(
                    value[:real], expected[part][:real], tolerance, f"{name}, {kind}: {what}"
                )


@pytest.mark.parametrize("cp", [2, 4])
def test_every_kind_equals_the_whole_row(cp: int) -> None:
    check(cp, torch.float64, "reference", COMM_TYPES, 1e-12)


def test_three_ranks_in_bfloat16_with_the_fast_kernel() -> None:
    # Three ranks cannot exchange eight heads. bfloat16 rounds out and each gradient (2^-9).
    check(3, torch.bfloat16, "torch_cpu", ("all_gather", "p2p"), 2e-2)


def _received(
    rank: int, cp: int, groups: list[tuple[int, list[int]]], dtype: torch.dtype
) -> dict[str, Any]:
    layout = pack(PrefixTree.from_groups([group(p, r) for p, r in groups]), pad_to_multiple=cp)
    shards = shard_layout(layout, cp)
    kernel = select_kernel(None, device="cpu", dtype=dtype, head_dim=HEAD_DIM)
    received = {"sharded": int(shards.shard_tokens.sum())}
    for kind in ("all_gather", "p2p"):
        row, attention = _on_rank(layout, kernel)
        inputs = random_qkv(len(row.rows), HEADS, KV_HEADS, HEAD_DIM, dtype)
        inputs = tuple(x.detach().requires_grad_() for x in inputs)
        layer = AttentionLayer(number=1, scale=SCALE, comm_type=kind)
        attention(*inputs, layer).sum().backward()
        traffic = attention.exchange.traffic
        received[kind] = traffic.received[1, "forward"]
        received[kind, "backward"] = traffic.received[1, "backward"]
    return received


def _all_received(rank: int, cp: int) -> dict[str, Any]:
    cases = {
        "plain": [(400, [60, 60, 60, 60])],
        "twice as long": [(400, [120, 120, 120, 120])],
        "twice as many": [(400, [60] * 8)],
        "ragged": [(401, [13, 170, 44, 98, 61])],
        "two groups": [(400, [60, 70]), (200, [50, 30, 90])],
    }
    return {
        (name, dtype): _received(rank, cp, groups, dtype)
        for name, groups in cases.items()
        for dtype in (torch.float32, torch.bfloat16)
    }


@pytest.mark.parametrize("cp", [2, 4])
def test_a_rank_receives_the_shards_of_the_others_and_no_more(cp: int) -> None:
    """The counter's bytes against the keys and values of all sharded tokens."""
    ranks = run_distributed(_all_received, cp)
    for rank in ranks:
        for (name, dtype), received in rank.items():
            element = torch.empty(0, dtype=dtype).element_size()
            everything = received["sharded"] * 2 * KV_HEADS * HEAD_DIM * element
            for kind in ("all_gather", "p2p"):
                bound = 1.05 * (cp - 1) / cp * everything
                assert 0 < received[kind] <= bound, (name, kind)
        for dtype in (torch.float32, torch.bfloat16):
            plain = rank["plain", dtype]
            assert rank["twice as long", dtype] == plain
            assert rank["twice as many", dtype] == plain
    for name, dtype in ranks[0]:
        # In backward the keys and values again, and their gradients in float32.
        element = torch.empty(0, dtype=dtype).element_size() + 4
        everything = ranks[0][name, dtype]["sharded"] * 2 * KV_HEADS * HEAD_DIM * element
        for kind in ("all_gather", "p2p"):
            received = sum(rank[name, dtype][kind, "backward"] for rank in ranks)
            assert received == (cp - 1) * everything, (name, kind)


def test_no_bytes_where_every_group_fits_a_rank() -> None:
    (first, _) = run_distributed(_nothing_to_send, 2)
    assert first == 0


def _nothing_to_send(rank: int, cp: int) -> int:
    found = _received(rank, cp, [(40, [9, 12]), (40, [12, 9])], torch.float32)
    return found["all_gather"] + found["p2p"] + found["all_gather", "backward"]


def test_a_layer_of_a_kind_that_the_row_was_not_planned_for_is_refused_by_name() -> None:
    for message in run_distributed(_unplanned, 2):
        assert message.startswith("cp_comm_type=p2p of layer 3: the row was planned for all_gather")
        assert "comm_types of all layers" in message


def _unplanned(rank: int, cp: int) -> str:
    layout = pack(PrefixTree.from_groups([group(40, [9, 12])]), pad_to_multiple=cp)
    kernel = select_kernel(None, device="cpu", dtype=torch.float32, head_dim=HEAD_DIM)
    row, attention = _on_rank(layout, kernel, comm_types=["all_gather"])
    inputs = random_qkv(len(row.rows), HEADS, KV_HEADS, HEAD_DIM, torch.float32)
    with pytest.raises(ValueError) as caught:
        attention(*inputs, AttentionLayer(number=3, scale=SCALE, comm_type="p2p"))
    return str(caught.value)

"""Sliding windows and sinks over a distributed row, on real process groups.

What these tests do not cover: NCCL.
"""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_prefix.attention.comm_types import COMM_TYPES
from megatron_prefix.attention.exchange import Exchange
from megatron_prefix.attention.kernels import select_kernel
from megatron_prefix.attention.row_attention import AttentionLayer, RowAttention
from megatron_prefix.device_copy import record_to_device
from megatron_prefix.layout import PackedLayout, PrefixTree, RankRow, pack, rank_row
from tests.attention.oracle import assert_close, group, in_window, random_qkv, visible_keys
from tests.attention.test_context_parallel import layouts
from tests.attention.test_windows import HEAD_DIM, HEADS, KEY_HEADS, SCALE, dense
from tests.distributed import run_distributed

WINDOWS = [None, 0, 5, 63, 1000]


def on_rank(
    layout: PackedLayout, window: int | None, needed: np.ndarray | None = None
) -> tuple[RankRow, RowAttention]:
    world = dist.group.WORLD
    row = rank_row(
        layout,
        rank=dist.get_rank(world),
        num_ranks=dist.get_world_size(world),
        window=window,
        needed=needed,
    )
    attention = RowAttention(
        stages=record_to_device(row.model.last_stages or row.model.stages, "cpu"),
        kernel=select_kernel(
            None, device="cpu", dtype=torch.float64, head_dim=HEAD_DIM, windows=True
        ),
        deterministic=True,
        exchange=Exchange(world, row.shards.shard_tokens.tolist()),
        window=window,
    )
    return row, attention


def whole_inputs(layout: PackedLayout, seed: int) -> tuple[torch.Tensor, ...]:
    """q, k, v, dout and the sink; the same on every rank."""
    torch.manual_seed(seed)
    inputs = random_qkv(layout.num_tokens, HEADS, KEY_HEADS, HEAD_DIM, torch.float64)
    dout = torch.randn(layout.num_tokens, HEADS, HEAD_DIM, dtype=torch.float64)
    dout[layout.num_tokens - layout.num_padding :] = 0
    return *inputs, dout, torch.randn(HEADS, dtype=torch.float64)


def needed_of(layout: PackedLayout) -> np.ndarray:
    """Some positions of every sequence."""
    count = layout.tree.num_sequences
    last = [layout.sequence_positions(i)[-3:] for i in range(count)]
    return np.concatenate([*last, np.zeros(0, dtype=np.int64)])


def run_all(rank: int, cp: int, seed: int, trimmed: bool) -> dict[Any, Any]:
    """(shape, window) -> rows that attend, rows, out, dq, dk, dv and dsink."""
    torch.use_deterministic_algorithms(True)  # torch.empty is full of NaN
    results: dict[Any, Any] = {}
    # Four ranks cannot exchange two key heads.
    kinds = COMM_TYPES if KEY_HEADS % cp == 0 else ("all_gather", "p2p")
    for name, layout in layouts(seed, cp).items():
        needed = needed_of(layout) if trimmed else None
        for number, window in enumerate(WINDOWS):
            row, attention = on_rank(layout, window, needed)
            rows = row.rows
            queries = attention.stages.queries
            attending = rows if queries is None else rows[queries.numpy()]
            q, k, v, dout, sink = whole_inputs(layout, seed)
            q, dout = (take(x, attending, fill) for x, fill in ((q, 7.0), (dout, 0.0)))
            leaves = [q, *(take(x, rows, 7.0) for x in (k, v)), sink]
            leaves = [x.requires_grad_() for x in leaves]
            layer = AttentionLayer(
                number=1,
                scale=SCALE,
                comm_type=kinds[(number + len(name)) % len(kinds)],
                window=window,
                sink=leaves[3],
            )
            out = attention(*leaves[:3], layer)
            grads = torch.autograd.grad(out, leaves, dout)
            results[name, window] = (attending, rows, out.detach(), *grads)
    return results


def take(x: torch.Tensor, rows: np.ndarray, on_padding: float) -> torch.Tensor:
    index = torch.from_numpy(rows)
    return torch.where(index[:, None, None] < 0, on_padding, x[index]).detach()


@pytest.mark.parametrize("trimmed", [False, True], ids=["", "trimmed last layer"])
@pytest.mark.parametrize("cp", [2, 4])
def test_windows_and_sinks_equal_the_whole_row(cp: int, trimmed: bool) -> None:
    seed = secrets.randbits(31)
    print(f"seed {seed}")
    found = run_distributed(run_all, cp, seed, trimmed)
    for name, layout in layouts(seed, cp).items():
        real = layout.num_tokens - layout.num_padding
        if not real:
            continue
        for window in WINDOWS:
            of_ranks = [rank[name, window] for rank in found]
            computed = np.concatenate([attending for attending, *_ in of_ranks])
            is_computed = torch.zeros(layout.num_tokens, dtype=torch.bool)
            is_computed[computed[computed >= 0]] = True
            is_computed[real:] = False
            q, k, v, dout, sink = whole_inputs(layout, seed)
            leaves = [x.requires_grad_() for x in (q, k, v, sink)]
            visible = visible_keys(layout) if window is None else in_window(layout, window)
            out = dense(*leaves[:3], visible, leaves[3])
            dout = dout * is_computed[:, None, None]
            expected = (out, *torch.autograd.grad(out, leaves, dout))
            for part, what in enumerate(("out", "dq", "dk", "dv")):
                of_queries = what in ("out", "dq")
                value = torch.full_like(expected[part], torch.nan)
                for of_rank in of_ranks:
                    rows = of_rank[0] if of_queries else of_rank[1]
                    value[rows[rows >= 0]] = of_rank[2 + part][rows >= 0]
                kept = is_computed if of_queries else torch.arange(layout.num_tokens) < real
                where = f"{name}, window {window}: {what}"
                assert_close(value[kept], expected[part][kept], 1e-12, where)
            d_sink = sum(of_rank[-1] for of_rank in of_ranks)
            assert_close(d_sink, expected[-1], 1e-12, f"{name}, window {window}: dsink")


def received(rank: int, cp: int) -> dict[str, int]:
    """Bytes of a layer's forward on this rank."""
    found = {}
    groups = {
        "short prefix": (400, [60] * 4),
        "long prefix": (1600, [60] * 4),
        "more responses": (400, [60] * 12),
    }
    for name, (prefix, responses) in groups.items():
        layout = pack(PrefixTree.from_groups([group(prefix, responses)]), pad_to_multiple=cp)
        row, attention = on_rank(layout, 9)
        inputs = random_qkv(len(row.rows), HEADS, KEY_HEADS, HEAD_DIM, torch.float64)
        attention(*inputs, AttentionLayer(number=1, scale=SCALE, comm_type="p2p", window=9))
        found[name] = attention.exchange.traffic.received[1, "forward"]
    return found


def test_a_rank_receives_the_windows_rows_of_its_chunks_and_of_the_prompts_end() -> None:
    row_bytes = 2 * KEY_HEADS * HEAD_DIM * 8
    for rank in run_distributed(received, 2):
        # Before its early and its late chunk, and before its responses.
        assert all(count <= 3 * 9 * row_bytes for count in rank.values()), rank
        assert any(rank.values())

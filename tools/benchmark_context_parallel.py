"""Bytes and time of context-parallel training steps, for each kind of communication.

    python tools/benchmark_context_parallel.py --cp 2 --json
    python tools/benchmark_context_parallel.py --dispatch

Forward and backward of a real Megatron GPTModel on `--cp` processes (CPU, gloo, one thread each).
Bytes are those that the busiest rank has received in one layer, as counted where tensors are handed
to torch.distributed; beside them the least that is possible, (cp - 1) / cp of the sharded tokens'
keys and values, and what would travel if the whole packed row were gathered. Before a row is
printed, loss and gradients of all kinds must agree. Kinds take turns step by step. `--dispatch`
only times the dispatcher, on a thousand segments and 64 ranks.

With --json or --dispatch the last line of stdout is a JSON object. Columns: `work` is the busiest
rank's attention work over the ranks' mean, `dispatch` the time to distribute the row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

sys.path.insert(0, str(Path(__file__).resolve().parent))

from benchmark import add_common_arguments, model_sizes
from benchmarks.shapes import Shape, make_batch, parse_case, training_config, trees
from tool_help import HelpFormatter, require_megatron

from megatron_prefix.attention.comm_types import COMM_TYPES
from megatron_prefix.config import ParallelConfig
from megatron_prefix.layout import ContextShards, PackedLayout, PrefixTree, pack, shard_layout

# What imports torch and Megatron is imported where it is used: help and wrong arguments need none.
if TYPE_CHECKING:
    import torch

    from megatron_prefix.model.build import ModelChunks

DEFAULT_CASES = ("8,2048,256", "16,2048,256", "8,2048,512")
LAYER = 1

KINDS = tuple(kind for kind in COMM_TYPES if kind != "latent_gather")
"""Those of a model with grouped-query attention, which has no latents."""


def set_comm_type(chunks: ModelChunks, kind: str) -> None:
    """Let all layers communicate by this kind from now on."""
    for chunk in chunks.bare:
        for layer in chunk.decoder.layers:
            attention = layer.self_attention.core_attention
            attention.prefix_layer = dataclasses.replace(attention.prefix_layer, comm_type=kind)


def measure(args: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """This rank's seconds, bytes and loss for each kind, and what its row looks like."""
    import torch.distributed as dist
    from benchmarks.levels import OBJECTIVE

    from megatron_prefix.attention.row_attention import AttentionSetup
    from megatron_prefix.distributed.runtime import runtime
    from megatron_prefix.model.build import build_model_chunks
    from megatron_prefix.training.step import accumulate_gradients

    parallel = ParallelConfig(context_parallel_size=args.cp)
    with runtime(parallel, device="cpu", seed=args.seed, timeout_minutes=10) as place:
        chunks = build_model_chunks(
            model_sizes(args).config(),
            parallel,
            training_config(),
            use_distributed_optimizer=False,
        )
        setup = dataclasses.replace(
            AttentionSetup.of(
                chunks.config,
                place.device,
                context_parallel_group=place.context_parallel_group,
            ),
            comm_types=tuple(args.kinds),
        )
        tree = trees(shape, args.vocab, args.seed)["grouped"]
        seconds: dict[str, list[float]] = {kind: [] for kind in args.kinds}
        bytes_received: dict[str, dict[str, int]] = {}
        losses, gradients = {}, {}
        for repeat in range(args.repeats + 1):
            for kind in args.kinds:
                set_comm_type(chunks, kind)
                batch = make_batch(tree, shape, setup)
                dist.barrier()
                started = time.perf_counter()
                loss = accumulate_gradients(chunks, [batch], OBJECTIVE)[0].policy_loss.float()
                dist.barrier()
                if repeat:
                    seconds[kind].append(time.perf_counter() - started)
                    continue
                # The first one warms up, and is looked at.
                dist.all_reduce(loss)
                losses[kind] = float(loss)
                gradients[kind] = [p.main_grad.clone() for _, p in chunks.named_parameters()]
                received = batch.params.attention.exchange.traffic.received
                bytes_received[kind] = {
                    direction: received[LAYER, direction] for direction in ("forward", "backward")
                }
        _check_equal(losses, gradients)
        config = chunks.config
        return {
            "seconds": seconds,
            "bytes": bytes_received,
            "bytes_per_token": 2 * config.num_query_groups * config.kv_channels * 4,
        }


def _check_equal(losses: dict[str, float], gradients: dict[str, list[torch.Tensor]]) -> None:
    first, *others = losses
    for kind in others:
        for a, b in zip(gradients[first], gradients[kind], strict=True):
            error = float((a - b).norm() / a.norm().clamp(min=1e-12))
            if not error < 2e-3:  # float32 sums over thousands of tokens in another order
                raise RuntimeError(f"{first} and {kind}: gradients differ by {error:.1e}")
        if not abs(losses[first] - losses[kind]) < 1e-4:
            raise RuntimeError(f"losses differ, {losses}: nothing is reported")


def _worker(rank: int, args: argparse.Namespace, shape: Shape, folder: str) -> None:
    found = measure(args, shape)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def benchmark(args: argparse.Namespace, shape: Shape) -> list[dict[str, Any]]:
    """One row for each kind."""
    from ranks import run_ranks

    with tempfile.TemporaryDirectory() as folder:
        run_ranks(_worker, args.cp, args, shape, folder)
        ranks = [
            json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8"))
            for rank in range(args.cp)
        ]
    layout = pack(trees(shape, args.vocab, args.seed)["grouped"], pad_to_multiple=args.cp)
    shards, dispatch_ms = time_dispatch(layout, args.cp)
    per_token = ranks[0]["bytes_per_token"]
    others = (args.cp - 1) / args.cp
    return [
        {
            "G": shape.group_size,
            "prefix": shape.prefix,
            "response": shape.response,
            "cp": args.cp,
            "kind": kind,
            "seconds": statistics.median(
                max(rank["seconds"][kind][i] for rank in ranks) for i in range(args.repeats)
            ),
            "forward_bytes": max(rank["bytes"][kind]["forward"] for rank in ranks),
            "backward_bytes": max(rank["bytes"][kind]["backward"] for rank in ranks),
            "least_forward_bytes": round(others * int(shards.shard_tokens.sum()) * per_token),
            "whole_row_forward_bytes": round(others * layout.num_tokens * per_token),
            "work_above_mean": shards.imbalance,
            "padding": layout.num_padding / layout.num_tokens,
            "dispatch_ms": dispatch_ms,
        }
        for kind in args.kinds
    ]


def time_dispatch(layout: PackedLayout, num_ranks: int) -> tuple[ContextShards, float]:
    """The distributed row, and the median of 20 times in milliseconds."""
    times = []
    for _ in range(20):
        started = time.perf_counter()
        shards = shard_layout(layout, num_ranks)
        times.append(time.perf_counter() - started)
    return shards, 1e3 * statistics.median(times)


def dispatch_rows(seed: int) -> list[dict[str, Any]]:
    """The dispatcher's time and evenness for a thousand segments on 64 ranks."""
    rng = np.random.default_rng(seed)

    def groups(count: int, prefix: int, responses: int, longest: int) -> list[Any]:
        return [
            ([0] * prefix, [[0] * int(n) for n in rng.integers(50, longest, responses)])
            for _ in range(count)
        ]

    cases = {
        "one group": groups(1, 60000, 999, 1000),
        "100 groups": groups(100, 2000, 9, 1000),
        "1000 responses without a prompt": groups(1000, 1, 1, 2000),
    }
    rows = []
    for name, case in cases.items():
        layout = pack(PrefixTree.from_groups(case), pad_to_multiple=64)
        shards, milliseconds = time_dispatch(layout, 64)
        rows.append(
            {
                "case": name,
                "segments": len(layout.segments),
                "tokens_per_rank": shards.tokens_per_rank,
                "dispatch_ms": milliseconds,
                "work_above_mean": shards.imbalance,
                "padding": layout.num_padding / layout.num_tokens,
            }
        )
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--cp", type=int, default=2, help="context-parallel ranks")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        help="of communication, as model.transformer.cp_comm_type names them",
    )
    add_common_arguments(parser, layers=2)
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each kind")
    parser.add_argument("--dispatch", action="store_true", help="time the dispatcher alone")
    args = parser.parse_args()
    if args.dispatch:
        rows = dispatch_rows(args.seed)
        for row in rows:
            print(
                f"{row['case']:<32} {row['segments']:>5} segments, {row['tokens_per_rank']:>6} "
                f"tokens per rank: {row['dispatch_ms']:>6.1f} ms, work "
                f"{1 + row['work_above_mean']:.3f} of the mean, padding {row['padding']:.4f}"
            )
        print(json.dumps({"dispatch": rows}))
        return 0
    if args.cp < 2:
        parser.error(f"--cp: {args.cp} must be at least 2")
    cases = args.case or [parse_case(text) for text in DEFAULT_CASES]
    require_megatron(parser)
    print(
        f"{'G':>3} {'prefix':>7} {'response':>8} {'kind':>10} {'seconds':>8} {'forward':>10} "
        f"{'least':>8} {'whole row':>9} {'backward':>11} {'work':>6} {'dispatch':>11}\n"
        f"{'':>3} {'tokens':>7} {'tokens':>8} {'':>10} {'':>8} {'kB':>10} "
        f"{'kB':>8} {'kB':>9} {'kB':>11} {'x mean':>6} {'ms':>11}"
    )
    rows = []
    for shape in cases:
        for row in benchmark(args, shape):
            rows.append(row)
            print(
                f"{row['G']:>3} {row['prefix']:>7} {row['response']:>8} {row['kind']:>10} "
                f"{row['seconds']:>8.2f} {row['forward_bytes'] / 1e3:>10.0f} "
                f"{row['least_forward_bytes'] / 1e3:>8.0f} "
                f"{row['whole_row_forward_bytes'] / 1e3:>9.0f} "
                f"{row['backward_bytes'] / 1e3:>11.0f} {1 + row['work_above_mean']:>6.3f} "
                f"{row['dispatch_ms']:>11.2f}",
                flush=True,
            )
    if args.json:
        print(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

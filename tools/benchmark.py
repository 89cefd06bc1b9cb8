"""Time and memory of grouped against ungrouped training steps, beside the FLOPs limit.

    python tools/benchmark.py --json

Forward and backward of a real Megatron GPTModel on the CPU, float32. Both sides are packed without
padding and run through the same layers, attention kernels and log-probability head; the ungrouped
side repeats the prompt in every sequence. The sides take turns step
by step and the median of the repeats' ratios is reported. Before a
ratio is printed, loss and gradients of both sides must agree. Peak memory is measured in a process
of its own per side: the growth of the resident set over the model that is already built.

The last line of stdout is a JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_prefix.batch import PackedBatch, TrainedSequence, build_batch
from megatron_prefix.layout import PrefixTree, pack
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.training.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_prefix.training.model import ModelChunks, build_model_chunks, model_shape
from megatron_prefix.training.runtime import runtime
from megatron_prefix.training.step import accumulate_gradients

DEFAULT_CASES = ((8, 2048, 256), (8, 256, 2048), (1, 2048, 256))
OBJECTIVE = ObjectiveConfig()


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One row of the benchmark."""

    group_size: int
    prefix: int
    response: int


def model_config(args: argparse.Namespace) -> ModelConfig:
    """The benchmark's model, from the command line's sizes."""
    return ModelConfig(
        vocab_size=args.vocab,
        max_sequence_length=1 << 20,
        activation="silu",
        transformer={
            "num_layers": args.layers,
            "hidden_size": args.hidden,
            "num_attention_heads": args.heads,
            "num_query_groups": args.kv_heads,
            "ffn_hidden_size": args.ffn,
            "gated_linear_unit": True,
        },
    )


TRAINING = TrainingConfig(steps=1, token_budget=1 << 20, dtype="float32", device="cpu")
"""Only what builds the model matters here."""


def trees(shape: Shape, vocab: int, seed: int) -> dict[str, PrefixTree]:
    """The same rollouts with the prompt shared, and with the prompt repeated."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, vocab, shape.prefix)
    responses = [rng.integers(0, vocab, shape.response) for _ in range(shape.group_size)]
    return {
        "grouped": PrefixTree.from_groups([(prompt, responses)]),
        "ungrouped": PrefixTree.concat(
            [PrefixTree.from_sequences([np.concatenate([prompt, r])]) for r in responses]
        ),
    }


def make_batch(
    tree: PrefixTree, shape: Shape, context_parallel_group: dist.ProcessGroup | None = None
) -> PackedBatch:
    """One packed row whose response tokens are trained on, or this rank's part of it."""
    sequences = [
        TrainedSequence(
            first_trained=shape.prefix,
            weight=1.0 / (shape.group_size * shape.response),
            advantage=(-1.0) ** i,
        )
        for i in range(shape.group_size)
    ]
    ranks = 1 if context_parallel_group is None else dist.get_world_size(context_parallel_group)
    return build_batch(
        pack(tree.merge_chains(), pad_to_multiple=ranks),
        sequences,
        device=torch.device("cpu"),
        context_parallel_group=context_parallel_group,
    )


def run_step(chunks: ModelChunks, batch: PackedBatch) -> float:
    """One forward and backward; returns its loss."""
    return float(accumulate_gradients(chunks, [batch], OBJECTIVE)[0].policy_loss)


def check_equal(chunks: ModelChunks, batches: dict[str, PackedBatch]) -> None:
    """Raise unless both sides give the same loss and gradients."""
    gradients, losses = {}, {}
    for side, batch in batches.items():
        losses[side] = run_step(chunks, batch)
        gradients[side] = [p.main_grad.clone() for _, p in chunks.named_parameters()]
    for (name, _), a, b in zip(
        chunks.named_parameters(), gradients["grouped"], gradients["ungrouped"], strict=True
    ):
        error = float((a - b).norm() / b.norm().clamp(min=1e-12))
        if not error < 2e-3:  # float32 sums over thousands of tokens in another order
            raise RuntimeError(f"gradients of {name} differ by {error:.1e}: no ratio is reported")
    if not abs(losses["grouped"] - losses["ungrouped"]) < 1e-4:
        raise RuntimeError(f"losses differ, {losses}: no ratio is reported")


def measure_times(args: argparse.Namespace, shape: Shape) -> tuple[dict[str, list[float]], float]:
    """Seconds of each repeat of each side, interleaved in one process, and the FLOPs ratio."""
    torch.set_num_threads(args.threads)
    model = model_config(args)
    with runtime(ParallelConfig(), device="cpu", seed=args.seed, timeout_minutes=10):
        chunks = build_model_chunks(
            model, ParallelConfig(), TRAINING, use_distributed_optimizer=False
        )
        batches = {
            side: make_batch(tree, shape)
            for side, tree in trees(shape, args.vocab, args.seed).items()
        }
        check_equal(chunks, batches)
        seconds: dict[str, list[float]] = {side: [] for side in batches}
        for _ in range(args.repeats):
            for side, time_of_a_step in time_steps(chunks, batches, args.seconds).items():
                seconds[side].append(time_of_a_step)
        sizes = model_shape(model, chunks.config)
    shared = trees(shape, args.vocab, args.seed)["grouped"]
    return seconds, sizes.ungrouped_flops(shared) / sizes.tree_flops(shared)


def time_steps(
    chunks: ModelChunks, batches: dict[str, PackedBatch], at_least: float
) -> dict[str, float]:
    """Seconds of one step of each side, over steps that take turns for `at_least` seconds each.

    Turns within a repeat, in alternating order, since a machine's speed may drift by more than what
    is measured.
    """
    total = dict.fromkeys(batches, 0.0)
    order, rounds = list(batches), 0
    gc.collect()
    while min(total.values()) < at_least:
        for side in order:
            started = time.perf_counter()
            run_step(chunks, batches[side])
            total[side] += time.perf_counter() - started
        order.reverse()
        rounds += 1
    return {side: seconds / rounds for side, seconds in total.items()}


def measure_peak_mb(args: argparse.Namespace, shape: Shape, side: str) -> float:
    """Growth of the resident set during one step, in MB; call it in a fresh process."""
    torch.set_num_threads(args.threads)
    with runtime(ParallelConfig(), device="cpu", seed=args.seed, timeout_minutes=10):
        chunks = build_model_chunks(
            model_config(args),
            ParallelConfig(),
            TRAINING,
            use_distributed_optimizer=False,
        )
        # A step on a tiny row first, so that what libraries set up once does not count.
        tiny = Shape(group_size=2, prefix=8, response=8)
        run_step(chunks, make_batch(trees(tiny, args.vocab, 0)["grouped"], tiny))
        batch = make_batch(trees(shape, args.vocab, args.seed)[side], shape)
        gc.collect()
        before = resident_mb()
        run_step(chunks, batch)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def resident_mb() -> float:
    """The resident set of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def in_fresh_process(function, *args):
    """Call a function in a new process and return its result."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def benchmark(args: argparse.Namespace, shape: Shape) -> dict[str, float]:
    """One row: time ratio, FLOPs ratio, their quotient, and peak memory."""
    seconds, flops_ratio = in_fresh_process(measure_times, args, shape)
    peaks = {
        side: in_fresh_process(measure_peak_mb, args, shape, side)
        for side in ("grouped", "ungrouped")
    }
    time_ratio = statistics.median(
        u / g for u, g in zip(seconds["ungrouped"], seconds["grouped"], strict=True)
    )
    return {
        "G": shape.group_size,
        "prefix": shape.prefix,
        "response": shape.response,
        "time_ratio": time_ratio,
        "flops_ratio": flops_ratio,
        "share": time_ratio / flops_ratio,
        "peak_mb_grouped": peaks["grouped"],
        "peak_mb_ungrouped": peaks["ungrouped"],
        "seconds_grouped": statistics.median(seconds["grouped"]),
        "seconds_ungrouped": statistics.median(seconds["ungrouped"]),
    }


def parse_case(text: str) -> Shape:
    """G,prefix,response."""
    try:
        group_size, prefix, response = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not G,prefix,response") from None
    return Shape(group_size=group_size, prefix=prefix, response=response)


def add_common_arguments(parser: argparse.ArgumentParser, *, layers: int) -> None:
    """The rollouts' shapes, the model's sizes and the output."""
    parser.add_argument("--case", type=parse_case, action="append", help="G,prefix,response")
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--ffn", type=int, default=688)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the JSON line as well")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser, layers=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each side in a repeat")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    cases = args.case or [Shape(group_size=g, prefix=p, response=r) for g, p, r in DEFAULT_CASES]
    print(
        f"{'G':>3} {'prefix':>7} {'response':>8} {'grouped s':>10} {'ungrouped s':>11} "
        f"{'time x':>7} {'FLOPs x':>8} {'share':>6} {'peak MB':>8} {'ungrouped':>9}"
    )
    rows = []
    for shape in cases:
        row = benchmark(args, shape)
        rows.append(row)
        print(
            f"{row['G']:>3} {row['prefix']:>7} {row['response']:>8} "
            f"{row['seconds_grouped']:>10.2f} {row['seconds_ungrouped']:>11.2f} "
            f"{row['time_ratio']:>7.2f} {row['flops_ratio']:>8.2f} {row['share']:>6.2f} "
            f"{row['peak_mb_grouped']:>8.0f} {row['peak_mb_ungrouped']:>9.0f}",
            flush=True,
        )
    if args.json:
        print(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

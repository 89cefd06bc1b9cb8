"""What the host does between a batch of rollouts and the first forward: seconds, memory, balance.

    python tools/benchmark_host.py                              512 groups x 16, 28 million tokens
    python tools/benchmark_host.py --lengths lognormal --dp 256
    python tools/benchmark_host.py --groups 4096 --ranks 1024   only the plan of a cluster

Two processes run the trainer's own code on a file of rollouts that is made first: rank 0 reads it,
the other one is a rank of a cluster of --dp data-parallel ranks (times tp x pp x cp). The rest of
the cluster is not there, nor is the network between its nodes.

    read        rank 0 reads the file into arrays, and checks every record
    validate    the checks of the whole batch alone; `read` has them too
    summary     every rank gets the lengths and rewards of the batch
    plan        every rank plans all ranks' microbatches
    check       the ranks compare their plans
    distribute  rank 0 makes the shares of all ranks; this rank gets its own
    pack        this rank lays out all rows of its share (a run overlaps all but the first)
    copy        the rows go to the device

`total_s` is everything from `summary` on. Times are medians over the repeats. `rank_mb` is the
largest resident memory of the rank that does not read, above what it had after its imports;
`reader_mb` is all that rank 0 had. MB are 10^6 bytes. The last line of stdout is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from host.rollout_files import VOCAB_SIZE, Lengths, draw_lengths, read_lengths, write_rollouts
from tool_help import HelpFormatter, require_megatron

from megatron_prefix.layout import ModelShape, Packing

MODEL = ModelShape(
    num_layers=28,
    hidden_size=3584,
    ffn_hidden_size=18944,
    num_attention_heads=28,
    num_query_groups=4,
    kv_channels=128,
    vocab_size=VOCAB_SIZE,
    gated_linear_unit=True,
)
"""Sizes of a model of 7 billion parameters, whose FLOPs are balanced."""

PARTS = ("read", "validate", "summary", "plan", "check", "distribute", "pack", "copy")
_BEFORE = ("read", "validate")


def packing_of(args: argparse.Namespace) -> Packing:
    """How a run in this layout packs."""
    return Packing(
        token_budget=args.token_budget,
        data_parallel_size=args.dp,
        model_shape=MODEL,
        pad_to_multiple=args.tp * args.cp,
        microbatch_multiple=args.pp if args.vpp > 1 else 1,
        allow_split=True,
        sharing="groups",
        trim_last_layer=True,
        share_only_where_it_pays=True,
        share_across_microbatches=False,
    )


def plan_alone(lengths: Lengths, packing: Packing, repeats: int) -> dict[str, Any]:
    """The plan of these lengths, as every rank of the cluster makes it."""
    import numpy as np
    from host.parts import balance

    from megatron_prefix.objective import ObjectiveConfig
    from megatron_prefix.rollouts.summary import RolloutSummary
    from megatron_prefix.training.step_plan import plan_rollouts

    groups, responses = lengths.responses.shape
    flat = lengths.responses.ravel().astype(np.int32)
    summary = RolloutSummary(
        prompt_lengths=lengths.prompts.astype(np.int32),
        group_sizes=np.full(groups, responses, dtype=np.int32),
        response_lengths=flat,
        trained_lengths=flat,
        rewards=np.random.default_rng(0).random(len(flat)),
        finished=np.ones(len(flat), dtype=np.int8),
        repeated=np.zeros(len(flat), dtype=np.bool_),
        largest_advantages=None,
        sources=tuple(f"group {index}" for index in range(groups)),
        has_old_logprobs=True,
        has_loss_mask=False,
    )
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        plan = plan_rollouts(summary, ObjectiveConfig(), packing)
        plan.fingerprint()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    return {
        "seconds": {"plan": median},
        "total_s": median,
        "plan_s": median,
        "rank_mb": None,
        "reader_mb": None,
        **balance(plan, packing),
    }


def run_parts(
    args: argparse.Namespace, lengths: Lengths, packing: Packing, folder: Path
) -> dict[str, Any]:
    """All parts, on a file of these lengths."""
    from host.parts import Work, measure
    from ranks import fresh_processes, run_ranks

    path = args.input
    if path is None:
        path = folder / f"rollouts.{args.format}"
        writer = fresh_processes().Process(
            target=write_rollouts, args=(path, lengths), kwargs={"seed": args.seed}
        )
        writer.start()
        writer.join()
        if writer.exitcode:
            raise RuntimeError(f"writing {path} ended with exit code {writer.exitcode}")
    work = Work(
        path=path,
        groups=len(lengths.prompts),
        vocab_size=VOCAB_SIZE,
        packing=packing,
        context_parallel_size=args.cp,
        rank=args.dp // 2,
        device=args.device,
        repeats=args.repeats,
    )
    run_ranks(measure, 2, work, folder)
    reader, rank = (
        json.loads((folder / f"rank_{r}.json").read_text(encoding="utf-8")) for r in range(2)
    )
    seconds = {**rank["seconds"], **{part: reader["seconds"][part] for part in _BEFORE}}
    return {
        "seconds": {part: seconds[part] for part in PARTS},
        "total_s": sum(seconds[part] for part in PARTS if part not in _BEFORE),
        "plan_s": seconds["plan"],
        "rank_mb": rank["mb_above_imports"],
        "reader_mb": reader["mb"],
        **{name: rank[name] for name in rank if name not in ("seconds", "mb", "mb_above_imports")},
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--groups", type=int, default=512, help="prompts of the batch")
    parser.add_argument("--responses", type=int, default=16, help="to each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of a prompt, on average")
    parser.add_argument(
        "--response-tokens", type=int, default=3400, help="of a response, on average"
    )
    parser.add_argument(
        "--lengths",
        default="fixed",
        help='fixed, lognormal, or a JSON file: [{"prefix": 512, "responses": [900, 1200]}]',
    )
    parser.add_argument("--format", choices=["parquet", "jsonl"], default="parquet")
    parser.add_argument("--input", type=Path, help="a file of rollouts of these lengths to read")
    parser.add_argument(
        "--tp", type=int, default=1, help="tensor parallel (with sequence parallel)"
    )
    parser.add_argument("--pp", type=int, default=1, help="pipeline parallel")
    parser.add_argument("--vpp", type=int, default=1, help="model chunks per pipeline rank")
    parser.add_argument("--cp", type=int, default=1, help="context parallel")
    parser.add_argument("--dp", type=int, default=64, help="data parallel")
    parser.add_argument(
        "--ranks", type=int, help="only plan, for a cluster of so many ranks instead of --dp"
    )
    parser.add_argument("--token-budget", type=int, default=131_072, help="of a microbatch")
    parser.add_argument("--device", default="cpu", help="that rows are copied to")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of lengths and tokens")
    args = parser.parse_args()
    try:
        lengths, packing = prepare(args)
        require_megatron(parser)
        if args.ranks is not None:
            result = plan_alone(lengths, packing, args.repeats)
        else:
            with tempfile.TemporaryDirectory(prefix="rollouts_") as folder:
                result = run_parts(args, lengths, packing, Path(folder))
    except (ValueError, OSError) as error:
        print(f"benchmark_host: {error}", file=sys.stderr)
        return 2
    result |= {
        "groups": len(lengths.prompts),
        "responses": lengths.responses.shape[1],
        "tokens": lengths.tokens,
        "data_parallel_size": packing.data_parallel_size,
        "token_budget": packing.token_budget,
        "python": platform.python_version(),
    }
    report(result)
    print(json.dumps(result))
    return 0


def prepare(args: argparse.Namespace) -> tuple[Lengths, Packing]:
    """The lengths and the packing that the arguments ask for.

    Raises:
        ValueError: an argument, naming it.
    """
    names = ("groups", "responses", "prompt_tokens", "response_tokens", "tp", "pp", "vpp", "cp")
    for name in (*names, "dp", "token_budget", "repeats"):
        if getattr(args, name) < 1:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} {getattr(args, name)}: must be at least 1")
    if args.ranks is not None:
        replica = math.prod((args.tp, args.pp, args.cp))
        if args.ranks < replica or args.ranks % replica:
            raise ValueError(
                f"--ranks {args.ranks}: must be a multiple of --tp x --pp x --cp = {replica}"
            )
        args.dp = args.ranks // replica
    if args.lengths in ("fixed", "lognormal"):
        lengths = draw_lengths(
            args.lengths,
            groups=args.groups,
            responses=args.responses,
            prompt=args.prompt_tokens,
            response=args.response_tokens,
            seed=args.seed,
        )
    else:
        lengths = read_lengths(Path(args.lengths))
    return lengths, packing_of(args)


def report(result: dict[str, Any]) -> None:
    """The figures as a table."""
    print(
        f"{result['groups']} groups x {result['responses']} responses, "
        f"{result['tokens']:,} tokens, {result['data_parallel_size']} data-parallel ranks of "
        f"{result['num_microbatches']} microbatches of {result['token_budget']:,} tokens at most"
    )
    for part, seconds in result["seconds"].items():
        print(f"  {part:<12} {seconds:8.3f} s")
    print(f"  {'total':<12} {result['total_s']:8.3f} s  (without read and validate)")
    if result["rank_mb"] is not None:
        print(
            f"memory: a rank {result['rank_mb']:,.0f} MB above its imports, the reader "
            f"{result['reader_mb']:,.0f} MB in all"
        )
    print(
        f"FLOPs, largest over mean: {result['flops_max_over_mean']:.4f} over ranks, "
        f"{result['microbatch_flops_max_over_mean']:.4f} over microbatches; rows are "
        f"{result['fill']:.1%} full; {result['prefixes_run_again']} prefixes run once more"
    )


if __name__ == "__main__":
    sys.exit(main())

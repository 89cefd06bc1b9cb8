"""Steps over batches in which some groups have equal rewards: all computed, or those left out.

    python tools/benchmark_skipping.py --json
    python tools/benchmark_skipping.py --case 4,64,32 --groups 8 --equal 2 6

`keep` and `skip` are values of `objective.zero_advantages`. Both plan, pack and run forward, loss
and backward of a real Megatron GPTModel by the trainer's own code, in one process with one thread,
and take turns step by step. Before that, their loss and gradients must agree. A microbatch has room
for one group, so that the groups that teach something run in the same rows on both sides. Seconds
are the process's own CPU time.

With --json the last line of stdout is a JSON object, with a row for each number of groups of equal
rewards: `time_ratio` is the median of the repeats' ratios of `keep` to `skip`, `flops_ratio` the
same of the FLOPs that the planner counts, `share` the one over the other, `gradient_error` the
largest relative difference.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

# What imports torch and Megatron is imported where it is used: help and wrong arguments need none.
from benchmark import add_common_arguments, environment, model_sizes
from benchmarks.names import TOLERANCES
from benchmarks.shapes import ModelSizes, Shape, parse_case, rollouts, training_config
from tool_help import HelpFormatter, require_megatron

from megatron_prefix.objective.config import ObjectiveConfig

DEFAULT_CASE = "8,256,64"
SIDES = ("keep", "skip")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured."""

    shape: Shape
    """Of every group."""
    groups: int
    equal: int
    """Groups of equal rewards."""
    sizes: ModelSizes
    dtype: str
    seed: int


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Seconds of each repeat of both sides, what they ran, and how far their results differ."""
    from benchmarks.measuring import check_equal, interleaved_seconds
    from benchmarks.minibatches import Side, build_steps

    from megatron_prefix.rollouts.records import RolloutGroup

    groups = []
    for index in range(case.groups):
        prompt, responses = rollouts(case.shape, case.sizes.vocab, case.seed + index)
        group = RolloutGroup(
            prompt=prompt,
            responses=responses,
            rewards=[float(index >= case.equal and i % 2) for i in range(len(responses))],
            source=f"group {index}",
        )
        groups.append(group)
    training = dataclasses.replace(
        training_config(dtype=case.dtype),
        token_budget=case.shape.prefix + sum(case.shape.responses),
    )
    sides = {
        name: Side(training=training, objective=ObjectiveConfig(zero_advantages=name))
        for name in SIDES
    }
    with build_steps(sides, groups, sizes=case.sizes, seed=case.seed) as steps:
        runners = {name: runner for name, (runner, _) in steps.items()}
        error = check_equal(runners, tolerance=TOLERANCES[case.dtype])
        return {
            "gradient_error": error,
            "seconds": interleaved_seconds(
                runners, repeats=repeats, seconds=0.0, clock=time.process_time
            ),
            "tokens": {name: minibatch.packed_tokens for name, (_, minibatch) in steps.items()},
            "flops": {name: minibatch.flops for name, (_, minibatch) in steps.items()},
        }


def row(case: Case, repeats: int) -> dict[str, Any]:
    """The report of a case."""
    from benchmarks.measuring import in_fresh_process, ratios

    found = in_fresh_process(measure, case, repeats)
    ratio = ratios(found["seconds"], *SIDES)
    flops = found["flops"]["keep"] / found["flops"]["skip"]
    return {
        "groups": case.groups,
        "equal": case.equal,
        "time_ratio": ratio["median"],
        "time_ratio_least": ratio["least"],
        "time_ratio_most": ratio["most"],
        "flops_ratio": flops,
        "share": ratio["median"] / flops,
        "gradient_error": found["gradient_error"],
        "tokens": found["tokens"],
        "seconds": found["seconds"],
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_common_arguments(parser, layers=4)
    parser.add_argument("--groups", type=int, default=16, help="of a batch")
    parser.add_argument(
        "--equal",
        type=int,
        nargs="+",
        default=[4, 8, 12],
        help="how many of them have equal rewards; a measurement for each number",
    )
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32", help="of the weights")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each side")
    args = parser.parse_args()
    shape, *others = args.case or [parse_case(DEFAULT_CASE)]
    if others:
        parser.error("--case: give one case")
    for equal in args.equal:
        if not 0 <= equal < args.groups:
            parser.error(f"--equal: {equal} must be from 0 to {args.groups - 1}, below --groups")
    require_megatron(parser)
    rows = []
    for equal in args.equal:
        case = Case(
            shape=shape,
            groups=args.groups,
            equal=equal,
            sizes=model_sizes(args),
            dtype=args.dtype,
            seed=args.seed,
        )
        rows.append(row(case, args.repeats))
        found = rows[-1]
        print(
            f"{equal} of {args.groups} groups of equal rewards: time {found['time_ratio']:.2f} x "
            f"({found['time_ratio_least']:.2f} to {found['time_ratio_most']:.2f}), FLOPs "
            f"{found['flops_ratio']:.2f} x, share {found['share']:.2f}; gradients differ by "
            f"{found['gradient_error']:.1e}",
            flush=True,
        )
    if args.json:
        print(json.dumps({"rows": rows, "environment": environment("cpu")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

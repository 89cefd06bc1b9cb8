"""A group over the token budget whose rows share its prompt, beside rows that each run it again.

    python tools/benchmark_series.py --json
    python tools/benchmark_series.py --case 16,300,40 --token-budget 500 --dtype float64

`series` is a run with `training.share_across_microbatches`: the prompt runs once, and the rows with
responses attend to the keys and values that are kept of it. `pieces` is a run without it: every
microbatch runs the prompt. Both plan, pack and run forward, loss and backward of a real Megatron
GPTModel by the trainer's own code, on one data-parallel rank.

Both run in one process with one thread and take turns step by step; before that, their loss and
gradients must agree. Seconds are the process's own CPU time, which other load on the machine
disturbs less than the time of day. Peak memory of each is measured in a process of its own, beyond
the model that is already built.

With --json the last line of stdout is a JSON object: `time_ratio` is the median of the
repeats' ratios of `pieces` to `series`, `flops_ratio` the same of the FLOPs that the planner
counts, `share` the one over the other, `gradient_error` the largest relative difference.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

# What imports torch and Megatron is imported where it is used: help and wrong arguments need none.
from benchmark import add_common_arguments, environment, model_sizes
from benchmarks.names import TOLERANCES
from benchmarks.shapes import ModelSizes, Shape, parse_case, rollouts, training_config
from tool_help import HelpFormatter, require_megatron

from megatron_prefix.config import TrainingConfig

if TYPE_CHECKING:
    from megatron_prefix.training.minibatch import Minibatch

DEFAULT_CASE = "64,4096,512"
SIDES = ("series", "pieces")
# Attention to a long prompt costs the same on both sides. In a small model it would be most of the
# work, which it is not in one of 7B; a narrow model with a wide MLP comes nearer to that. With few
# layers, the trimmed last one would count for too much.
SIZES = {"hidden": 128, "heads": 2, "kv_heads": 1, "ffn": 4096}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured."""

    shape: Shape
    sizes: ModelSizes
    token_budget: int
    dtype: str
    recompute: str
    seed: int

    def training(self, side: str) -> TrainingConfig:
        """The run of a side."""
        return dataclasses.replace(
            training_config(dtype=self.dtype, recompute=self.recompute),
            token_budget=self.token_budget,
            share_across_microbatches=side == "series",
        )


def build_sides(case: Case, names: Sequence[str]) -> AbstractContextManager[dict[str, Any]]:
    """For each side its step and its minibatch; all have the same model and rollouts."""
    from benchmarks.minibatches import Side, build_steps

    from megatron_prefix.rollouts.records import RolloutGroup

    prompt, responses = rollouts(case.shape, case.sizes.vocab, case.seed)
    group = RolloutGroup(
        prompt=prompt,
        responses=responses,
        rewards=[float(i % 2) for i in range(len(responses))],
        source="benchmark",
    )
    sides = {name: Side(training=case.training(name)) for name in names}
    return build_steps(sides, [group], sizes=case.sizes, seed=case.seed)


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Seconds of each repeat of both sides, what they ran, and how far their results differ.

    Raises:
        ValueError: the case has no series, or a response over the budget.
    """
    from benchmarks.measuring import check_equal, interleaved_seconds

    with build_sides(case, SIDES) as sides:
        minibatches: dict[str, Minibatch] = {side: found[1] for side, found in sides.items()}
        (microbatches,) = minibatches["series"].step.microbatches.microbatches
        if not any(part.parts for slices in microbatches for part in slices):
            raise ValueError(
                f"--case {case.shape} --token-budget {case.token_budget}: nothing to share across "
                "microbatches; lower the budget or lengthen the prompt"
            )
        runners = {side: found[0] for side, found in sides.items()}
        error = check_equal(runners, tolerance=TOLERANCES[case.dtype])
        return {
            "gradient_error": error,
            "seconds": interleaved_seconds(
                runners, repeats=repeats, seconds=0.0, clock=time.process_time
            ),
            "tokens": {side: m.packed_tokens for side, m in minibatches.items()},
            "flops": {side: m.flops for side, m in minibatches.items()},
            "rows": {side: len(m.rows) for side, m in minibatches.items()},
        }


def measure_peak_mb(case: Case, side: str) -> float:
    """Peak memory of one step, in a fresh process."""
    from benchmarks.measuring import peak_growth_mb

    # A tiny step first, so that what libraries set up once does not count.
    tiny = dataclasses.replace(case, shape=Shape(prefix=8, responses=(8, 8)), token_budget=16)
    for of_case in (tiny, case):
        with build_sides(of_case, [side]) as sides:
            peak = peak_growth_mb(sides[side][0].step)
    return peak


def benchmark(args: argparse.Namespace, case: Case) -> dict[str, Any]:
    """The report that --json prints."""
    from benchmarks.measuring import in_fresh_process, ratios

    found = in_fresh_process(measure, case, args.repeats)
    ratio = ratios(found["seconds"], "pieces", "series")
    flops = found["flops"]["pieces"] / found["flops"]["series"]
    return {
        "time_ratio": ratio["median"],
        "time_ratio_least": ratio["least"],
        "time_ratio_most": ratio["most"],
        "flops_ratio": flops,
        "share": ratio["median"] / flops,
        "gradient_error": found["gradient_error"],
        "G": case.shape.group_size,
        "prefix": case.shape.prefix,
        "response": case.shape.response,
        "token_budget": case.token_budget,
        "sides": {
            side: {
                "seconds": statistics.median(found["seconds"][side]),
                "all_seconds": found["seconds"][side],
                "tokens": found["tokens"][side],
                "forward_flops": found["flops"][side],
                "rows_with_responses": found["rows"][side],
                "peak_mb": in_fresh_process(measure_peak_mb, case, side) if args.memory else None,
            }
            for side in SIDES
        },
        "environment": environment("cpu"),
    }


def table(report: dict[str, Any]) -> list[str]:
    """The same for people."""
    lines = [f"{'':<8}{'seconds':>9}{'tokens':>9}{'GFLOPs':>9}{'rows':>6}{'peak MB':>9}"]
    for name, side in report["sides"].items():
        peak = "-" if side["peak_mb"] is None else f"{side['peak_mb']:.0f}"
        lines.append(
            f"{name:<8}{side['seconds']:>9.3f}{side['tokens']:>9}"
            f"{side['forward_flops'] / 1e9:>9.1f}{side['rows_with_responses']:>6}{peak:>9}"
        )
    return [
        *lines,
        f"time {report['time_ratio']:.2f} x ({report['time_ratio_least']:.2f} to "
        f"{report['time_ratio_most']:.2f}), FLOPs {report['flops_ratio']:.2f} x, share "
        f"{report['share']:.2f}; gradients differ by {report['gradient_error']:.1e}",
    ]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_common_arguments(parser, layers=8)
    parser.set_defaults(**SIZES)
    parser.add_argument("--token-budget", type=int, default=8192, help="tokens of a row at most")
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32", help="of the weights")
    parser.add_argument(
        "--recompute",
        choices=["none", "selective", "full"],
        default="none",
        help="activations computed again in backward",
    )
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each side")
    parser.add_argument(
        "--no-memory", dest="memory", action="store_false", help="do not measure peak memory"
    )
    args = parser.parse_args()
    shape, *others = args.case or [parse_case(DEFAULT_CASE)]
    if others:
        parser.error("--case: give one case")
    require_megatron(parser)
    case = Case(
        shape=shape,
        sizes=model_sizes(args),
        token_budget=args.token_budget,
        dtype=args.dtype,
        recompute=args.recompute,
        seed=args.seed,
    )
    try:
        report = benchmark(args, case)
    except ValueError as error:
        print(f"benchmark_series: {error}", file=sys.stderr)
        return 2
    print(*table(report), sep="\n")
    if args.json:
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

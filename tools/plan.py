"""Predict a training step from shapes: tokens, FLOPs, memory of a rank, time beside ungrouped.

    python tools/plan.py --model examples/configs/qwen2.5-7b.yaml --case 8,16384,512 --tp 4 --pp 2

--model is a run's YAML file, or one with its `model` section only; options given here replace the
file's. Groups are given as --case G,prefix,response, or --shapes with a YAML list of
{prefix: int, responses: [int, ...]}. Microbatches and places on context-parallel ranks are those
that a run would choose. Nothing is measured: FLOPs and bytes are counted, and the time ratio is the
FLOPs ratio unless rates are given (--tflops, --gb-per-second). With --json the last line of stdout
is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from tool_help import HelpFormatter, require_megatron

from megatron_prefix.config.loader import ConfigError
from megatron_prefix.planning.report import layout_line, report, table
from megatron_prefix.planning.shapes import (
    longest_sequence,
    parse_case,
    prompt_tokens,
    read_shapes,
)

# It imports Megatron, which help and wrong arguments do not wait for.
if TYPE_CHECKING:
    from megatron_prefix.planning.run import PlannedRun

PICTURE_RATIOS = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)
PICTURE_GROUPS = (2, 4, 8, 16)


def _case(text: str) -> dict[str, Any]:
    try:
        return parse_case(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="YAML with a model section")
    parser.add_argument("--shapes", type=Path, help="YAML: [{prefix: int, responses: [int]}]")
    parser.add_argument(
        "--case",
        type=_case,
        action="append",
        metavar="G,PREFIX,RESPONSE",
        help="responses of a group, tokens of the prompt and of a response; may be repeated",
    )
    parser.add_argument("--groups", type=int, default=1, help="of each shape in a step")
    for name, what in (
        ("tp", "tensor_model_parallel_size"),
        ("pp", "pipeline_model_parallel_size"),
        ("vpp", "virtual_pipeline_model_parallel_size"),
        ("cp", "context_parallel_size"),
        ("ep", "expert_model_parallel_size"),
        ("etp", "expert_tensor_parallel_size"),
    ):
        parser.add_argument(f"--{name}", type=int, help=f"{what}; left out: the file's")
    parser.add_argument("--dp", type=int, default=1, help="data-parallel ranks")
    for name, choices in (
        ("recompute", ["none", "selective", "full"]),
        ("dtype", ["bfloat16", "float32", "float64"]),
        ("sharing", ["groups", "everything"]),
    ):
        parser.add_argument(
            f"--{name}", choices=choices, help=f"training.{name}; left out: the file's"
        )
    parser.add_argument(
        "--token-budget",
        type=int,
        help="tokens of a microbatch; left out: the file's, or 32768, or the longest sequence",
    )
    parser.add_argument(
        "--share-across-microbatches",
        action="store_true",
        default=None,
        help="training.share_across_microbatches: true; left out: the file's",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], help="cpu: Megatron's local layers")
    parser.add_argument("--tflops", type=float, help="measured TFLOP/s of a rank's matrix products")
    parser.add_argument(
        "--gb-per-second", type=float, help="measured GB/s between context-parallel ranks"
    )
    parser.add_argument("--json", action="store_true", help="print the JSON line as well")
    parser.add_argument("--png", type=Path, help="draw ratios against prefix / response")
    args = parser.parse_args()
    if (args.case is None) == (args.shapes is None):
        parser.error("give either --case or --shapes")
    for name in ("groups", "dp"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: {getattr(args, name)} must be at least 1")
    for name in ("tflops", "gb_per_second"):
        rate = getattr(args, name)
        if rate is not None and not rate > 0:
            parser.error(f"--{name.replace('_', '-')}: {rate} must be above 0")
    if args.gb_per_second is not None and args.tflops is None:
        parser.error("--gb-per-second needs --tflops beside it")
    return args, parser


def planned_run(args: argparse.Namespace, shapes: list[dict[str, Any]]) -> PlannedRun:
    """The run of the file with the command line's options."""
    from megatron_prefix.planning.run import load_planned_run, read_sections

    sections = read_sections(args.model)
    parallel = {
        "tensor_model_parallel_size": args.tp,
        "pipeline_model_parallel_size": args.pp,
        "virtual_pipeline_model_parallel_size": args.vpp,
        "context_parallel_size": args.cp,
        "expert_model_parallel_size": args.ep,
        "expert_tensor_parallel_size": args.etp,
    }
    training = {
        "recompute": args.recompute,
        "dtype": args.dtype,
        "device": args.device,
        "sharing": args.sharing,
        "token_budget": args.token_budget,
        "share_across_microbatches": args.share_across_microbatches,
    }
    if args.dtype == "float64" and args.device is None:
        training["device"] = "cpu"
    given = {key: value for key, value in training.items() if value is not None}
    if "token_budget" not in {**sections.get("training", {}), **given}:
        longest = max(map(longest_sequence, shapes))
        # A multiple of any number of ranks that is in use, and then some.
        given["token_budget"] = max(32768, -(-longest // 1024) * 1024)
    return load_planned_run(
        sections,
        parallel={key: value for key, value in parallel.items() if value is not None},
        training=given,
        data_parallel_size=args.dp,
    )


def draw(args: argparse.Namespace, prefix: int, path: Path) -> None:
    """FLOPs and memory ratios against prefix / response, at a fixed prefix, as a PNG."""
    import matplotlib

    from megatron_prefix.planning.run import plan_run

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharex=True)
    for group_size in PICTURE_GROUPS:
        flops, memory = [], []
        for ratio in PICTURE_RATIOS:
            response = max(1, round(prefix / ratio))
            shapes = [{"prefix": prefix, "responses": [response] * group_size}]
            args.token_budget = group_size * (prefix + response + 64)
            plan = plan_run(planned_run(args, shapes), shapes)
            flops.append(plan.flops_ratio)
            kept = [
                side.worst.total - side.worst.static.total
                for side in (plan.ungrouped, plan.grouped)
            ]
            memory.append(kept[0] / kept[1])
        for axis, values in zip(axes, (flops, memory), strict=True):
            axis.plot(PICTURE_RATIOS, values, marker="o", markersize=3, label=f"G = {group_size}")
    for axis, title in zip(
        axes, ("FLOPs of a step", "activations in memory, one microbatch"), strict=True
    ):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(PICTURE_RATIOS, [f"{r:g}" for r in PICTURE_RATIOS])
        axis.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axis.set_ylim(0.93, 17.5)
        axis.set_xlabel(f"prefix / response, prefix {prefix}")
        axis.set_title(f"{title}: ungrouped / grouped")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> int:
    """Command line."""
    args, parser = parse_arguments()
    require_megatron(parser)
    from megatron_prefix.planning.run import plan_run

    try:
        shapes = args.case if args.shapes is None else read_shapes(args.shapes)
        shapes = list(shapes) * args.groups
        run = planned_run(args, shapes)
        result = report(
            plan_run(run, shapes),
            flops_per_second=args.tflops and args.tflops * 1e12,
            bytes_per_second=args.gb_per_second and args.gb_per_second * 1e9,
        )
        print(layout_line(run), *table(result), sep="\n")
        if args.png is not None:
            draw(args, max(map(prompt_tokens, shapes)), args.png)
            print(args.png)
    except ConfigError as error:
        print(f"plan: {args.model}: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

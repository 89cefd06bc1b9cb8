"""Grouped against ungrouped and other ways to share a prompt: time, memory, and the FLOPs limit.

    python tools/benchmark.py --json                                     a whole training step
    python tools/benchmark.py --level attention --sides grouped ungrouped dense_mask flex kv_copy
    python tools/benchmark.py --sides grouped ungrouped prefix_grouper --case 8,2048,32-512

Levels: attention alone, one decoder layer, or forward and backward of a real Megatron GPTModel.
Sides (see tools/benchmarks/): `grouped` is this package, `ungrouped` the same code on sequences
that repeat the prompt, both packed without padding, and `ungrouped_rows` the same sequences in
microbatches of at most as many tokens as the grouped row has (whole step only); `dense_mask`,
`flex` and `kv_copy` are other mechanisms on the same row; `prefix_grouper` and
`prefix_grouper_mask` are that package on a Hugging Face Qwen2 with the same weights, with two
attention functions (whole step only).

All sides run in one process and take turns step by step; the medians of the repeats' ratios to
`grouped` are printed with the least and the most, beside the ratio of FLOPs. Before that, outputs
and gradients of all sides must agree. Peak memory is measured in a process of its own per side,
beyond the model that is already built.

With --json the last line of stdout is a JSON object, which also says what the figures were measured
on. Columns: `time x` is the median time over that of `grouped`, with the least and the most of the
repeats; `FLOPs x` the same of counted FLOPs, the limit of `time x` where matrix products bound it;
`share` is `time x` over `FLOPs x`, 1.0 where the whole limit is reached.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

# What imports torch and Megatron is imported where it is used: help and wrong arguments need none.
from benchmarks.names import LEVELS, MECHANISMS, PEERS, ROWS, TOLERANCES
from benchmarks.report import HEADER, line, plot
from benchmarks.shapes import ModelSizes, Shape, parse_case, training_config, trees
from tool_help import HelpFormatter, require_megatron

from megatron_prefix.config import ParallelConfig
from megatron_prefix.layout import trained_labels
from megatron_prefix.layout.pairs import attention_pairs
from megatron_prefix.layout.tree_cost import tree_flops, ungrouped_flops

if TYPE_CHECKING:
    from benchmarks.levels import Case

DEFAULT_CASES = ("8,2048,256", "8,256,2048", "1,2048,256")
GRID = tuple(
    f"{g},{prefix},{response}"
    for g in (4, 8, 16)
    for prefix in (1024, 4096)
    for response in (128, 512)
)
SMALL = ("1,1024,512", "1,64,256", "4,64,256", "8,16,256", "16,64,512")
CLOCKS = {"wall": "perf_counter", "cpu": "process_time"}
CASES = {"default": DEFAULT_CASES, "grid": GRID, "small": SMALL}


def flops_ratio(case: Case, side: str) -> float | None:
    """FLOPs of a side over those of the grouped one; None where the side computes masked pairs."""
    if side not in ("grouped", "ungrouped", ROWS):
        return None
    if side == "grouped":
        return 1.0
    both = trees(case.shape, 2, 0)
    grouped = both["grouped"].merge_chains()
    if case.level == "attention":
        pairs = {name: int(attention_pairs(tree).sum()) for name, tree in both.items()}
        return pairs["ungrouped"] / pairs["grouped"]
    from megatron_prefix.model.build import model_shape
    from megatron_prefix.model.transformer_config import transformer_config

    config = case.sizes.config()
    shape = model_shape(config, transformer_config(config, ParallelConfig(), training_config()))
    if case.level == "layer":
        of_layer = {
            name: tree.grouped_tokens * shape.linear_flops_per_token()
            + int(attention_pairs(tree).sum()) * shape.attention_flops_per_pair()
            for name, tree in both.items()
        }
        return of_layer["ungrouped"] / of_layer["grouped"]
    labels = trained_labels(grouped, [case.shape.prefix] * case.shape.group_size)
    options: dict[str, Any] = {
        "labels": labels,
        "trim_last_layer": training_config().trim_last_layer,
    }
    return ungrouped_flops(shape, grouped, **options) / tree_flops(shape, grouped, **options)


def measure_times(
    case: Case, sides: list[str], repeats: int, seconds: float, clock: str
) -> dict[str, list[float]]:
    """Seconds of each repeat of each side, interleaved in one process."""
    from benchmarks.levels import build_runners
    from benchmarks.measuring import check_equal, interleaved_seconds

    with build_runners(case, sides) as runners:
        check_equal(runners, tolerance=TOLERANCES[case.dtype])
        return interleaved_seconds(
            runners, repeats=repeats, seconds=seconds, clock=getattr(time, CLOCKS[clock])
        )


def measure_peak_mb(case: Case, side: str) -> float:
    """Peak memory of one step, in a fresh process."""
    from benchmarks.levels import build_runners
    from benchmarks.measuring import peak_growth_mb

    # A tiny step first, so that what libraries set up once does not count.
    tiny = Shape(prefix=8, responses=(8, 8))
    with build_runners(dataclasses.replace(case, shape=tiny), [side]) as runners:
        runners[side].step()
    with build_runners(case, [side]) as runners:
        return peak_growth_mb(runners[side].step)


def benchmark(args: argparse.Namespace, case: Case) -> list[dict[str, Any]]:
    """A row for each side."""
    from benchmarks.measuring import in_fresh_process, ratios

    seconds = in_fresh_process(
        measure_times, case, args.sides, args.repeats, args.seconds, args.clock
    )
    rows = []
    for side in args.sides:
        times = ratios(seconds, side, "grouped")
        flops = flops_ratio(case, side)
        rows.append(
            {
                "level": case.level,
                "G": case.shape.group_size,
                "prefix": case.shape.prefix,
                "response": case.shape.response,
                "side": side,
                "seconds": statistics.median(seconds[side]),
                "all_seconds": seconds[side],
                "time_ratio": times["median"],
                "time_ratio_least": times["least"],
                "time_ratio_most": times["most"],
                "flops_ratio": flops,
                "share": None if flops is None else times["median"] / flops,
                "peak_mb": (in_fresh_process(measure_peak_mb, case, side) if args.memory else None),
            }
        )
    return rows


def add_common_arguments(parser: argparse.ArgumentParser, *, layers: int) -> None:
    """The rollouts' shapes, the model's sizes and the output."""
    parser.add_argument(
        "--case",
        type=parse_case,
        action="append",
        metavar="G,PREFIX,RESPONSE",
        help="responses of a group, tokens of the prompt and of a response; may be repeated",
    )
    for name, default, what in (
        ("layers", layers, "decoder layers"),
        ("hidden", 256, "hidden size"),
        ("heads", 8, "attention heads"),
        ("kv-heads", 4, "heads of keys and values"),
        ("ffn", 688, "hidden size of the MLP"),
        ("vocab", 512, "tokens of the vocabulary"),
        ("seed", 0, "of weights and tokens"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=what)
    parser.add_argument("--json", action="store_true", help="print the JSON line as well")


def model_sizes(
    args: argparse.Namespace, *, qkv_bias: bool = False, attends_every: int | None = None
) -> ModelSizes:
    """From the common arguments."""
    return ModelSizes(
        layers=args.layers,
        hidden=args.hidden,
        heads=args.heads,
        kv_heads=args.kv_heads,
        ffn=args.ffn,
        vocab=args.vocab,
        qkv_bias=qkv_bias,
        attends_every=attends_every,
    )


def environment(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    import megatron.core
    import torch

    name = platform.processor() or platform.machine()
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        for text in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if text.startswith("model name"):
                name = text.split(":", 1)[1].strip()
                break
    return {
        "device": name,
        "torch": torch.__version__,
        "megatron-core": megatron.core.__version__,
        "python": platform.python_version(),
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_common_arguments(parser, layers=4)
    parser.add_argument("--cases", choices=CASES, default="default", help="instead of --case")
    parser.add_argument("--level", choices=LEVELS, default="step", help="what is run")
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=[*MECHANISMS, ROWS, *PEERS],
        default=["grouped", "ungrouped"],
        help="what is compared; grouped must be one of them",
    )
    parser.add_argument(
        "--attends-every",
        type=int,
        metavar="N",
        help="one in N layers attends, and the others are gated delta nets (grouped, ungrouped "
        "and ungrouped_rows at --level step)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where it runs")
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32", help="of the weights")
    parser.add_argument("--kernel", help="attention kernel by name, of grouped and ungrouped")
    parser.add_argument(
        "--recompute",
        choices=["none", "selective", "full"],
        default="none",
        help="activations computed again in backward",
    )
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each side")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each side in a repeat")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: seconds of CPU time, which other work on the machine moves less",
    )
    parser.add_argument("--threads", type=int, help="of torch; left out: torch's own number")
    parser.add_argument(
        "--no-memory", dest="memory", action="store_false", help="do not measure peak memory"
    )
    parser.add_argument("--png", type=Path, help="write a picture here")
    args = parser.parse_args()
    if "grouped" not in args.sides:
        parser.error("--sides: grouped must be one of them, since ratios are to it")
    peers = [side for side in args.sides if side in PEERS]
    steps = [side for side in args.sides if side in (ROWS, *PEERS)]
    if steps and args.level != "step":
        parser.error(f"--sides {steps[0]}: only at --level step, not {args.level}")
    others = [side for side in args.sides if side not in ("grouped", "ungrouped", ROWS)]
    if args.attends_every is not None and (others or args.level != "step"):
        parser.error(
            f"--attends-every {args.attends_every}: only --sides grouped, ungrouped and {ROWS} at "
            f"--level step, not {' '.join([args.level, *others])}"
        )
    if "flex" in args.sides and args.device == "cpu":
        parser.error("--sides flex: FlexAttention has no backward on the CPU; needs --device cuda")
    require_megatron(parser)
    import torch
    from benchmarks.levels import Case

    shapes = args.case or [parse_case(text) for text in CASES[args.cases]]
    print(HEADER)
    rows = []
    for shape in shapes:
        case = Case(
            level=args.level,
            shape=shape,
            sizes=model_sizes(args, qkv_bias=bool(peers), attends_every=args.attends_every),
            device=args.device,
            dtype=args.dtype,
            kernel=args.kernel,
            recompute=args.recompute,
            threads=args.threads or torch.get_num_threads(),
            seed=args.seed,
        )
        for row in benchmark(args, case):
            rows.append(row)
            print(line(row), flush=True)
    if args.png:
        plot(rows, args.png)
    if args.json:
        print(json.dumps({"environment": environment(args.device), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

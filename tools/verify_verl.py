"""Prove that verl's Megatron engine computes with shared prompts what it computes by itself.

    python tools/verify_verl.py --dp 2 --shapes shapes.yaml --optimizer-steps 3

Both sides are the released verl's own engine, in processes of their own, from the same weights on
the same batch: `infer_batch`, then optimizer steps by `train_batch` with verl's `ppo_loss` (policy,
KL and entropy terms) and verl's optimizer. One side has
`external_lib=megatron_prefix.integrations.verl`, the other has not. Log-probabilities and entropies
at every response position, losses, gradient norms and the parameters after the steps are compared
in float32; the exit status is 0 only if all are within tolerance.

The last line of stdout is a JSON object. Runs on the CPU (gloo) in an environment with verl and
mbridge; what stands in there for a GPU is in tools/verl_proof/stand_ins.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tool_help import HelpFormatter
from verl_proof.case import (
    DEFAULT_SHAPES,
    MAX_LENGTH,
    NUM_LAYERS,
    VOCAB_SIZE,
    Case,
    Layout,
    deal_samples,
    draw_samples,
    write_model,
)

from megatron_prefix.packages import is_installed
from megatron_prefix.planning.shapes import read_shapes

if TYPE_CHECKING:
    from verl_proof.comparison import Side

# torch and verl are imported where they are used: help and wrong arguments need them not.


def build_case(
    layout: Layout,
    shapes: list[dict[str, Any]],
    folder: Path,
    *,
    same_prompts: bool,
    token_budget: int | None,
    micro_batch_size: int | None,
    optimizer_steps: int,
    distributed_optimizer: bool,
    num_experts: int,
    seed: int,
) -> Case:
    """Draw the batch, and deal its samples to ranks.

    Raises:
        ValueError: fewer samples than data-parallel ranks, or a layout that the model does not fit.
    """
    samples = draw_samples(shapes, seed, same_prompts=same_prompts)
    prompts, responses = samples.prompts, samples.responses
    if len(prompts) < layout.dp:
        raise ValueError(f"dp: {layout.dp} ranks for {len(prompts)} samples; lower it")
    if NUM_LAYERS % (layout.pp * layout.vpp):
        raise ValueError(f"pp, vpp: their product must divide the model's {NUM_LAYERS} layers")
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    if max(lengths) > MAX_LENGTH:
        raise ValueError(
            f"shapes: a sample has {max(lengths)} tokens, the model {MAX_LENGTH} positions"
        )
    rng = np.random.default_rng(seed + 1)

    def log_probs(response: tuple[int, ...]) -> tuple[float, ...]:
        # Near what a small random model has, so that clipping takes part.
        return tuple((rng.normal(scale=0.3, size=len(response)) - np.log(VOCAB_SIZE)).tolist())

    return Case(
        layout=layout,
        folder=folder,
        prompts=tuple(prompts),
        responses=tuple(responses),
        response_masks=tuple(samples.response_masks),
        old_log_probs=tuple(log_probs(r) for r in responses),
        reference_log_probs=tuple(log_probs(r) for r in responses),
        advantages=tuple(rng.normal(size=len(responses)).tolist()),
        samples_of_rank=deal_samples(prompts, lengths, layout.dp),
        token_budget=max(lengths) * 4 if token_budget is None else token_budget,
        micro_batch_size=micro_batch_size,
        optimizer_steps=optimizer_steps,
        distributed_optimizer=distributed_optimizer,
        num_experts=num_experts,
        seed=seed,
    )


def verify(case: Case) -> dict[str, Any]:
    """Run both sides and compare; prints a table and returns what the tool prints as JSON."""
    from ranks import run_ranks
    from verl_proof.comparison import Side, compare, print_report
    from verl_proof.engine_run import run_side

    stock_layout = case.layout
    if case.layout.cp > 1:
        stock_layout = dataclasses.replace(case.layout, cp=1)
        print(
            f"verl's own engine runs at cp 1, ours at cp {case.layout.cp}: its context parallelism "
            "needs Transformer Engine, which does not run on the CPU"
        )
    sides = {}
    for name, layout in (("verl", stock_layout), ("ours", case.layout)):
        with tempfile.TemporaryDirectory(prefix=f"verify_verl_{name}_") as results:
            run_ranks(
                run_side,
                layout.world_size,
                case,
                layout,
                name == "ours",
                Path(results),
                preload=("verl.workers.engine.megatron", "verl.workers.utils.losses"),
            )
            sides[name] = Side.read(Path(results), layout.world_size)
    report = compare(sides["verl"], sides["ours"])
    print_report(sides["verl"], sides["ours"], report)
    report |= tokens_report(case, sides["verl"], sides["ours"])
    report["ok"] = report["ok"] and report["tokens_ok"]
    return report


def tokens_report(case: Case, stock: Side, ours: Side) -> dict[str, Any]:
    """Whether ours has computed no more than whole groups need; prints it, too.

    A row is padded, and groups that do not fit a microbatch whole are split: these compute their
    prompt more than once, and less than verl's own engine.
    """
    needed, count = case.tokens_of_whole_groups, ours.train_microbatches
    padding = (case.layout.pad_to_multiple - 1) * count * case.layout.dp
    most = needed + padding
    verdict = f"{needed:,} tokens, and rows at most {padding:,} of padding"
    if not case.can_keep_groups_whole(count):
        most = stock.train_tokens - 1
        verdict = f"{needed:,} tokens, and some do not fit a microbatch whole"
    ok = ours.train_tokens <= most
    print(f"groups kept whole need {verdict}: {'OK' if ok else 'FAILED'}")
    return {
        "tokens_needed": needed,
        "tokens_stock": stock.train_tokens,
        "tokens_ours": ours.train_tokens,
        "tokens_ok": ok,
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--tp", type=int, default=1, help="tensor parallel (with sequence parallel)"
    )
    parser.add_argument("--pp", type=int, default=1, help="pipeline parallel")
    parser.add_argument("--vpp", type=int, default=1, help="model chunks per pipeline rank")
    parser.add_argument("--cp", type=int, default=1, help="context parallel")
    parser.add_argument("--dp", type=int, default=1, help="data parallel")
    parser.add_argument("--ep", type=int, default=1, help="expert parallel; a model with experts")
    parser.add_argument("--moe", action="store_true", help="a model with experts, at --ep 1 too")
    parser.add_argument(
        "--shapes",
        type=Path,
        help="YAML: [{prefix: int, responses: [int or turns]}]; masked turns are not trained on",
    )
    parser.add_argument(
        "--same-prompts",
        action="store_true",
        help="groups of the same prefix have the same prompt; so have they without --shapes",
    )
    parser.add_argument("--optimizer-steps", type=int, default=3, help="steps of SGD")
    parser.add_argument(
        "--token-budget",
        type=int,
        help="max_token_len_per_gpu; four times the longest sample by default",
    )
    parser.add_argument(
        "--micro-batch-size",
        type=int,
        help="samples of a microbatch (use_dynamic_bsz=False) instead of a token budget",
    )
    parser.add_argument(
        "--distributed-optimizer",
        action="store_true",
        help="shard the state of Adam, in SGD's place",
    )
    parser.add_argument("--seed", type=int, help="of weights and tokens; a fresh one by default")
    parser.add_argument("--json", action="store_true", help="print nothing else to stdout")
    args = parser.parse_args()
    seed = int.from_bytes(os.urandom(3), "little") if args.seed is None else args.seed
    layout = Layout(tp=args.tp, pp=args.pp, vpp=args.vpp, cp=args.cp, dp=args.dp, ep=args.ep)
    with tempfile.TemporaryDirectory(prefix="verify_verl_model_") as folder:
        try:
            shapes = DEFAULT_SHAPES if args.shapes is None else read_shapes(args.shapes)
            case = build_case(
                layout,
                shapes,
                Path(folder),
                same_prompts=args.same_prompts or args.shapes is None,
                token_budget=args.token_budget,
                micro_batch_size=args.micro_batch_size,
                optimizer_steps=args.optimizer_steps,
                distributed_optimizer=args.distributed_optimizer,
                num_experts=4 if args.moe or layout.ep > 1 else 0,
                seed=seed,
            )
        except (ValueError, OSError) as error:
            print(f"verify_verl: {error}", file=sys.stderr)
            return 2
        missing = [name for name in ("verl", "mbridge") if not is_installed(name)]
        if missing:
            print(
                f"verify_verl: {missing[0]} is not installed; VERL=0.9.1 bash tests/environment.sh "
                "makes an environment that has it",
                file=sys.stderr,
            )
            return 2
        write_model(case.folder, num_experts=case.num_experts, seed=seed)
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            print(f"seed {seed}")
            report = verify(case)
    print(json.dumps(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())

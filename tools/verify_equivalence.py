"""Prove that prefix-grouped, packed, parallel training computes what the repeated prompt would.

    python tools/verify_equivalence.py --tp 2 --pp 2 --dtype float64 --optimizer-steps 3

The reference is the unmodified Megatron GPTModel with Megatron's own layer spec, in one process
without any parallelism: one whole sequence at a time, unpacked, with the loss written out in plain
PyTorch and torch.optim.AdamW. The candidate starts from the same weights and sees the same
rollouts, but shares each prompt, packs, and runs through the trainer's own step on tp x pp x cp x
dp processes. Loss, every log-probability, every parameter's whole gradient and the parameters after
the optimizer steps are compared; the exit status is 0 only if all are within tolerance.

The last line of stdout is a JSON object. Runs on the CPU (gloo); no GPU is needed. With --device
cuda the candidate has a GPU for each of its processes (nccl), and the reference stays on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from equivalence.case import (
    DEFAULT_MODEL,
    DEFAULT_SHAPES,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Case,
    check_layout,
    check_lengths,
    draw_groups,
    trained_tokens,
    with_comm_types,
    with_outcomes,
    with_positions,
    with_routes,
)
from equivalence.comparison import TOLERANCES, compare
from tool_help import HelpFormatter, require_megatron

from megatron_prefix.attention.comm_types import COMM_TYPES
from megatron_prefix.config import (
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    TrainingConfig,
)
from megatron_prefix.config.bounds import refuse
from megatron_prefix.config.loader import apply_override, load_dataclass, read_yaml
from megatron_prefix.config.training import faults_of_layout
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.objective.losses import OBJECTIVES
from megatron_prefix.objective.unused import unused_options
from megatron_prefix.planning.shapes import read_shapes

# torch is imported where it is used: help and wrong arguments need it not.


_OF_THE_TRAINER: dict[str, tuple[Any, ...]] = {
    "zero_advantages": ("keep", "skip"),
    "kl_in": ("loss",),
    "kl_final_coefficient": (None,),
    "reference_refresh_steps": (None,),
    "reward_weights": (None,),
}
"""Values of options that both sides have; others act before or between the steps."""


def _worker(rank: int, job: str, folder: Path, seed: int) -> None:
    import torch

    try:
        # Written by this very run in its own temporary folder.
        inputs = torch.load(folder / "inputs.pt", weights_only=False)
        if job == "reference":
            from equivalence.reference import run_reference

            result = run_reference(inputs["case"], seed)
        else:
            from equivalence.candidate import run_candidate

            result = run_candidate(inputs["case"], inputs["initial"])
        if rank == 0:
            torch.save(result, folder / f"{job}.pt")
    except BaseException:
        print(f"{job}: rank {rank} failed", file=sys.stderr)
        traceback.print_exc()
        raise


def spawn(job: str, world_size: int, folder: Path, seed: int) -> Any:
    """Run a job on fresh processes and return what rank 0 saved."""
    import torch
    from ranks import run_ranks

    run_ranks(_worker, world_size, job, folder, seed)
    return torch.load(folder / f"{job}.pt", weights_only=False)


def verify(
    *,
    model: ModelConfig,
    shapes: list[dict[str, Any]],
    parallel: ParallelConfig,
    data_parallel_size: int = 1,
    dtype: str = "float64",
    optimizer_steps: int = 1,
    recompute: str = "none",
    token_budget: int | None = None,
    device: str = "cpu",
    kernel: str | None = None,
    distributed_optimizer: bool = True,
    objective: str = "grpo",
    objective_options: dict[str, Any] | None = None,
    packing: dict[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Run both sides and compare; returns the report that the tool prints as JSON.

    Args:
        device, kernel: of the candidate, as in `training`.
        objective: its name.
        objective_options: other keys of the `objective` section; see `objective_of`.
        packing: options of the `training` section that change how a run packs; without them the
            candidate packs as a run does.
    """
    import torch

    drawn = draw_groups(shapes, model.vocab_size, seed)
    longest = max(len(response) for group in drawn for response in group.responses)
    config = objective_of(objective, objective_options or {}, longest=longest)
    groups = with_outcomes(drawn, config, seed)
    if model.position_embedding_type == "mrope":
        groups = with_positions(groups)
    if (packing or {}).get("replayed_routes") is not None:
        groups = with_routes(groups, model, seed)
    largest = max(len(g.prompt) + sum(map(len, g.responses)) for g in groups)
    training = TrainingConfig(
        steps=optimizer_steps,
        token_budget=token_budget or max(2 * largest, 64),
        dtype=dtype,
        recompute=recompute,
        device=device,
        kernel=kernel,
        log_prob_chunk_tokens=16,
        timeout_minutes=5,
        # The reference's multi-token prediction trains all layers.
        **{"detach_mtp": False, **(packing or {})},
    )
    with tempfile.TemporaryDirectory(prefix="verify_equivalence_") as name:
        folder = Path(name)
        case = Case(
            model=model,
            parallel=parallel,
            training=training,
            optimizer=OptimizerSettings(
                lr=LEARNING_RATE,
                weight_decay=WEIGHT_DECAY,
                clip_grad=0.0,
                use_distributed_optimizer=distributed_optimizer,
            ),
            objective=config,
            groups=tuple(groups),
            reference_logprobs=None,
            data_parallel_size=data_parallel_size,
            folder=folder,
        )
        torch.save({"case": case}, folder / "inputs.pt")
        reference = spawn("reference", 1, folder, seed)
        case = reference["case"]
        torch.save({"case": case, "initial": reference["initial"]}, folder / "inputs.pt")
        candidate = spawn("candidate", case.world_size, folder, seed)
    num_entries = sum(len(trained_tokens(g, i)) for g in groups for i in range(len(g.responses)))
    print(
        f"{len(groups)} groups, {candidate['ungrouped_tokens']} tokens ungrouped, "
        f"{candidate['packed_tokens']} packed; {candidate['num_microbatches']} microbatches per "
        f"data-parallel rank, {candidate['split']} groups split over microbatches, "
        f"{candidate['series']} series of rows that share a prefix, "
        f"{candidate['unshared']} packed without sharing since it would not pay; "
        f"{candidate['labels']} positions through the output layer, for {num_entries} trained "
        "tokens"
    )
    return compare(reference, candidate, dtype)


def objective_of(name: str, options: dict[str, Any], *, longest: int) -> ObjectiveConfig:
    """The objective, with a KL penalty and an entropy bonus unless the options say otherwise.

    Args:
        longest: tokens of the longest response, for what divides by it.

    Raises:
        ValueError: naming the option that is wrong.
    """
    values = {"kl_coefficient": 0.05, "entropy_coefficient": 0.01, **options, "name": name}
    if name == "dr_grpo":
        values.setdefault("max_response_length", longest)
    config = load_dataclass(ObjectiveConfig, values, path="objective")
    refuse(f"objective.{fault}" for fault in unused_options(config))
    for option, proved in _OF_THE_TRAINER.items():
        if getattr(config, option) not in proved:
            raise ValueError(
                f"objective.{option}: {getattr(config, option)} is the trainer's, and not a part "
                "of the step that is compared; leave it out"
            )
    return config


def check_gpus(processes: int) -> None:
    """Raises:
    ValueError: there are fewer GPUs here than processes.
    """
    import torch

    if torch.cuda.device_count() < processes:
        raise ValueError(
            f"--device cuda: {processes} processes need a GPU each, and torch {torch.__version__} "
            f"sees {torch.cuda.device_count()} here"
        )


def packing_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line asks for otherwise than a run packs by itself."""
    options: dict[str, Any] = {}
    if args.sharing is not None:
        options["sharing"] = args.sharing
    if args.share_always:
        options["share_only_where_it_pays"] = False
    if args.whole_last_layer:
        options["trim_last_layer"] = False
    if args.share_across_microbatches:
        options["share_across_microbatches"] = True
    if args.replay:
        options["replayed_routes"] = "exact"
    return options


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", type=Path, help="YAML with the `model` section of a run")
    parser.add_argument(
        "--shapes",
        type=Path,
        help="YAML: [{prefix: int, responses: [response]}]; a response is a number of tokens, or a "
        "list of turns (a number, or {seen: int} for tokens of a tool, which are not trained on), "
        "or {turns: [turn], then: [response]} for responses that begin with the same turns",
    )
    parser.add_argument(
        "--tp", type=int, default=1, help="tensor parallel (with sequence parallel)"
    )
    parser.add_argument("--pp", type=int, default=1, help="pipeline parallel")
    parser.add_argument("--vpp", type=int, default=1, help="model chunks per pipeline rank")
    parser.add_argument("--cp", type=int, default=1, help="context parallel")
    parser.add_argument(
        "--cp-comm-type",
        choices=COMM_TYPES,
        action="append",
        help="how context-parallel ranks communicate; given several times, layers take turns",
    )
    parser.add_argument("--dp", type=int, default=1, help="data parallel")
    parser.add_argument("--ep", type=int, default=1, help="expert parallel")
    parser.add_argument("--etp", type=int, help="ranks that each expert is split over")
    parser.add_argument(
        "--no-sequence-parallel", action="store_true", help="with tensor parallelism, too"
    )
    parser.add_argument(
        "--no-distributed-optimizer", action="store_true", help="each rank holds all of its state"
    )
    parser.add_argument(
        "--dtype", choices=sorted(TOLERANCES), default="float64", help="it decides the tolerances"
    )
    parser.add_argument("--optimizer-steps", type=int, default=1, help="AdamW steps")
    parser.add_argument(
        "--recompute", choices=["none", "selective", "full"], default="none", help="as in a run"
    )
    parser.add_argument(
        "--objective", choices=list(OBJECTIVES), default="grpo", help="whose loss is compared"
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="another key of the `objective` section, such as correction.kind=mask or "
        "zero_advantages=skip; given as often as needed. Without it there are kl_coefficient=0.05 "
        "and entropy_coefficient=0.01",
    )
    parser.add_argument(
        "--sharing", choices=["groups", "everything"], help="training.sharing, as a run has it"
    )
    parser.add_argument(
        "--share-always",
        action="store_true",
        help="also where it does not pay (training.share_only_where_it_pays: false)",
    )
    parser.add_argument(
        "--whole-last-layer",
        action="store_true",
        help="compute it also where nothing depends on it (training.trim_last_layer: false)",
    )
    parser.add_argument(
        "--share-across-microbatches",
        action="store_true",
        help="pieces of a group that is over the token budget run its prefix once, as in a run",
    )
    parser.add_argument(
        "--replay",
        action="store_true",
        help="records say which experts tokens go to (training.replayed_routes: exact); the model "
        "has experts",
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="of the candidate; cuda: a GPU for each process, with --dtype float32 or bfloat16",
    )
    parser.add_argument(
        "--kernel",
        help="the candidate's attention kernel; in float32 on a GPU only `reference` can compute",
    )
    parser.add_argument("--token-budget", type=int, help="tokens of one microbatch at most")
    parser.add_argument("--seed", type=int, help="of weights and rollouts; a fresh one by default")
    args = parser.parse_args()
    seed = int.from_bytes(os.urandom(3), "little") if args.seed is None else args.seed
    print(f"seed {seed}")
    try:
        values = DEFAULT_MODEL
        if args.model is not None:
            values = read_yaml(args.model)
            values = values.get("model", values)
        model = load_dataclass(ModelConfig, values, path="model")
        if args.cp_comm_type is not None:
            model = with_comm_types(model, args.cp_comm_type)
        parallel = ParallelConfig(
            tensor_model_parallel_size=args.tp,
            pipeline_model_parallel_size=args.pp,
            context_parallel_size=args.cp,
            virtual_pipeline_model_parallel_size=args.vpp if args.vpp > 1 else None,
            expert_model_parallel_size=args.ep,
            expert_tensor_parallel_size=args.etp,
            sequence_parallel=False if args.no_sequence_parallel else None,
        )
        shapes = DEFAULT_SHAPES if args.shapes is None else read_shapes(args.shapes)
        check_lengths(shapes, model, args.shapes)
        options: dict[str, Any] = {}
        for override in args.set:
            apply_override(options, override)
        objective_of(args.objective, options, longest=1)
        training = TrainingConfig(
            steps=1,
            token_budget=1,
            dtype=args.dtype,
            device=args.device,
            kernel=args.kernel,
            **packing_options(args),
        )
        refuse(faults_of_layout(training, parallel))
        require_megatron(parser)
        if args.device == "cuda":
            check_gpus(parallel.model_parallel_size * args.dp)
        check_layout(model, parallel, args.dp, args.optimizer_steps, training)
        if args.replay and not model.transformer.get("num_moe_experts"):
            raise ValueError("--replay: the model has no experts")
    except (ValueError, OSError) as error:
        print(f"verify_equivalence: {error}", file=sys.stderr)
        return 2
    report = verify(
        model=model,
        shapes=shapes,
        parallel=parallel,
        data_parallel_size=args.dp,
        dtype=args.dtype,
        optimizer_steps=args.optimizer_steps,
        recompute=args.recompute,
        token_budget=args.token_budget,
        distributed_optimizer=not args.no_distributed_optimizer,
        device=args.device,
        kernel=args.kernel,
        objective=args.objective,
        objective_options=options,
        packing=packing_options(args),
        seed=seed,
    )
    print(json.dumps(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())

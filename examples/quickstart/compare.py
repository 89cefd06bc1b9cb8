"""Time grouped against ungrouped optimizer steps on the same rollouts.

    torchrun --nproc-per-node 2 examples/quickstart/compare.py grpo.yaml --output compare.json

Starts from the configuration's `output.load`, as GRPO does, and samples a few rollout batches from
it. Each is then trained on in two ways: grouped, and with the prompt repeated in front of every
response. Both run the same packed code, planned for the same token budget; only the trees differ.
Loss and gradients must agree before anything is timed. A step is timed as the trainer takes it:
planning and packing, forward, backward, reduction and update. The two sides take turns, and medians
are reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.checkpoints.weights import load_weights
from megatron_prefix.config import RunConfig
from megatron_prefix.config.packing import packing_of_run
from megatron_prefix.distributed.rank_results import on_rank_0
from megatron_prefix.distributed.runtime import Runtime, runtime_of_run
from megatron_prefix.layout import Packing
from megatron_prefix.model.build import ModelChunks, build_model_chunks, model_shape
from megatron_prefix.objective import ObjectiveConfig, PolicyMetrics
from megatron_prefix.rollouts.build import build_engine
from megatron_prefix.rollouts.parts import RolloutParts
from megatron_prefix.rollouts.records import RolloutBatch, RolloutSummary
from megatron_prefix.training.minibatch import Minibatch
from megatron_prefix.training.optimizer import build_optimizer, build_scheduler
from megatron_prefix.training.run_config import load_run_config
from megatron_prefix.training.step import accumulate_gradients, reduce_sums, train_step
from megatron_prefix.training.update import PolicyUpdate

SIDES = ("grouped", "ungrouped")
TOLERANCE = 1e-3
"""Of losses, and of gradients relative to their norm: float32 sums over thousands of tokens in
another order. A token in the wrong place shows as more than 1e-2."""


def packings(config: RunConfig, chunks: ModelChunks, place: Runtime) -> dict[str, Packing]:
    """How each side packs: as the run does, and every response with a prompt of its own."""
    grouped = packing_of_run(
        config.training,
        config.parallel,
        model_shape=model_shape(config.model, chunks.config),
        data_parallel_size=place.data_parallel_size,
    )
    return {"grouped": grouped, "ungrouped": dataclasses.replace(grouped, sharing="none")}


def check_equal(
    chunks: ModelChunks, steps: dict[str, Minibatch], config: RunConfig, place: Runtime
) -> float:
    """Compare losses and gradients, of the objective and of the plain log-likelihood.

    A first GRPO step's loss is 0 by itself (ratios are 1, a group's advantages add up to 0); the
    log-likelihood's loss is not.

    Returns:
        The largest norm of a parameter's gradient difference over that of its gradient.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    worst = 0.0
    for objective in (config.objective, ObjectiveConfig(name="supervised")):
        losses: dict[str, float] = {}
        gradients: dict[str, list[Tensor]] = {}
        for side, step in steps.items():
            metrics = accumulate_gradients(chunks, step.batches, objective)
            total = sum(metrics, start=PolicyMetrics.zeros(place.device))
            sums = reduce_sums(total.stack(), contributes=place.reports_metrics)
            losses[side] = PolicyMetrics.from_stack(sums).means()["policy_loss"]
            gradients[side] = [p.main_grad.clone() for _, p in chunks.named_parameters()]
        error = max(
            float((a - b).norm() / b.norm().clamp(min=1e-12))
            for a, b in zip(gradients["grouped"], gradients["ungrouped"], strict=True)
        )
        errors: list[float] = [0.0] * place.world_size
        dist.all_gather_object(errors, error)
        worst = max(worst, *errors)
        if not worst < TOLERANCE or not abs(losses["grouped"] - losses["ungrouped"]) < TOLERANCE:
            raise RuntimeError(
                f"{objective.name}: losses {losses}, gradients differ by {worst:.1e}: not the same "
                "step, so no times are reported"
            )
    return worst


def sample(
    config: RunConfig, chunks: ModelChunks, place: Runtime, num_batches: int
) -> list[tuple[RolloutBatch | None, RolloutSummary]]:
    """Rollout batches (whole on rank 0 alone) and their summaries."""
    engine = build_engine(RolloutParts(config, is_main=place.is_main), chunks, place)
    rollouts = []
    for index in range(num_batches):
        batch = engine.next_rollouts(config.rollouts.groups_per_step, step=index)
        rollouts.append((batch, on_rank_0(functools.partial(RolloutBatch.summary, batch))))
    engine.close()
    return rollouts


def compare(config: RunConfig, place: Runtime, *, num_batches: int, repeats: int) -> dict[str, Any]:
    """Tokens and median seconds of an optimizer step on each side, and their ratios."""
    chunks = build_model_chunks(
        config.model,
        config.parallel,
        config.training,
        use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
    )
    optimizer = build_optimizer(config.optimizer, chunks)
    scheduler = build_scheduler(config.optimizer, optimizer, total_steps=config.training.steps)
    if config.output.load is not None:
        load_weights(config.output.load, chunks, optimizer)
    attention = AttentionSetup.of(
        chunks.config, place.device, context_parallel_group=place.context_parallel_group
    )
    updates = {
        side: PolicyUpdate(
            config, place, chunks, optimizer, scheduler, packing=packing, attention=attention
        )
        for side, packing in packings(config, chunks, place).items()
    }
    rollouts = sample(config, chunks, place, num_batches)

    worst = 0.0
    tokens = dict.fromkeys(SIDES, 0)
    for batch, summary in rollouts:
        steps = {side: updates[side].minibatches(batch, summary, step=0)[0] for side in SIDES}
        worst = max(worst, check_equal(chunks, steps, config, place))
        for side, step in steps.items():
            own = torch.tensor([float(step.packed_tokens)], device=place.device)
            tokens[side] += round(float(reduce_sums(own, contributes=place.reports_metrics)))

    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in tqdm(range(repeats), unit="repeat", desc="compare", disable=not place.is_main):
        for batch, summary in rollouts:
            for side in SIDES:
                dist.barrier()
                started = time.perf_counter()
                (step,) = updates[side].minibatches(batch, summary, step=0)
                train_step(chunks, optimizer, scheduler, step.batches, config.objective)
                dist.barrier()
                seconds[side].append(time.perf_counter() - started)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "gradient_difference": worst,
        "tokens_grouped": tokens["grouped"] // num_batches,
        "tokens_ungrouped": tokens["ungrouped"] // num_batches,
        "tokens_saved_frac": 1 - tokens["grouped"] / tokens["ungrouped"],
        "seconds_grouped": medians["grouped"],
        "seconds_ungrouped": medians["ungrouped"],
        "speedup_vs_ungrouped": medians["ungrouped"] / medians["grouped"],
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="section.key=value, as in the file")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--batches", type=int, default=3, help="rollout batches to train on")
    parser.add_argument("--repeats", type=int, default=7, help="steps per batch and side")
    args = parser.parse_args()
    logging.getLogger("megatron").setLevel(logging.WARNING)
    config = load_run_config(args.config, tuple(args.overrides))
    with runtime_of_run(config) as place:
        result = compare(config, place, num_batches=args.batches, repeats=args.repeats)
        if place.is_main:
            args.output.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

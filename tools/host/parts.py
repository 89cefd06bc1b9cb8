"""What the host does in a step, part by part, on the rank that reads and on one that does not.

Two real processes, each on a core of its own where there are two: rank 0 reads the rollouts, makes
every rank's share and sends; rank 1 is one of the cluster's ranks. What is not there is the rest of
the cluster: the network that the other shares would travel through, and the waiting for it.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_prefix.attention.kernels import select_kernel
from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.device_copy import record_to_device
from megatron_prefix.distributed.agreement import check_equal_across_ranks
from megatron_prefix.distributed.rank_results import on_rank_0
from megatron_prefix.layout import Packing
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.rollouts.file_engine import FileEngine
from megatron_prefix.rollouts.group_reader import GroupReader
from megatron_prefix.rollouts.records import RolloutBatch, RolloutSummary
from megatron_prefix.rollouts.validation import Limits, validate_batch
from megatron_prefix.training.batch import HostBatch
from megatron_prefix.training.row_planning import RowPlanner
from megatron_prefix.training.shares import Distribution, Share
from megatron_prefix.training.step_plan import RolloutPlan, plan_rollouts

MAX_POSITIONS = 1 << 20
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is measured."""

    path: Path
    """The file of rollouts."""
    groups: int
    vocab_size: int
    packing: Packing
    context_parallel_size: int
    rank: int
    """The data-parallel rank that is measured."""
    device: str
    repeats: int


@dataclass(frozen=True, kw_only=True)
class RankOfMany(AttentionSetup):
    """The setup of the first of several context-parallel ranks, of which the others are not there;
    for planning only."""

    ranks: int

    @property
    def num_ranks(self) -> int:
        """Context-parallel ranks."""
        return self.ranks

    @property
    def rank(self) -> int:
        """The first."""
        return 0


class Clock:
    """Seconds of each part, repeat by repeat."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}

    def time(self, part: str, compute: Callable[[], Result]) -> Result:
        """What `compute` returns; its seconds become the part's of this repeat."""
        started = time.perf_counter()
        result = compute()
        self._seconds.setdefault(part, []).append(time.perf_counter() - started)
        return result

    def medians(self) -> dict[str, float]:
        """Of each part, over the repeats."""
        return {part: statistics.median(values) for part, values in self._seconds.items()}


def measure(rank: int, work: Work, folder: Path) -> None:
    """One of the two processes; writes what it found to a file in the folder."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    dist.init_process_group("gloo")
    imported_mb = memory_mb("VmRSS")
    clock = Clock()
    facts: dict[str, float] = {}
    for _ in range(work.repeats):
        facts = _repeat(rank, work, clock)
        dist.barrier()
    found = {
        "seconds": clock.medians(),
        "mb": memory_mb("VmHWM"),
        "mb_above_imports": memory_mb("VmHWM") - imported_mb,
        **facts,
    }
    (folder / f"rank_{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def _repeat(rank: int, work: Work, clock: Clock) -> dict[str, float]:
    batch = _read(work, clock) if rank == 0 else None
    dist.barrier()
    # Rank 0 is another one of the cluster's ranks.
    own = work.rank if rank == 1 else (work.rank + 1) % work.packing.data_parallel_size
    distribution = Distribution(own, torch.device("cpu"))
    summarise = functools.partial(_summary, batch)
    summary = clock.time("summary", functools.partial(on_rank_0, summarise))
    plan = clock.time("plan", lambda: plan_rollouts(summary, ObjectiveConfig(), work.packing))
    clock.time("check", lambda: check_equal_across_ranks("plan", plan.fingerprint(), group=None))
    scatter = functools.partial(distribution.scatter, batch, plan.shares)
    share = clock.time("distribute", scatter)
    del batch, scatter, summarise
    if rank == 1:
        batches = clock.time("pack", lambda: _pack(work, plan, share))
        clock.time(
            "copy", lambda: [record_to_device(b.arrays, torch.device(work.device)) for b in batches]
        )
    return balance(plan, work.packing)


def _summary(batch: RolloutBatch | None) -> RolloutSummary:
    assert batch is not None, "called on rank 0"
    return batch.summary()


def _pack(work: Work, plan: RolloutPlan, share: Share) -> list[HostBatch]:
    """All microbatches of the measured rank; series are left out."""
    setup = RankOfMany(
        device=torch.device(work.device),
        kernel=select_kernel("reference", device="cpu", dtype=torch.float32, head_dim=128),
        ranks=work.context_parallel_size,
    )
    (step,) = plan.steps
    planner = RowPlanner(step=step, share=share, packing=work.packing, attention=setup)
    planned = [planner.plan(slices) for slices in step.microbatches.microbatches[work.rank]]
    return [p.batch for p in planned if isinstance(p.batch, HostBatch)]


def _read(work: Work, clock: Clock) -> RolloutBatch:
    limits = Limits(vocab_size=work.vocab_size, max_positions=MAX_POSITIONS)
    engine = FileEngine([work.path], GroupReader(limits=limits), epochs=1)
    batch = clock.time("read", lambda: engine.next_rollouts(work.groups, step=0))
    engine.close()
    assert batch is not None
    clock.time("validate", lambda: validate_batch(batch, limits))
    return batch


def balance(plan: RolloutPlan, packing: Packing) -> dict[str, float]:
    """How even the plan of a step is, and how full its rows are."""
    (step,) = plan.steps
    microbatches = step.microbatches
    flops, tokens = microbatches.flops, microbatches.packed_tokens
    runs = sum(len(slices) for of_rank in microbatches.microbatches for slices in of_rank)
    return {
        "flops_max_over_mean": float(flops.sum(axis=1).max() / flops.sum(axis=1).mean()),
        "microbatch_flops_max_over_mean": float(flops.max() / flops.mean()),
        "fill": float(tokens.sum() / (tokens.size * packing.capacity)),
        "num_microbatches": microbatches.num_microbatches,
        "prefixes_run_again": runs - len(step.units),
    }


def memory_mb(name: str) -> float:
    """A line of /proc/self/status, in MB of 10^6 bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines[name].split()[0]) * 1024 / 1e6

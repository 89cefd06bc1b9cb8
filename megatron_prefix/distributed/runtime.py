"""Process groups, devices and random states: everything that a run holds globally.

The only place that reads torchrun's environment and touches `torch.distributed`'s and Megatron's
global state. `runtime(...)` sets it up and takes it down again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_prefix.config import ParallelConfig, RunConfig
from megatron_prefix.distributed.liveness import Liveness, attempt
from megatron_prefix.megatron.cpu_device import disable_cpu_device, enable_cpu_device


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """This process's place in the run."""

    device: torch.device
    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int
    context_parallel_group: dist.ProcessGroup | None
    """The ranks that a packed row is distributed over; None where each has whole rows."""
    tensor_parallel_rank: int
    liveness: Liveness
    """Tells which ranks are gone after a collective has failed."""
    is_last_stage: bool
    """On the last pipeline stage (of its last chunk under interleaving)."""

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that logs."""
        return self.rank == 0

    @property
    def reports_metrics(self) -> bool:
        """One rank for each part of a packed row: on the last stage, the first tensor-parallel."""
        return self.is_last_stage and self.tensor_parallel_rank == 0


@contextlib.contextmanager
def runtime(
    parallel: ParallelConfig,
    *,
    device: str,
    seed: int,
    timeout_minutes: float,
    float64: bool = False,
) -> Iterator[Runtime]:
    """Start torch.distributed (from torchrun's environment) and Megatron's parallel state.

    Args:
        parallel: the layout; the world must divide by its model-parallel size.
        device: "cuda" (nccl) or "cpu" (gloo, with Megatron redirected to the CPU).
        seed: of parameters and sampling.
        timeout_minutes: a collective that waits longer raises instead of hanging.
        float64: also run Megatron in float64 (device "cpu" only).

    Yields:
        The process's place. Process groups are destroyed at the end, also after an error.
    """
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    parallel.data_parallel_size(world_size)
    if "RANK" not in os.environ:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    if device == "cpu":
        enable_cpu_device(float64=float64)
        torch_device = torch.device("cpu")
    else:
        torch_device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(torch_device)
    previous_dtype = torch.get_default_dtype()
    if float64:
        torch.set_default_dtype(torch.float64)
    liveness = None
    try:
        started_here = not dist.is_initialized()
        if started_here:
            timeout = timedelta(minutes=timeout_minutes)
            store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
            dist.init_process_group(
                backend="gloo" if device == "cpu" else "nccl",
                # Addresses of ranks that have been killed must not be taken for those of now.
                store=dist.PrefixStore(f"start_{attempt()}", store),
                rank=rank,
                world_size=world_size,
                timeout=timeout,
            )
        # Some stay held when the parallel state of an earlier runtime is destroyed.
        groups_before = _model_parallel_groups()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=(
                parallel.virtual_pipeline_model_parallel_size
                if parallel.num_model_chunks > 1
                else None
            ),
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_split,
            distributed_timeout_minutes=timeout_minutes,
        )
        set_seed(seed)
        liveness = Liveness(rank, world_size)
        yield Runtime(
            device=torch_device,
            rank=rank,
            world_size=world_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            context_parallel_group=(
                parallel_state.get_context_parallel_group()
                if parallel.context_parallel_size > 1
                else None
            ),
            tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
            liveness=liveness,
            is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
        )
    finally:
        if liveness is not None:
            liveness.close()
        if started_here:
            parallel_state.destroy_model_parallel()
            if dist.is_initialized():
                dist.destroy_process_group()
        else:
            # Megatron would only forget them, and each has a thread of its own.
            for group in _model_parallel_groups() - groups_before:
                dist.destroy_process_group(group)
            parallel_state.destroy_model_parallel()
        torch.set_default_dtype(previous_dtype)
        if device == "cpu":
            disable_cpu_device()


def _model_parallel_groups() -> set[dist.ProcessGroup]:
    """The groups that Megatron's parallel state holds."""
    held = vars(parallel_state).values()
    items = itertools.chain(*(value if isinstance(value, list) else [value] for value in held))
    return {item for item in items if isinstance(item, dist.ProcessGroup)}


def set_seed(seed: int) -> None:
    """Seed Python, NumPy, torch and Megatron's tensor-parallel generators.

    Pipeline stages draw different parameters; data-parallel replicas the same.
    """
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)


def runtime_of_run(config: RunConfig) -> contextlib.AbstractContextManager[Runtime]:
    """The `runtime` that a run's config asks for."""
    training = config.training
    return runtime(
        config.parallel,
        device=training.device,
        seed=training.seed,
        timeout_minutes=training.timeout_minutes,
        float64=training.dtype == "float64",
    )

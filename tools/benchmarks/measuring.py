"""How sides are timed, weighed and compared."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from ranks import fresh_processes
from torch import Tensor

from megatron_prefix.megatron.known_messages import hide_known_messages


class Runner(Protocol):
    """One side, ready to run."""

    def step(self) -> None:
        """Forward and backward."""
        ...

    def result(self) -> dict[str, Tensor]:
        """What the last step computed, in a form that is equal for all sides."""
        ...


def check_equal(runners: Mapping[str, Runner], *, tolerance: float) -> float:
    """Run each side once and compare their results with the first side's.

    Args:
        tolerance: of the relative L2 error of each result.

    Returns:
        The largest such error that was found.

    Raises:
        RuntimeError: they differ; no ratio is to be printed.
    """
    expected: dict[str, Tensor] = {}
    largest = 0.0
    for side, runner in runners.items():
        runner.step()
        found = {name: value.detach().double().clone() for name, value in runner.result().items()}
        expected = expected or found
        for name, value in expected.items():
            error = float((found[name] - value).norm() / value.norm().clamp(min=1e-12))
            if not error < tolerance:
                first = next(iter(runners))
                raise RuntimeError(
                    f"{side} and {first}: {name} differ by {error:.1e}: no ratio is reported"
                )
            largest = max(largest, error)
    return largest


def interleaved_seconds(
    runners: Mapping[str, Runner],
    *,
    repeats: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of one step of each side in each repeat.

    Sides take turns step by step, in alternating order, until each has run for `seconds` in a
    repeat, since a machine's speed may drift by more than what is measured.

    Args:
        runners: the sides.
        repeats: measurements.
        seconds: of each side in a repeat, at least.
        clock: what seconds are read from.
    """
    found: dict[str, list[float]] = {side: [] for side in runners}
    for _ in range(repeats):
        total = dict.fromkeys(runners, 0.0)
        order, rounds = list(runners), 0
        gc.collect()
        while rounds == 0 or min(total.values()) < seconds:
            for side in order:
                started = clock()
                runners[side].step()
                _wait_for_device()
                total[side] += clock() - started
            order.reverse()
            rounds += 1
        for side, value in total.items():
            found[side].append(value / rounds)
    return found


def _wait_for_device() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def ratios(seconds: Mapping[str, list[float]], side: str, base: str) -> dict[str, float]:
    """Of `side` to `base` within each repeat: median, least and most."""
    values = [s / b for s, b in zip(seconds[side], seconds[base], strict=True)]
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def peak_growth_mb(run: Callable[[], Any]) -> float:
    """Peak memory during `run` beyond what was held before, in MB; in a fresh process on the CPU.

    On the CPU it is the growth of the resident set, on a GPU what torch has allocated.
    """
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    before_mb = pages * resource.getpagesize() / 2**20
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before_mb


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new process and return its result."""
    with fresh_processes().Pool(1, initializer=hide_known_messages) as pool:
        return pool.apply(function, args)

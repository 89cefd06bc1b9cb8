"""A plan as plain numbers, and as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_prefix.planning.estimate import StepEstimate

# It imports Megatron, which a report of numbers does not need.
if TYPE_CHECKING:
    from megatron_prefix.planning.run import Plan, PlannedRun

GIB = 2**30


def summary(
    estimate: StepEstimate, *, flops_per_second: float | None, bytes_per_second: float | None
) -> dict[str, Any]:
    """One side as plain numbers: FLOPs and bytes in units. The rates are as in `report`."""
    worst = estimate.worst
    result: dict[str, Any] = {
        "microbatches_per_rank": len(estimate.microbatches[0]),
        "series": estimate.num_series,
        "tokens": estimate.tokens,
        "flops": estimate.flops,
        "context_parallel_bytes_per_layer": estimate.context_parallel_bytes,
        "context_parallel_bytes_per_recurrent_layer": estimate.recurrent_bytes,
        "memory_bytes": worst.total,
        "worst_pipeline_rank": worst.pipeline_rank,
        "pipeline_ranks": [
            {
                "parameters": stage.static.parameters,
                "gradients": stage.static.gradients,
                "optimizer": stage.static.optimizer,
                "activations": stage.activations,
                "transient": stage.transient,
                "total": stage.total,
            }
            for stage in estimate.stages
        ],
    }
    if flops_per_second is not None:
        result["seconds"] = estimate.seconds(
            flops_per_second=flops_per_second, bytes_per_second=bytes_per_second
        )
    return result


def report(
    plan: Plan, *, flops_per_second: float | None = None, bytes_per_second: float | None = None
) -> dict[str, Any]:
    """Both sides and their ratios.

    Args:
        plan: of both sides.
        flops_per_second: measured, of a rank's matrix products; None: there are no seconds, and the
            ratio of times is that of FLOPs.
        bytes_per_second: measured, between context-parallel ranks; None: messages are free.
    """
    sides = {
        name: summary(side, flops_per_second=flops_per_second, bytes_per_second=bytes_per_second)
        for name, side in (("grouped", plan.grouped), ("ungrouped", plan.ungrouped))
    }
    time_ratio = plan.flops_ratio
    if flops_per_second is not None:
        time_ratio = sides["ungrouped"]["seconds"] / sides["grouped"]["seconds"]
    return {
        **sides,
        "tokens_ratio": plan.tokens_ratio,
        "flops_ratio": plan.flops_ratio,
        "memory_ratio": plan.ungrouped.worst.total / plan.grouped.worst.total,
        "time_ratio": time_ratio,
        "skipped_groups": plan.skipped_groups,
    }


def layout_line(run: PlannedRun) -> str:
    """The ranks that the plan is for."""
    parallel = run.parallel
    sizes = {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "context": parallel.context_parallel_size,
        "data": run.data_parallel_size,
    }
    product = " x ".join(f"{name} {size}" for name, size in sizes.items())
    ranks = parallel.model_parallel_size * run.data_parallel_size
    place = "GPU" if run.training.device == "cuda" else "process"
    return f"{ranks} rank{'s' if ranks > 1 else ''} (one {place} each) = {product}"


def flops_unit(flops: float) -> tuple[str, float]:
    """The unit in which a number of FLOPs has digits before the point, and its size."""
    for name, size in (("PFLOPs", 1e15), ("TFLOPs", 1e12), ("GFLOPs", 1e9)):
        if flops >= 0.1 * size:
            return name, size
    return "MFLOPs", 1e6


def table(result: dict[str, Any]) -> list[str]:
    """Lines: the two sides next to each other, then the memory of every pipeline rank."""
    # A small model's gibibytes have their digits behind the point.
    places = ".1f" if result["grouped"]["memory_bytes"] >= GIB else ".3f"
    return [*_sides(result, places), "", *_memory(result, places)]


def _sides(result: dict[str, Any], places: str) -> list[str]:
    grouped, ungrouped = result["grouped"], result["ungrouped"]
    unit, size = flops_unit(grouped["flops"])

    def row(name: str, form: str, key: str, ratio: str | None = None, unit: float = 1.0) -> str:
        values = (format(side[key] / unit, form) for side in (grouped, ungrouped))
        tail = "" if ratio is None else f"{result[ratio]:>9.2f}"
        return f"{name:<34}{next(values):>12}{next(values):>12}{tail}"

    lines = [
        f"{'':<34}{'grouped':>12}{'ungrouped':>12}{'ratio':>9}",
        row("tokens", ",.0f", "tokens", "tokens_ratio"),
        row(f"{unit} of the step, all ranks", ",.2f", "flops", "flops_ratio", size),
        row("microbatches of a rank", ".0f", "microbatches_per_rank"),
    ]
    if grouped["series"]:
        lines.append(row("of them a series, all ranks", ".0f", "series"))
    for name, received in (
        ("MB received in a layer (CP)", "context_parallel_bytes_per_layer"),
        ("MB received in a recurrent one", "context_parallel_bytes_per_recurrent_layer"),
    ):
        if grouped[received] or ungrouped[received]:
            lines.append(row(name, ",.1f", received, None, 1e6))
    lines.append(row("GiB of the fullest rank", places, "memory_bytes", "memory_ratio", GIB))
    if "seconds" in grouped:
        lines.append(row("seconds at the given rates", ".2f", "seconds", "time_ratio"))
    else:
        lines.append(f"{'step time, bound by FLOPs':<58}{result['time_ratio']:>9.2f}")
    if result["skipped_groups"]:
        lines.append(
            f"groups whose prefix is not shared, since it would not pay: {result['skipped_groups']}"
        )
    return lines


def _memory(result: dict[str, Any], places: str) -> list[str]:
    widths = {
        "parameters": 11,
        "gradients": 11,
        "optimizer": 11,
        "activations": 13,
        "transient": 11,
        "total": 9,
    }
    names = "".join(f"{name:>{width}}" for name, width in widths.items())
    lines = [f"{'GiB, grouped':<14}{names}{'ungrouped':>11}"]
    sides = (result[side]["pipeline_ranks"] for side in ("grouped", "ungrouped"))
    for rank, (stage, other) in enumerate(zip(*sides, strict=True)):
        sizes = "".join(f"{stage[name] / GIB:>{width}{places}}" for name, width in widths.items())
        lines.append(f"{f'pipeline {rank}':<14}{sizes}{other['total'] / GIB:>11{places}}")
    return lines

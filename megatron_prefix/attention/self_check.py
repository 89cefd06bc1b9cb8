"""A check of one attention kernel against `reference`, small enough to run at every start.

A kernel calls private functions of torch or of a package, whose meaning may change with a release,
a GPU or a build. So before it is trusted it computes a few tiny rows on the run's own device, with
its dtype and heads. The rows hold what the stages of real rows hold: grouped heads, rectangles
without queries, queries and keys that are picked row by row, and a context-parallel rank's stages.
The merge of stages is checked apart, on more rows.

Shapes: N queries and T keys of a row; H query heads, Hk key/value heads, D head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_prefix.attention.kernels import Kernel, MergedAttention, usable_kernels
from megatron_prefix.attention.kernels.reference import ReferenceKernel
from megatron_prefix.attention.merge_check import merge_errors
from megatron_prefix.attention.stage_compute import StageCompute
from megatron_prefix.device_copy import record_to_device
from megatron_prefix.layout import AttentionStage, PackedLayout, PrefixTree, pack, rank_row


class KernelCheckError(ValueError):
    """A kernel raises, or computes something else than attention."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The largest error that is rounding, per dtype of q, k and v."""

    lse: float
    """Of any lse, in absolute terms."""
    out: float
    """Of all of out: the L2 norm of the error over that of out."""
    gradient: float
    """The same of dq, dk and dv."""
    row: float
    """Of one row of one head of out or a gradient, so that a few wrong rows do not drown. Over the
    row's norm or, where that is larger, the root mean square of all rows' norms."""


TOLERANCES = {
    # The order of additions, and exp to the last bits.
    torch.float64: Tolerance(lse=1e-12, out=1e-12, gradient=1e-12, row=1e-11),
    # The same; exp of torch's CPU op is right to 2^-20 only.
    torch.float32: Tolerance(lse=1e-5, out=1e-5, gradient=1e-5, row=1e-4),
    # Scores and lse are float32. FlashAttention rounds P, dS, each stage's out and each result to
    # 2^-9: emulated so, out is off by 2.5e-3, gradients by 3.7e-3, and a row by 1.6e-2, which is a
    # dq whose terms almost cancel since its token sees few keys. A gradient off by 1 % is caught.
    torch.bfloat16: Tolerance(lse=1e-3, out=5e-3, gradient=7e-3, row=5e-2),
    # The same with 2^-12, so an eighth of it.
    torch.float16: Tolerance(lse=1e-3, out=7e-4, gradient=1e-3, row=7e-3),
}


def check_kernel(
    kernel: Kernel,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    num_heads: int,
    num_key_heads: int,
    head_dim: int,
    deterministic: bool = False,
    windows: bool = False,
) -> None:
    """Run a kernel on a few tiny rows, forward and backward, and compare it with `reference`.

    Takes less than a second on a CPU; no random numbers of the caller are used.

    Args:
        kernel: from `select_kernel`.
        device, dtype: of q, k and v.
        num_heads: query heads of this tensor-parallel rank; num_key_heads: key/value heads.
        head_dim: of each head.
        deterministic: ask for a deterministic backward.
        windows: of a model that has layers with a sliding window: rows of these as well.

    Raises:
        KernelCheckError: the kernel raises, or is off by more than `TOLERANCES`. The message, one
            line, has its name, the numbers, and the names of other kernels. Or the merge of stages
            is off, on this device, whatever the kernel.
    """
    if dtype not in TOLERANCES:
        raise ValueError(f"{dtype}: kernels are checked in {', '.join(map(str, TOLERANCES))} only")
    device = torch.device(device)
    heads = _Heads(queries=num_heads, keys=num_key_heads, dim=head_dim)
    _check_merge(device, dtype, heads)
    problems = _problems() + _window_problems() if windows else _problems()
    try:
        wrong = [
            f"in {problem.name} {worst}"
            for problem in problems
            if (worst := _worst_error(problem, kernel, device, dtype, heads, deterministic))
        ]
        verdict = f"is wrong: {'; '.join(wrong)}" if wrong else None
    except Exception as error:  # whatever a package raises where it does not fit
        first_line = next(iter(str(error).splitlines()), "")
        verdict = f"fails with {type(error).__name__}: {first_line}"
    if verdict is None:
        return
    usable = usable_kernels(device, dtype, head_dim, deterministic=deterministic, windows=windows)
    others = [name for name in usable if name != kernel.name]
    raise KernelCheckError(
        f"attention kernel {kernel.name!r} {verdict}. It was compared with the reference before "
        f"the first step, on {device} in {dtype} with {num_heads} query heads and {num_key_heads} "
        f"key heads of {head_dim}. Set training.kernel (kernel= of AttentionSetup) to "
        f"another: {', '.join(others) or 'none can compute these inputs'}"
    )


@dataclass(frozen=True, kw_only=True)
class _Heads:
    queries: int
    keys: int
    dim: int


def _check_merge(device: torch.device, dtype: torch.dtype, heads: _Heads) -> None:
    tolerance = {"lse": TOLERANCES[dtype].lse, "out": TOLERANCES[dtype].out}
    for what, error in merge_errors(device, dtype, heads.queries, heads.dim):
        if not error <= tolerance[what]:
            raise KernelCheckError(
                f"the merge of attention stages is wrong on {device} in {dtype} with "
                f"{heads.queries} heads of {heads.dim}: {what} is off by {error:.1e} (tolerance "
                f"{tolerance[what]:.1e}). It is the same for all kernels; on a GPU Triton "
                "compiles it: install another release of it"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Problem:
    """The stages of one row, or of one rank's row and what it gathers."""

    name: str
    stages: tuple[AttentionStage[Any], ...]
    """The self stage of all queries, then cross stages against the row's own keys."""
    num_keys: int
    """Of the row."""
    gathered_stages: tuple[AttentionStage[Any], ...] = ()
    """Cross stages against gathered keys."""
    num_gathered: int = 0

    @property
    def num_queries(self) -> int:
        return int(self.stages[0].on.cu_q[-1])

    @property
    def wide(self) -> bool:
        """Whether a row takes part in more than two stages; see `StageCompute`."""
        return len(self.stages) > 2 or self.num_gathered > 0


@functools.cache
def _row() -> tuple[PackedLayout, np.ndarray]:
    """A row, and positions whose output a trimmed last layer needs."""
    # The second tree is one sequence, shared by nobody: its rectangle between those of the two
    # groups has no queries. The first group's prefix is longer than a tile of 64.
    groups = [
        ([1] * 71, [[2] * 5, [3], [4] * 14]),
        ([5], [[6] * 9]),
        ([7] * 3, [[8] * 18, [9] * 2]),
    ]
    layout = pack(PrefixTree.from_groups(groups), pad_to_multiple=2)
    sequences = ((0, 2), (1, 1), (2, 9), (3, 3), (5, 1))
    needed = np.concatenate([layout.sequence_positions(i)[-last:] for i, last in sequences])
    return layout, needed


@functools.cache
def _problems() -> tuple[_Problem, ...]:
    """The rows, on the host."""
    layout, needed = _row()
    whole = rank_row(layout, needed=needed).model
    problems = [
        _Problem(name="a whole row", stages=whole.stages.local, num_keys=layout.num_tokens),
        _Problem(
            name="a trimmed last layer",
            stages=whole.last_stages.local,
            num_keys=layout.num_tokens,
        ),
    ]
    for rank in range(2):
        of_rank = rank_row(layout, rank=rank, num_ranks=2).model.stages
        problems.append(
            _Problem(
                name=f"context-parallel rank {rank} of 2",
                stages=of_rank.local,
                num_keys=of_rank.num_tokens,
                gathered_stages=of_rank.gathered.stages,
                num_gathered=len(of_rank.gathered.source),
            )
        )
    return tuple(problems)


@functools.cache
def _window_problems() -> tuple[_Problem, ...]:
    """Rows of layers with a sliding window, on the host."""
    layout, needed = _row()
    problems = []
    for window in (1, 6, 70):
        row = rank_row(layout, needed=needed, window=window).model
        for name, stages in (("a row", row.stages), ("a trimmed last layer", row.last_stages)):
            problems.append(
                _Problem(
                    name=f"{name} with a window of {window} keys before a query",
                    stages=(stages.windowed.stage,),
                    num_keys=layout.num_tokens,
                )
            )
    return tuple(problems)


def _worst_error(
    problem: _Problem,
    kernel: Kernel,
    device: torch.device,
    dtype: torch.dtype,
    heads: _Heads,
    deterministic: bool,
) -> str | None:
    """What exceeds its tolerance by the largest factor, in words; None where nothing does."""
    inputs = _inputs(problem, dtype, heads)
    # Both are far more exact than a kernel in the dtype; float32 is faster.
    exact_dtype = torch.float64 if dtype in (torch.float64, torch.float32) else torch.float32
    exact_inputs = {name: value.to(exact_dtype) for name, value in inputs.items()}
    scale = heads.dim**-0.5
    exact = _run(problem, exact_inputs, StageCompute(ReferenceKernel(), scale))
    on_device = {name: _in_poison(value, device) for name, value in inputs.items()}
    _free_poison(exact, dtype, device)
    with _NaNInEmpty():
        found = _run(problem, on_device, StageCompute(kernel, scale, deterministic))
    worst, words = 1.0, None
    for what, error, tolerance in _errors(found, exact, TOLERANCES[dtype]):
        factor = error / tolerance if error == error else float("inf")
        if factor > worst:
            worst, words = factor, f"{what} is off by {error:.1e} (tolerance {tolerance:.1e})"
    return words


def _errors(
    found: dict[str, Tensor], exact: dict[str, Tensor], tolerance: Tolerance
) -> Iterator[tuple[str, float, float]]:
    """What, its error and the tolerance of that; an error may be NaN."""
    for name, expected in exact.items():
        error = found[name].to("cpu", expected.dtype) - expected
        if name == "lse":
            yield name, float(error.abs().max()), tolerance.lse
            continue
        norms = expected.norm(dim=-1)
        typical = norms.square().mean().sqrt()
        in_rows = error.norm(dim=-1) / norms.clamp(min=typical)
        overall = tolerance.out if name == "out" else tolerance.gradient
        yield name, float(error.norm() / expected.norm()), overall
        yield f"a row of {name}", float(in_rows.max()), tolerance.row


def _inputs(problem: _Problem, dtype: torch.dtype, heads: _Heads) -> dict[str, Tensor]:
    """Random q, k, v and dout, and the gathered k and v."""
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "q": (problem.num_queries, heads.queries),
        "k": (problem.num_keys, heads.keys),
        "v": (problem.num_keys, heads.keys),
        "dout": (problem.num_queries, heads.queries),
        "gathered k": (problem.num_gathered, heads.keys),
        "gathered v": (problem.num_gathered, heads.keys),
    }
    return {
        name: torch.randn(*shape, heads.dim, generator=generator, dtype=torch.float32).to(dtype)
        for name, shape in shapes.items()
    }


def _run(problem: _Problem, x: dict[str, Tensor], compute: StageCompute) -> dict[str, Tensor]:
    """out [N, H, D], lse [N, H] and all gradients, as `prefix_attention` computes them.

    Under context parallelism too, but that keys and their gradients do not travel.
    """
    q, k, v = x["q"], x["k"], x["v"]
    gathered = (x["gathered k"], x["gathered v"])
    stages, gathered_stages = record_to_device((problem.stages, problem.gathered_stages), q.device)
    out, lse = compute.attend(stages, q, k, v, wide=problem.wide)
    compute.merge(gathered_stages, q, *gathered, out, lse)
    out = out.to(q.dtype)
    merged = MergedAttention(q=q, out=out, lse=lse, dout=x["dout"].contiguous())
    dq, dk, dv = compute.shares(stages, merged, k, v, wide=problem.wide)
    d_gathered = [torch.zeros_like(y, dtype=dq.dtype) for y in gathered]
    compute.add_shares(gathered_stages, merged, *gathered, dq, *d_gathered)
    found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    if problem.num_gathered:
        found.update(zip(("dk of gathered keys", "dv of gathered keys"), d_gathered, strict=True))
    return found


def _in_poison(x: Tensor, device: torch.device) -> Tensor:
    """x on the device as a view with NaN between its heads, before it and behind it.

    Only the last dimension is contiguous, as in slices of Megatron's fused projection.
    """
    tokens, heads, dim = x.shape
    around = torch.full((tokens + 2, heads, dim + 8), torch.nan, dtype=x.dtype, device=device)
    view = around[1 : tokens + 1, :, :dim]
    return view.copy_(x)


def _free_poison(results: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
    """Leave NaN in memory that a package's results are likely to get from the device's allocator.

    A package may allocate where `_NaNInEmpty` does not see it, and fresh memory is often zero.
    """
    held = [
        torch.full_like(x, torch.nan, dtype=kind, device=device)
        for x in results.values()
        for kind in (dtype, torch.float32)
    ]
    del held


class _NaNInEmpty(TorchFunctionMode):
    """What is allocated without a value holds NaN, so that an element never written is noticed."""

    _ALLOCATE = frozenset(
        {
            torch.empty,
            torch.empty_like,
            torch.empty_strided,
            Tensor.new_empty,
            Tensor.new_empty_strided,
        }
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in self._ALLOCATE and result.is_floating_point():
            result.fill_(torch.nan)
        return result

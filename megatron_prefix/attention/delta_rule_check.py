"""A check of a delta rule against that of torch in float64, small enough to run at every start.

Like that of attention kernels (`self_check.py`): a package's function may mean something else after
a release, on another GPU or in another build. The row has groups of rollouts and three levels; the
part of a context-parallel rank has pieces, whose maps are compared too.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_prefix.attention.delta_rule import gated_delta_rule
from megatron_prefix.attention.delta_rules import DeltaRule, TorchRule
from megatron_prefix.attention.layer_kinds import has_delta_nets
from megatron_prefix.attention.row_attention import attention_dtype
from megatron_prefix.attention.self_check import KernelCheckError
from megatron_prefix.device_copy import record_to_device
from megatron_prefix.layout import PrefixTree, Recurrence, pack, rank_row

TOLERANCES = {
    torch.float32: 1e-4,
    # What a package rounds between its kernels; g is a sum of them. In float16 under Triton's
    # interpreter the worst is 1.1e-3, so about 8e-3 with bfloat16's 3 bits less.
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}
"""The largest error that is rounding: the L2 norm of the error over that of the exact value."""
_RESULTS = ("out", "dq", "dk", "dv", "dg", "dbeta", "the maps of pieces")


def check_delta_rule(
    rule: DeltaRule,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    num_heads: int,
    key_dim: int,
    value_dim: int,
) -> None:
    """Run a rule on tiny rows, forward and backward, and compare it. Torch's own is not run.

    Args:
        rule: from `select_delta_rule`.
        device, dtype: of q, k and v.
        num_heads: value heads of this tensor-parallel rank; key_dim, value_dim: of each head.

    Raises:
        KernelCheckError: the rule raises, or is off by more than `TOLERANCES`. The message, one
            line, has its name and the numbers.
    """
    if isinstance(rule, TorchRule):
        return
    sizes = {"num_heads": num_heads, "key_dim": key_dim, "value_dim": value_dim}
    try:
        errors = rule_errors(rule, device=torch.device(device), dtype=dtype, **sizes)
        wrong = [
            f"{name} is off by {error:.1e} (tolerance {TOLERANCES[dtype]:.1e})"
            for name, error in errors.items()
            if not error <= TOLERANCES[dtype]
        ]
        verdict = f"is wrong: {'; '.join(wrong)}" if wrong else None
    except Exception as error:  # whatever a package raises where it does not fit
        first_line = next(iter(str(error).splitlines()), "")
        verdict = f"fails with {type(error).__name__}: {first_line}"
    if verdict is not None:
        raise KernelCheckError(
            f"delta rule {rule.name!r} {verdict}. It was compared with that of torch in float64 "
            f"before the first step, on {device} in {dtype} with {num_heads} heads of {key_dim} "
            f"and {value_dim}. Set training.delta_rule_kernel (delta_rule= of AttentionSetup.of) "
            "to torch"
        )


def rule_errors(
    rule: DeltaRule,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    key_dim: int,
    value_dim: int,
) -> dict[str, float]:
    """The L2 norm of each result's error over that of the exact value; see `check_delta_rule`."""
    rounded = [x if x.dim() == 2 else x.to(dtype) for x in _inputs(num_heads, key_dim, value_dim)]
    exact = _run(TorchRule(), [x.double() for x in rounded], torch.device("cpu"))
    found = _run(rule, rounded, device)
    return {
        name: float((y.cpu().double() - x).norm() / x.norm())
        for name, x, y in zip(_RESULTS, exact, found, strict=True)
    }


def check_delta_rule_of_model(rule: DeltaRule, config: Any, device: torch.device) -> None:
    """`check_delta_rule` for the gated delta nets of a model, if it has any.

    Args:
        config: Megatron's `TransformerConfig`.
    """
    if has_delta_nets(config):
        check_delta_rule(
            rule,
            device=device,
            dtype=attention_dtype(config),
            num_heads=config.linear_num_value_heads // config.tensor_model_parallel_size,
            key_dim=config.linear_key_head_dim,
            value_dim=config.linear_value_head_dim,
        )


@functools.cache
def _rows() -> tuple[Recurrence, Recurrence]:
    """A row of groups and of a deeper tree, and a context-parallel rank's part of it."""
    groups = [([1] * 70, [[2] * 5, [3], [4] * 66]), ([5], [[6] * 9, [7]])]
    deep = [[8] * 3 + [n] * 20 + [m] * 4 for n in (1, 2) for m in (3, 4)]
    tree = PrefixTree.concat([PrefixTree.from_groups(groups), PrefixTree.from_sequences(deep)])
    layout = pack(tree, pad_to_multiple=2)
    whole = rank_row(layout, recurrence_width=4).model.recurrence
    shards = rank_row(layout, rank=0, num_ranks=2, recurrence_width=4).model.recurrence
    assert whole is not None and shards is not None and shards.runs.pieces
    return whole, shards


def _inputs(num_heads: int, key_dim: int, value_dim: int) -> list[Tensor]:
    """q, k, v, g, beta and dout of the whole row, in float32."""
    generator = torch.Generator().manual_seed(1)
    num_tokens = len(_rows()[0].real)

    def random(*shape: int) -> Tensor:
        return torch.randn(num_tokens, num_heads, *shape, generator=generator)

    q, k = (F.normalize(random(key_dim), dim=-1) for _ in range(2))
    return [q, k, random(value_dim), -random().abs(), random().sigmoid(), random(value_dim)]


def _run(rule: DeltaRule, inputs: list[Tensor], device: torch.device) -> list[Tensor]:
    """The outputs, all gradients, and the maps of a rank's pieces."""
    whole, shards = record_to_device(_rows(), device)
    *inputs, dout = (x.to(device) for x in inputs)
    inputs = [x.requires_grad_() for x in inputs]
    out = gated_delta_rule(*inputs, whole, rule=rule)
    gradients = torch.autograd.grad(out, inputs, dout.to(out.dtype))
    own = [x.detach()[: len(shards.real)] for x in inputs]
    return [out.detach(), *gradients, rule.of(*own, shards).maps(shards, added=True)]

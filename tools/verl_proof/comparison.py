"""How far our engine is from verl's own, and how far it may be in float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TOLERANCES = {
    # Log-probabilities are of order 5, entropies too: a few of their roundings, over four layers.
    "logprob_abs": 1e-5,
    "entropy_abs": 1e-5,
    # Absolute: a loss of advantages of both signs may be near 0.
    "loss_abs": 1e-6,
    # A norm is a sum of squares of one sign.
    "grad_norm_rel": 1e-6,
    "param_rel": 1e-6,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """What one engine has found, on all ranks."""

    output: dict[str, dict[int, torch.Tensor]]
    """Log-probabilities and entropies, by sample."""
    losses: list[float]
    """Of each optimizer step, the mean over data-parallel ranks, as verl's worker reports it."""
    grad_norms: list[float]
    parameters: dict[str, torch.Tensor]
    infer_tokens: int
    train_tokens: int
    """Of one pass."""
    train_microbatches: int
    """Of a data-parallel rank."""
    infer_seconds: float
    train_seconds: float
    """Of all passes."""

    @classmethod
    def read(cls, results: Path, world_size: int) -> Side:
        """What all ranks have saved."""
        # Written by this very run in its own temporary folder.
        ranks = [
            torch.load(results / f"{rank}.pt", weights_only=False) for rank in range(world_size)
        ]
        reporting = [rank for rank in ranks if "output" in rank]
        output: dict[str, dict[int, torch.Tensor]] = {"log_probs": {}, "entropy": {}}
        for rank in reporting:
            for name, rows in rank["output"].items():
                output[name].update(zip(rank["samples"], rows, strict=True))
        parameters: dict[str, torch.Tensor] = {}
        for rank in ranks:
            for name, value in rank["parameters"].items():
                if not torch.equal(parameters.setdefault(name, value), value):
                    raise RuntimeError(f"copies of {name} differ between ranks")
        by_step = zip(*(rank["losses"] for rank in reporting), strict=True)
        return cls(
            output=output,
            losses=[sum(losses) / len(losses) for losses in by_step],
            grad_norms=reporting[0]["grad_norms"],
            parameters=parameters,
            infer_tokens=sum(rank["infer_tokens"] for rank in ranks),
            train_tokens=sum(rank["train_tokens"] for rank in ranks),
            train_microbatches=max(rank["train_rows"] for rank in ranks),
            infer_seconds=max(rank["infer_seconds"] for rank in ranks),
            train_seconds=max(rank["train_seconds"] for rank in ranks),
        )


def compare(stock: Side, ours: Side) -> dict[str, Any]:
    """The report."""
    report: dict[str, Any] = {
        "logprob_abs": _largest(stock, ours, "log_probs"),
        "entropy_abs": _largest(stock, ours, "entropy"),
        "loss_abs": max(abs(a - b) for a, b in zip(stock.losses, ours.losses, strict=True)),
        "grad_norm_rel": _relative(stock.grad_norms, ours.grad_norms),
        "param_rel": _parameter_error(stock.parameters, ours.parameters),
    }
    # A NaN is not within any tolerance.
    report["ok"] = all(report[name] <= bound for name, bound in TOLERANCES.items())
    return report


def _largest(stock: Side, ours: Side, name: str) -> float:
    expected, found = stock.output[name], ours.output[name]
    if expected.keys() != found.keys():
        raise RuntimeError(f"{name}: the engines have output of different samples")
    differences = [(expected[i].double() - found[i].double()).abs() for i in expected]
    return float(torch.cat(differences).max())


def _relative(expected: list[float], found: list[float]) -> float:
    pairs = zip(expected, found, strict=True)
    return float(
        torch.tensor([abs(a - b) / max(abs(a), 1e-12) for a, b in pairs], dtype=torch.float64).max()
    )


def _parameter_error(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> float:
    """Relative L2 error of the parameter that is furthest off."""
    if expected.keys() != found.keys():
        raise RuntimeError(f"parameters differ: {sorted(expected.keys() ^ found.keys())}")
    errors = [
        (expected[name].double() - found[name].double()).norm() / expected[name].double().norm()
        for name in expected
    ]
    return float(torch.stack(errors).max())


def print_report(stock: Side, ours: Side, report: dict[str, Any]) -> None:
    """Tokens and time of each, and what was compared."""
    print(f"{'':<24}{'verl':>12}{'ours':>12}")
    for name, left, right in (
        ("tokens, log-probs", stock.infer_tokens, ours.infer_tokens),
        ("tokens, a train step", stock.train_tokens, ours.train_tokens),
    ):
        print(f"{name:<24}{left:>12,}{right:>12,}")
    for name, left, right in (
        ("seconds, log-probs", stock.infer_seconds, ours.infer_seconds),
        ("seconds, training", stock.train_seconds, ours.train_seconds),
    ):
        print(f"{name:<24}{left:>12.2f}{right:>12.2f}")
    print(f"{'largest difference':<24}{'found':>12}{'allowed':>12}")
    for name, bound in TOLERANCES.items():
        verdict = "OK" if report[name] <= bound else "FAILED"
        print(f"{name:<24}{report[name]:>12.1e}{bound:>12.0e}  {verdict}")

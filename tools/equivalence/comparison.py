"""How far the candidate is from the reference, and how far it may be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from equivalence.case import trained_tokens

if TYPE_CHECKING:
    import torch

# grad_rel and param_rel are relative L2 errors per parameter, the worst one counts. float64's are
# the project's promise; float32's and bfloat16's are the rounding of a few layers in that format.
TOLERANCES = {
    "float64": {"loss_rel": 1e-10, "logprob_abs": 1e-10, "grad_rel": 1e-10, "param_rel": 1e-8},
    "float32": {"loss_rel": 1e-4, "logprob_abs": 1e-4, "grad_rel": 1e-3, "param_rel": 1e-2},
    "bfloat16": {"loss_rel": 5e-2, "logprob_abs": 2e-1, "grad_rel": 1e-1, "param_rel": 5e-2},
}

_COMPARED = {
    "loss_rel": "loss, relative",
    "logprob_abs": "log-probabilities, absolute",
    "grad_rel": "gradients, relative, worst parameter",
    "param_rel": "parameters after the steps, relative",
}


def _relative_errors(
    candidate: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], floor: float
) -> list[tuple[str, float]]:
    """Relative L2 error of each parameter, worst first.

    A norm below `floor` times the norm of all parameters together counts as that much: gradients
    that are zero in exact arithmetic have no relative error.
    """
    if candidate.keys() != reference.keys():
        raise RuntimeError(f"parameters differ: {sorted(candidate.keys() ^ reference.keys())}")
    whole = sum(float(t.double().norm()) ** 2 for t in reference.values()) ** 0.5
    errors = []
    for name, expected in reference.items():
        difference = float((candidate[name].double() - expected.double()).norm())
        errors.append((name, difference / max(float(expected.double().norm()), floor * whole)))
    # A NaN sorts first: it is the worst.
    return sorted(errors, key=lambda item: (not np.isnan(item[1]), -item[1]))


def compare(reference: dict[str, Any], candidate: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The report, with a printed table of the worst parameters."""
    gradients = _relative_errors(candidate["gradients"], reference["gradients"], 1e-6)
    parameters = _relative_errors(candidate["parameters"], reference["parameters"], 1e-6)
    # np.max, unlike max, keeps a NaN.
    logprob_abs = float(np.max(np.abs(_logprob_differences(reference, candidate["logprobs"]))))
    loss_rel = max(
        abs(a - b) / max(abs(b), 1e-12)
        for kind in ("losses", "mtp_losses")
        for a, b in zip(candidate[kind], reference[kind], strict=True)
    )
    report = {
        "loss_rel": loss_rel,
        "logprob_abs": logprob_abs,
        "grad_rel": gradients[0][1],
        "param_rel": parameters[0][1],
    }
    report["ok"] = all(report[name] <= bound for name, bound in TOLERANCES[dtype].items())
    print(f"{'worst gradients':<64} relative error")
    for name, error in gradients[:5]:
        print(f"  {name:<62} {error:.2e}")
    print(f"{'worst parameters after the optimizer steps':<64} relative error")
    for name, error in parameters[:5]:
        print(f"  {name:<62} {error:.2e}")
    print_verdict(report, dtype)
    return report


def _logprob_differences(
    reference: dict[str, Any], found: dict[tuple[int, int], dict[int, float]]
) -> np.ndarray:
    """[trained tokens of all responses] log-probabilities of the candidate less the reference's."""
    differences = []
    groups, expected = reference["case"].groups, reference["logprobs"]
    if found.keys() != expected.keys():
        raise RuntimeError("the candidate has not run the responses that it has to run")
    for name, values in expected.items():
        trained = trained_tokens(groups[name[0]], name[1])
        if sorted(found[name]) != trained.tolist():
            raise RuntimeError(
                f"response {name}: the candidate has log-probabilities of other tokens than are "
                "trained on"
            )
        differences.append(np.array([found[name][t] for t in trained.tolist()]) - values[trained])
    return np.concatenate(differences)


def print_verdict(report: dict[str, Any], dtype: str) -> None:
    """What was compared, how far it may be apart in this format, and whether it is closer."""
    print(f"{'largest difference (' + dtype + ')':<44}{'found':>10}{'allowed':>10}")
    for name, bound in TOLERANCES[dtype].items():
        verdict = "OK" if report[name] <= bound else "FAILED"
        print(f"  {_COMPARED[name]:<42}{report[name]:>10.1e}{bound:>10.0e}  {verdict}")
    print("OK: all are within tolerance" if report["ok"] else "FAILED: see the rows above")

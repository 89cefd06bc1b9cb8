"""Weight gradients under `gradient_accumulation_fusion`, of weights that autograd multiplies."""

from __future__ import annotations

from torch import Tensor


def gradient_by_autograd(weight: Tensor) -> Tensor:
    """A parameter, to be used in place of itself where no Megatron layer uses it.

    Megatron's layers may add a weight's gradient to `main_grad` in their own backward; they then
    set the weight's `grad_added_to_main_grad`, and the hook of `DistributedDataParallel` drops what
    autograd left in `grad`. Only the start of a step resets the mark, so it would also drop the
    gradient of a later microbatch that is in `grad` alone. Here backward resets it, just before
    that hook runs.

    Args:
        weight: a parameter, used once in a microbatch.

    Returns:
        A view of all of it.
    """
    if not weight.requires_grad or not hasattr(weight, "grad_added_to_main_grad"):
        return weight
    view = weight.view_as(weight)

    def reset(gradient: Tensor) -> None:
        weight.grad_added_to_main_grad = False

    if view.requires_grad:  # not where gradients are off
        view.register_hook(reset)
    return view

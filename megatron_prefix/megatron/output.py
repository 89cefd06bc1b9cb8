"""Something else than logits out of a GPTModel, made of what its output layer takes.

For one call of the output layer its `forward` is lent, so that hooks of the layer run: Megatron's
data-parallel wrapper waits in such a hook for weights that are gathered while the model runs.

Since release 0.18 GPTModel hands its hidden states to an `output_processor`, which makes that call.
Earlier releases make it themselves, and take what it returns for logits: they swap its first two
dimensions.

Parameters, checkpoint keys and what the model returns otherwise are Megatron's own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_prefix.megatron.fused_gradients import gradient_by_autograd

Make = Callable[[Tensor, Tensor], Tensor]
"""Final hidden states [T, h], and this rank's rows of the output weight [V/tp, h] -> [N, ...].

T are all rows that the last layer puts out, on every tensor-parallel rank. Each of them contributes
a part of the hidden states' gradient, from its rows of the weight; the parts are added up behind.
"""


@functools.cache
def takes_output_processor() -> bool:
    """Whether this release's GPTModel hands its hidden states to a function of the caller."""
    return "output_processor" in inspect.signature(GPTModel.forward).parameters


def output_made_by(
    make: Make,
    call: Callable[..., Tensor],
    output_layer: ColumnParallelLinear,
    *,
    of_gpt_model: bool = True,
) -> Tensor:
    """What a model returns when `make` stands in place of its output layer.

    Args:
        make: called once, on the last pipeline stage.
        call: runs the model's forward pass, wrapped in Megatron's wrappers or not; hands on
            keyword arguments.
        output_layer: the model's.
        of_gpt_model: a HybridModel makes the call itself, in every release.

    Returns:
        [1, N, ...], in the dtype that `make` returns, but that Megatron's `Float16Module` widens
        half precision.
    """
    if of_gpt_model and takes_output_processor():
        return call(output_processor=functools.partial(_process, make))
    with _forward_lent(output_layer, make):
        return call()


def _process(
    make: Make,
    *,
    hidden_states: Tensor,
    output_layer: ColumnParallelLinear,
    output_weight: Tensor | None,
    **_: Any,
) -> Tensor:
    """GPTModel's `output_processor`, which is given more than is needed here."""
    with _forward_lent(output_layer, make):
        output, _ = output_layer(hidden_states, weight=output_weight)
    return output.transpose(0, 1)


@contextlib.contextmanager
def _forward_lent(output_layer: ColumnParallelLinear, make: Make) -> Iterator[None]:
    """Within the block the layer returns [N, 1, ...], made by `make`."""

    def forward(
        input_: Tensor, weight: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        return _made(make, output_layer, input_, weight)[:, None], None

    # An instance attribute comes before the class's method.
    output_layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        del output_layer.__dict__["forward"]


def _made(
    make: Make, output_layer: ColumnParallelLinear, hidden_states: Tensor, weight: Tensor | None
) -> Tensor:
    """hidden_states [T, 1, h], or [T/tp, 1, h] under sequence parallelism -> [N, ...].

    A weight is given where it is another layer's: that of tied embeddings.
    """
    weight = gradient_by_autograd(output_layer.weight if weight is None else weight)
    return make(all_rows(hidden_states, output_layer), weight)


def all_rows(hidden_states: Tensor, output_layer: ColumnParallelLinear) -> Tensor:
    """[T, 1, h], or [T/tp, 1, h] under sequence parallelism -> [T, h] on every rank, each of which
    has a part of its gradient."""
    if output_layer.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=True
        )
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden_states)
    return hidden[:, 0]

"""Log-probabilities of labels from hidden states, over a vocabulary that is split over ranks.

The logits of all positions are never held at once. Forward and backward walk over chunks of
positions; backward computes each chunk's logits again. What is kept in between is one number per
position (two with entropy).

Legend: N positions, h hidden size, V/tp rows of the output weight on this rank, n positions of a
chunk, v rows of the output weight that stand for a token of the vocabulary (v = V/tp without
vocab_size).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

_WEIGHT_ROWS = 8192
"""Rows of the weight that are widened at a time, and rows of its gradient that one matrix product
in a narrow dtype yields at a time."""


def vocab_parallel_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    with_entropy: bool = False,
    vocab_size: int | None = None,
    wide_products: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden weight^T / temperature) at the labels, and the entropy of that softmax.

    Collectives: two all-reduces of one and of two (three with entropy) numbers per position in
    forward, none in backward; none at all for N = 0. Every rank of `group` must call it with the
    same hidden, labels and options, and gets the same result.

    Gradients: those of `hidden` are this rank's share, which comes from its rows of the weight;
    the caller's mapping into the tensor-parallel region (Megatron's
    copy_to_tensor_model_parallel_region, or gather_from_sequence_parallel_region with
    tensor_parallel_output_grad=True) adds them up over the ranks. Those of `weight` are complete,
    added up over the chunks in float32 or wider. Both outputs can be differentiated, once.

    Memory beside the inputs and their gradients: one chunk of logits [n, V/tp] in float32 or
    wider, two with entropy, and for inputs narrower than float32 a chunk in their dtype; in
    backward the weight's gradient in float32 or wider.

    Args:
        hidden: [N, h] final hidden states at the positions that predict the labels.
        weight: [V/tp, h] this rank's rows of the output weight, in hidden's dtype: rank i of the
            group holds the i-th V/tp tokens of the vocabulary.
        labels: [N] int64 tokens of the whole vocabulary. A label outside it gives NaN.
        group: the ranks that the vocabulary is split over; None if it is not.
        temperature: divides the logits.
        chunk_size: n, at least 1.
        with_entropy: also return the entropy.
        vocab_size: tokens of the vocabulary without the padding that makes it divisible: the
            weight's rows from there on get probability 0 and no gradient. None: they take part
            in the softmax, as they do in Megatron's own cross-entropy.
        wide_products: for inputs narrower than float32, multiply in float32, forward and backward,
            so that logits and their gradients are not rounded to the inputs' dtype. Blocks of the
            weight's rows are widened one after the other.

    Returns:
        Log-probabilities [N] and entropies [N] (None unless asked for), in nats, in hidden's
        dtype but at least float32.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an option out of its range.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    _check(hidden, weight, labels)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size!r}: set at least 1")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature!r}: set a number above 0")
    padded = ranks * weight.size(0)
    if vocab_size is not None and not 1 <= vocab_size <= padded:
        raise ValueError(
            f"vocab_size={vocab_size!r}: the output weight has {padded} rows, set 1 to {padded}"
        )
    vocab_size = padded if vocab_size is None else vocab_size

    start = rank * weight.size(0)
    softmax = _Softmax(
        group=group,
        start=start,
        columns=min(max(vocab_size - start, 0), weight.size(0)),
        vocab_size=vocab_size,
        temperature=temperature,
        chunk_size=chunk_size,
        wide_products=wide_products,
    )
    return _VocabParallelLogProbs.apply(hidden, weight, labels, softmax, with_entropy)


@dataclass(frozen=True, kw_only=True)
class _Softmax:
    """This rank's part of the softmax: its columns and how they are computed."""

    group: dist.ProcessGroup | None
    start: int
    """Token of the first column."""
    columns: int
    """v: this rank's tokens of the vocabulary; 0 where all its rows are padding."""
    vocab_size: int
    temperature: float
    chunk_size: int
    wide_products: bool

    def chunks(self, num_positions: int) -> Iterator[slice]:
        for begin in range(0, num_positions, self.chunk_size):
            yield slice(begin, min(begin + self.chunk_size, num_positions))

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[n, v] in float32 or wider, safe to overwrite."""
        logits = output_logits(hidden, weight[: self.columns], wide_products=self.wide_products)
        logits = logits.to(_wide(hidden.dtype))
        return logits if self.temperature == 1 else logits.div_(self.temperature)

    def locate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Which labels are among this rank's columns, and the column to read (0 if not)."""
        column = labels - self.start
        here = (column >= 0) & (column < self.columns)
        return here, column.where(here, 0)

    def all_reduce(self, values: Tensor, op: dist.ReduceOp) -> None:
        if self.group is not None and values.numel() > 0:
            dist.all_reduce(values, op=op, group=self.group)


def output_logits(hidden: Tensor, weight: Tensor, *, wide_products: bool) -> Tensor:
    """hidden [n, h] times weight [v, h], [n, v], safe to overwrite.

    Args:
        hidden, weight: of one dtype.
        wide_products: see `vocab_parallel_log_probs`; the result is then float32 or wider.
    """
    wide = _wide(hidden.dtype)
    if not wide_products or hidden.dtype == wide:
        return hidden @ weight.t()
    hidden = hidden.to(wide)
    return torch.cat([hidden @ rows.to(wide).t() for rows in weight.split(_WEIGHT_ROWS)], dim=1)


def _through(grad_logits: Tensor, weight: Tensor) -> Tensor:
    """grad_logits [n, v] times weight [v, h], in the dtype of grad_logits."""
    if grad_logits.dtype == weight.dtype:
        return grad_logits @ weight
    total = grad_logits.new_zeros(grad_logits.size(0), weight.size(1))
    for start in range(0, weight.size(0), _WEIGHT_ROWS):
        rows = weight[start : start + _WEIGHT_ROWS].to(grad_logits.dtype)
        total.addmm_(grad_logits[:, start : start + _WEIGHT_ROWS], rows)
    return total


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        softmax: _Softmax,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        maximum, sums = _local_sums(hidden, weight, labels, softmax, with_entropy)
        shift = maximum.clone()
        softmax.all_reduce(maximum, dist.ReduceOp.MAX)
        shift.sub_(maximum)

        # From each rank's own maximum to the common one: z = z_local + shift.
        sum_exp, label_logit, *sum_z_exp = sums.unbind()
        for weighted in sum_z_exp:
            weighted.addcmul_(sum_exp, shift).mul_(shift.exp())
        sum_exp.mul_(shift.exp())
        here, _ = softmax.locate(labels)
        label_logit.add_(shift).masked_fill_(~here, 0)
        softmax.all_reduce(sums, dist.ReduceOp.SUM)

        log_sum_exp = sum_exp.log()
        log_probs = label_logit - log_sum_exp
        log_probs.masked_fill_((labels < 0) | (labels >= softmax.vocab_size), math.nan)
        entropy = log_sum_exp - sum_z_exp[0] / sum_exp if with_entropy else None

        ctx.softmax = softmax
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, labels, maximum + log_sum_exp, entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad_log_probs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, labels, normaliser, entropy = ctx.saved_tensors
        softmax: _Softmax = ctx.softmax
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(normaliser)
        own_rows = weight[: softmax.columns]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = None
        if wants_weight:
            grad_weight = torch.zeros_like(weight, dtype=_wide(weight.dtype))

        for chunk in softmax.chunks(hidden.size(0)):
            grad_logits = _grad_logits(
                softmax.logits(hidden[chunk], weight).sub_(normaliser[chunk, None]),
                softmax.locate(labels[chunk]),
                grad_log_probs[chunk],
                None if grad_entropy is None else (grad_entropy[chunk], entropy[chunk]),
            )
            if softmax.temperature != 1:
                grad_logits.div_(softmax.temperature)
            factor = hidden[chunk]
            if softmax.wide_products:
                factor = factor.to(grad_logits.dtype)
            grad_logits = grad_logits.to(factor.dtype)
            if wants_hidden:
                grad_hidden[chunk] = _through(grad_logits, own_rows)
            if wants_weight:
                _add_product(grad_weight[: softmax.columns], grad_logits, factor)
            del grad_logits  # before the next chunk's are made
        if wants_weight:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None


def _local_sums(
    hidden: Tensor, weight: Tensor, labels: Tensor, softmax: _Softmax, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """What this rank's columns contribute, with z = logit - the maximum over these columns.

    Returns:
        The maximum [N], and [2 or 3, N]: sum of exp(z), the label's z (anything if the label is
        not here), and with entropy the sum of z exp(z).
    """
    dtype = _wide(hidden.dtype)
    # Where a rank has no columns its maximum must lose against any other, and stay finite.
    maximum = hidden.new_full((hidden.size(0),), torch.finfo(dtype).min, dtype=dtype)
    sums = hidden.new_zeros((3 if with_entropy else 2, hidden.size(0)), dtype=dtype)
    if softmax.columns == 0:
        return maximum, sums
    for chunk in softmax.chunks(hidden.size(0)):
        _, column = softmax.locate(labels[chunk])
        z = softmax.logits(hidden[chunk], weight)
        maximum[chunk] = z.amax(dim=-1)
        z.sub_(maximum[chunk, None])
        sums[1, chunk] = z.gather(1, column[:, None])[:, 0]
        exp = z.exp() if with_entropy else z.exp_()
        sums[0, chunk] = exp.sum(dim=-1)
        if with_entropy:
            sums[2, chunk] = z.mul_(exp).sum(dim=-1)
        del z, exp  # before the next chunk's logits are made
    return maximum, sums


def _grad_logits(
    log_p: Tensor,
    located_labels: tuple[Tensor, Tensor],
    grad_log_probs: Tensor,
    grad_and_entropy: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Gradient of the scaled logits [n, v], written over `log_p`, the log-probabilities.

    With g and e the gradients of log-probability and entropy H, p the softmax, y the label:

        g ([j = y] - p_j) - e p_j (log p_j + H)
    """
    if grad_and_entropy is None:
        grad = log_p.exp_().mul_(-grad_log_probs[:, None])
    else:
        grad_entropy, entropy = grad_and_entropy
        p = log_p.exp()
        grad = log_p.add_(entropy[:, None]).mul_(grad_entropy[:, None])
        grad.add_(grad_log_probs[:, None]).mul_(p).neg_()
    if grad.size(1) > 0:
        here, column = located_labels
        row = torch.arange(grad.size(0), device=grad.device)
        grad[row, column] += grad_log_probs.masked_fill(~here, 0)
    return grad


def _add_product(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """total [v, h] += grad_logits^T hidden, where total may be wider than the factors.

    A product in a narrow dtype is formed a block of rows at a time, so that no second buffer as
    large as the weight is needed.
    """
    if total.dtype == hidden.dtype:
        total.addmm_(grad_logits.t(), hidden)
        return
    for rows in range(0, total.size(0), _WEIGHT_ROWS):
        block = slice(rows, rows + _WEIGHT_ROWS)
        total[block] += grad_logits[:, block].t() @ hidden


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.size(1) != weight.size(1):
        raise ValueError(
            f"hidden has shape {list(hidden.shape)} and weight {list(weight.shape)}: they must be "
            "[N, h] and [V/tp, h]"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"labels have shape {list(labels.shape)}: give one label per row of hidden, "
            f"[{hidden.size(0)}]"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: they must agree")

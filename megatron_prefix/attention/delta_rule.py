"""The gated delta rule (arXiv 2412.06464) over a packed row with shared prefixes, in torch.

For each token, with a state S [K, V] of a head that runs along its path:

    S = exp(g) S;    S = S + beta k (v - k^T S)^T;    out = S^T q / sqrt(K)

A chunk's tokens are computed together from the state before it, and waves of chunks one after the
other (see `layout.recurrence`). Branches of the tree begin with the same state, whose gradient adds
up theirs. Only the rows are kept for backward; chunks and states are computed again there.

Shapes: T tokens, H heads, K and V the sizes of keys and values; C chunks of c tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_prefix.layout import Recurrence


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, row: Recurrence[Tensor]
) -> Tensor:
    """The outputs of a row's tokens.

    Args:
        q, k: [T, H, K], normalised as the layer does; v: [T, H, V].
        g: [T, H] logarithms of the decay, at most 0, in float32 or wider.
        beta: [T, H] how much of a key's value is written, in [0, 1].
        row: the row's paths.

    Returns:
        [T, H, V] in v's dtype; 0 on padding.
    """
    return checkpoint(_rule, q, k, v, g, beta, row, use_reentrant=False, preserve_rng_state=False)


def _rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, row: Recurrence[Tensor]
) -> Tensor:
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k, values, g, beta = (_in_chunks(x.to(wide), row.chunks) for x in (q, k, v, g, beta))
    q = q * q.shape[-1] ** -0.5
    size = g.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=g.device).tril(-1)
    # [C, H, c, c]: the decay from each token of a chunk to each later one. Sums of what lies
    # between the two: differences of sums from the chunk's beginning would lose digits.
    between = torch.where(later, g[..., :, None], 0).cumsum(-2)
    decay = between.masked_fill(later.mT, float("-inf")).exp()
    g = g.cumsum(-1)
    written = k * beta[..., None]
    # What a chunk's tokens write depends on what those before them in it have written.
    among = torch.eye(size, dtype=wide, device=g.device) + (written @ k.mT * decay).tril(-1)
    solved = torch.linalg.solve_triangular(
        among,
        torch.cat((values * beta[..., None], written * g.exp()[..., None]), dim=-1),
        upper=False,
        unitriangular=True,
    )
    new, read = solved.split([values.shape[-1], k.shape[-1]], dim=-1)
    scores, queries = q @ k.mT * decay, q * g.exp()[..., None]
    keys = k * decay[..., -1, :, None]
    kept = g[..., -1, None, None].exp()
    outs, state = [], None
    for wave in row.waves:
        here = wave.chunks
        of_tokens = new[here]
        if state is not None:
            state = state[wave.before]
            of_tokens = of_tokens - read[here] @ state
        out = scores[here] @ of_tokens
        added = keys[here].mT @ of_tokens
        if state is None:
            state = added
        else:
            out = out + queries[here] @ state
            state = state * kept[here] + added
        outs.append(out)
    out = torch.cat(outs).transpose(1, 2).flatten(0, 1)[row.place]
    return (out * row.real[:, None, None]).to(v.dtype)


def _in_chunks(x: Tensor, chunks: Tensor) -> Tensor:
    """[T, H, ...] -> [C, H, c, ...], 0 where a chunk is filled up."""
    with_zeros = torch.cat((x, x.new_zeros(1, *x.shape[1:])))
    return with_zeros[chunks].transpose(1, 2)


def causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, row: Recurrence[Tensor]
) -> Tensor:
    """[T, d] of each channel, the sum of a token's last inputs along its path, weighted.

    Only x is kept for backward.

    Args:
        x: [T, d] inputs.
        weight: [d, width], that of the token's own input last.
        bias: [d]
    """
    return checkpoint(
        _convolution, x, weight, bias, row, use_reentrant=False, preserve_rng_state=False
    )


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, row: Recurrence[Tensor]) -> Tensor:
    with_zeros = torch.cat((x, x.new_zeros(1, x.shape[1])))
    out = sum(with_zeros[row.inputs[:, i]] * weight[:, i] for i in range(weight.shape[1]))
    return out if bias is None else out + bias

"""One token out of a row of logits: temperature, top-p, and randomness that no layout changes.

A response's random numbers depend on the seed, the step, the prompt's and its own index only, and
a token is where the cumulated probability first exceeds its number. So how prompts are divided over
ranks and batches changes nothing but the rounding of the logits.

Legend: n rows of logits, V tokens of the vocabulary, k draws from each row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 21
"""Logits that are worked on at once: some tensors of this size exist in float64."""


def response_uniforms(
    *, seed: int, step: int, prompt: int, response: int, length: int
) -> np.ndarray:
    """[length] float64 in [0, 1): one random number for each token of a response.

    Philox (a counter-based generator, Salmon et al. 2011) is keyed by seed and step and counts from
    the indices of prompt and response, so that every response has numbers of its own.
    """
    words = 1 << 64
    generator = np.random.Philox(key=[seed % words, step % words], counter=[0, 0, response, prompt])
    return np.random.Generator(generator).random(length)


def draw_tokens(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """Draw k tokens from each row's distribution.

    Args:
        logits: [n, V], of the tokens that may come out.
        uniforms: [n, k] float64 in [0, 1), one for each draw.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: draws come from the smallest set of most likely tokens whose probabilities add up to
            at least this; it always holds one token.

    Returns:
        tokens [n, k] int64 and their log-probabilities [n, k] float64: at `temperature` (at 1 where
        that is 0), over the whole vocabulary whatever `top_p` is. That is what the objective calls
        a token's old log-probability.
    """
    rows = max(1, _BLOCK_ELEMENTS // logits.size(1))
    blocks = [
        _draw_block(block, numbers, temperature, top_p)
        for block, numbers in zip(logits.split(rows), uniforms.split(rows), strict=True)
    ]
    tokens, logprobs = zip(*blocks, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _draw_block(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    logits = logits.to(torch.float64)
    if temperature not in (0, 1):
        logits = logits / temperature
    logprobs = logits.log_softmax(dim=-1)
    if temperature == 0:
        tokens = logprobs.argmax(dim=-1, keepdim=True).expand_as(uniforms)
    else:
        probabilities = logprobs.exp()
        if top_p < 1:
            probabilities = _nucleus(probabilities, top_p)
        tokens = _invert(probabilities, uniforms)
    return tokens, logprobs.gather(1, tokens)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """[n, V] with 0 outside the smallest set of likeliest tokens that holds `top_p`."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    # A token belongs to the set while those before it hold less.
    outside = ordered.cumsum(dim=-1) - ordered >= top_p
    outside[:, 0] = False
    return torch.zeros_like(probabilities).scatter_(1, order, ordered.masked_fill(outside, 0))


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first token [n, k] at which the cumulated weights exceed that part of their sum."""
    cumulated = weights.cumsum(dim=-1)
    total = cumulated[:, -1:].contiguous()
    tokens = torch.searchsorted(cumulated, uniforms * total, right=True)
    # Rounding may carry the product up to the sum itself; the last token with weight is there.
    return tokens.minimum(torch.searchsorted(cumulated, total))

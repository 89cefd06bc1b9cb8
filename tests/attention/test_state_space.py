"""The state space of Mamba-2 over rows with shared prefixes, against one token after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_prefix.attention.recurrent_rule import apply_rule, apply_rule_to_root
from megatron_prefix.attention.state_space import StateSpaceRule
from megatron_prefix.device_copy import record_to_device
from megatron_prefix.layout import PrefixTree, Recurrence, pack, rank_row
from megatron_prefix.layout.packing import PackedLayout

RULE = StateSpaceRule()
HEADS, GROUPS, KEYS, VALUES = 4, 2, 5, 3


def forest(rng: np.random.Generator) -> PackedLayout:
    """Prompts of one token and of several chunks, segments of one token, four levels."""
    groups = [
        (rng.integers(0, 9, n), [rng.integers(0, 9, m) for m in (3, 1, 70)]) for n in (150, 1)
    ]
    stem = rng.integers(0, 9, 7)
    deep = [np.concatenate([stem[:n], rng.integers(0, 9, 3)]) for n in (2, 5, 7, 7)]
    tree = PrefixTree.concat([PrefixTree.from_groups(groups), PrefixTree.from_sequences(deep)])
    return pack(tree, pad_to_multiple=4)


def row_of(layout: PackedLayout, rank: int = 0, num_ranks: int = 1) -> Recurrence[Tensor]:
    row = rank_row(layout, rank=rank, num_ranks=num_ranks, recurrence_width=4)
    return record_to_device(row.model.recurrence, "cpu")


def random_inputs(num_tokens: int) -> list[Tensor]:
    sizes = [(GROUPS, KEYS), (GROUPS, KEYS), (HEADS, VALUES), (HEADS,), (HEADS,)]
    c, b, x, g, dt = (torch.randn(num_tokens, *n, dtype=torch.float64) for n in sizes)
    return [y.requires_grad_() for y in (c, b, x, -g.abs(), dt.abs())]


def token_by_token(inputs: list[Tensor], rows: list[int]) -> Tensor:
    c, b, x, g, dt = (y[rows] for y in inputs)
    c, b = (y.repeat_interleave(HEADS // GROUPS, dim=1) for y in (c, b))
    state, outs = torch.zeros(HEADS, KEYS, VALUES, dtype=torch.float64), []
    for t in range(len(rows)):
        written = torch.einsum("hk,hv->hkv", b[t], dt[t][:, None] * x[t])
        state = g[t].exp()[:, None, None] * state + written
        outs.append(torch.einsum("hk,hkv->hv", c[t], state))
    return torch.stack(outs)


def test_a_row_gives_what_every_sequence_gives_alone(rng: np.random.Generator) -> None:
    layout = forest(rng)
    inputs = random_inputs(layout.num_tokens)
    out = apply_rule(RULE, tuple(inputs), row_of(layout))
    real = layout.num_tokens - layout.num_padding
    assert not out[real:].any()
    weights = torch.randn_like(out)
    loss = (out * weights).sum()
    expected = 0
    for segment in layout.segments:
        path, above = list(range(segment.start, segment.start + segment.length)), segment.parent
        while above >= 0:
            other = layout.segments[above]
            path = [*range(other.start, other.start + other.length), *path]
            above = other.parent
        alone = token_by_token(inputs, path)[-segment.length :]
        here = slice(segment.start, segment.start + segment.length)
        torch.testing.assert_close(out[here], alone, rtol=1e-12, atol=1e-12)
        expected = expected + (alone * weights[here]).sum()
    found = torch.autograd.grad(loss, inputs)
    for gradient, other in zip(found, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("rank", [0, 1])
def test_maps_of_pieces_say_what_these_make_of_any_state(
    rng: np.random.Generator, rank: int
) -> None:
    row = row_of(forest(rng), rank, 2)
    assert row.states is not None and row.runs.pieces
    computed = RULE.of(*random_inputs(len(row.real)), row)
    begins = torch.randn(row.states.begins_of_ranks[rank], HEADS, KEYS, VALUES, dtype=torch.float64)
    of_pieces = row.runs.levels[0].before[: row.runs.pieces]
    before = torch.cat((begins, torch.zeros_like(begins[:1])))[of_pieces]
    _, ends, _ = computed.read(row, begins)
    maps = computed.maps(row, added=True)
    assert maps.shape[-1] == 1 + VALUES
    torch.testing.assert_close(maps[..., :1], computed.maps(row, added=False))
    torch.testing.assert_close(ends, maps[..., :1] * before + maps[..., 1:], rtol=1e-12, atol=1e-12)


def test_single_steps_go_on_from_the_state_behind_a_row(rng: np.random.Generator) -> None:
    inputs = [y.detach() for y in random_inputs(70)]
    expected = token_by_token(inputs, list(range(70)))
    layout = pack(PrefixTree.from_sequences([rng.integers(0, 9, 67)]))
    first, state = apply_rule_to_root(RULE, tuple(y[:66] for y in inputs), row_of(layout))
    assert layout.num_tokens == 66
    state = state[None].clone()
    outs = [RULE.step(*(y[t : t + 1] for y in inputs), state) for t in range(66, 70)]
    torch.testing.assert_close(torch.cat((first, *outs)), expected, rtol=1e-12, atol=1e-12)

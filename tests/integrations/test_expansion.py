"""Rows given to all that share them, and gradients added up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prefix.integrations import expansion
from megatron_prefix.integrations.expansion import Expansion, expand

CPU = torch.device("cpu")


@given(st.lists(st.integers(0, 6), max_size=20), st.data())
def test_values_and_gradients_are_those_of_an_index_select(
    rows: list[int], data: st.DataObject
) -> None:
    ignored = np.array([data.draw(st.booleans()) for _ in rows], dtype=bool)
    values = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    plan = Expansion.of(np.array(rows, dtype=np.int64), 7, ignored=ignored)
    found = expand(values, plan.to(CPU))
    expected = values[torch.tensor(rows, dtype=torch.int64)]
    assert torch.equal(found, expected)
    weights = torch.randn_like(expected)
    weights_without = weights * torch.from_numpy(~ignored)[:, None]
    (gradient,) = torch.autograd.grad(found, values, weights)
    (wanted,) = torch.autograd.grad(expected, values, weights_without)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-14)


def test_sums_are_wider_than_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 times 1 and one 256: the sum is not reached by additions in bfloat16."""
    monkeypatch.setattr(expansion, "_SUMMED_AT_ONCE", 1)
    values = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    rows = np.array([1] * 257 + [0] * 2)
    gradient = torch.ones(259, 1, dtype=torch.bfloat16)
    gradient[0] = 256
    found = expand(values, Expansion.of(rows, 2).to(CPU))
    found.backward(gradient)
    assert values.grad.flatten().tolist() == [2, 512]

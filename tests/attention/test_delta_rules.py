"""What computes the gated delta rule: the choice, its check, and a call for each level of a row."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_prefix.attention.delta_rule import gated_delta_rule
from megatron_prefix.attention.delta_rule_check import check_delta_rule, rule_errors
from megatron_prefix.attention.delta_rules import (
    FlashLinearAttentionRule,
    RuleInputs,
    TorchRule,
    fla_rule,
    select_delta_rule,
)
from megatron_prefix.attention.self_check import KernelCheckError
from megatron_prefix.device_copy import record_to_device
from megatron_prefix.layout import PrefixTree, Recurrence, pack, rank_row

UNDER_INTERPRETER = Path(__file__).with_name("fla_under_interpreter.py")
GPU = torch.device("cuda")


def token_by_token(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """What flash-linear-attention's function is documented to return, by the equations."""
    assert output_final_state
    outs, ends = [], []
    for number, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        state = v.new_zeros(k.shape[2], k.shape[3], v.shape[3])
        if initial_state is not None:
            state = initial_state[number].to(v.dtype)
        for t in range(start, stop):
            state = g[0, t].exp()[:, None, None] * state
            change = beta[0, t][:, None] * (v[0, t] - torch.einsum("hk,hkv->hv", k[0, t], state))
            state = state + k[0, t][:, :, None] * change[:, None]
            outs.append(scale * torch.einsum("hk,hkv->hv", q[0, t], state))
        ends.append(state)
    return torch.stack(outs)[None], torch.stack(ends)


def random_row(rng: np.random.Generator, rank: int, num_ranks: int) -> Recurrence[Tensor]:
    """A forest with prompts of one token, and prompts that are long enough to be sharded."""
    groups = [(rng.integers(0, 9, n), [rng.integers(0, 9, m) for m in (3, 1, 6)]) for n in (40, 1)]
    stem = rng.integers(0, 9, 7)
    deep = [np.concatenate([stem[:n], rng.integers(0, 9, 3)]) for n in (2, 5, 7, 7)]
    tree = PrefixTree.concat([PrefixTree.from_groups(groups), PrefixTree.from_sequences(deep)])
    row = rank_row(
        pack(tree, pad_to_multiple=2 * num_ranks),
        rank=rank,
        num_ranks=num_ranks,
        recurrence_width=4,
    )
    return record_to_device(row.model.recurrence, "cpu")


def results(rule: Any, row: Recurrence[Tensor], inputs: list[Tensor], begins: Tensor) -> list[Any]:
    """What was read from given states, its gradients, and the maps."""
    computed = rule.of(*inputs, row)
    read = computed.read(row, begins)
    generator = torch.Generator().manual_seed(5)
    loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in read)
    gradients = torch.autograd.grad(loss, [*inputs, begins], materialize_grads=True)
    maps = [computed.maps(row, added=added) for added in (True, False)]
    return [*read, *gradients, *maps]


def later_row(rng: np.random.Generator) -> Recurrence[Tensor]:
    """A row of a series, whose root has run in an earlier row."""
    tree = PrefixTree.from_groups([(rng.integers(0, 9, 5), [[1] * 3, [2], [3] * 6])])
    row = rank_row(pack(tree, pad_to=12, root_elsewhere=True), recurrence_width=4)
    return record_to_device(row.model.recurrence, "cpu")


@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 1), (0, 2), (1, 2), (0, 0)])
def test_a_call_for_each_level_gives_what_chunks_give(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, rank: int, num_ranks: int
) -> None:
    monkeypatch.setattr(fla_rule, "_function", lambda: token_by_token)
    # The states would be float32.
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    fla_rule._takes_host_bounds.cache_clear()
    row = random_row(rng, rank, num_ranks) if num_ranks else later_row(rng)
    num_begins = int(not num_ranks)
    if row.states is not None:
        num_begins = row.states.begins_of_ranks[rank]
    assert (row.runs.pieces > 0) == (num_ranks > 1)
    assert len(row.runs.levels) > 1 or num_begins

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    size = (len(row.real), 2)
    inputs = [random(*size, 5), random(*size, 5), random(*size, 3), -random(*size).abs()]
    inputs = [x.requires_grad_() for x in (*inputs, random(*size).sigmoid())]
    begins = random(num_begins, 2, 5, 3).requires_grad_()
    expected = results(TorchRule(), row, inputs, begins)
    found = results(FlashLinearAttentionRule(), row, inputs, begins)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value.double(), other, rtol=1e-9, atol=1e-9)
    fla_rule._takes_host_bounds.cache_clear()


def test_a_rank_without_tokens_calls_nothing() -> None:
    layout = pack(PrefixTree.from_sequences([]), pad_to=4)
    row = record_to_device(rank_row(layout, recurrence_width=4).model.recurrence, "cpu")
    inputs = [torch.randn(4, 2, *n, requires_grad=True) for n in ((5,), (5,), (3,), (), ())]
    out = gated_delta_rule(*inputs, row, rule=FlashLinearAttentionRule())
    out.sum().backward()
    assert out.shape == (4, 2, 3) and not out.any()
    assert not any(x.grad.any() for x in inputs)


@pytest.mark.skipif(
    importlib.util.find_spec("fla") is None, reason="flash-linear-attention is not installed"
)
def test_flash_linear_attention_computes_the_rule_under_tritons_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", UNDER_INTERPRETER],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "float32; out " in done.stdout and "float16; out " in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_heads", "key_dim", "value_dim"), [(4, 128, 128), (3, 64, 32)])
def test_flash_linear_attention_computes_the_rule_on_a_gpu(
    dtype: torch.dtype, num_heads: int, key_dim: int, value_dim: int
) -> None:
    rule = FlashLinearAttentionRule()
    reason = rule.unsupported(RuleInputs(device=GPU, dtype=dtype, key_dim=key_dim))
    if reason is not None:
        pytest.skip(reason)
    sizes = {"num_heads": num_heads, "key_dim": key_dim, "value_dim": value_dim}
    check_delta_rule(rule, device=GPU, dtype=dtype, **sizes)


def test_the_cpu_has_torch_and_names_why_not_another(caplog: pytest.LogCaptureFixture) -> None:
    cpu = {"device": "cpu", "dtype": torch.bfloat16, "key_dim": 128}
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert isinstance(select_delta_rule(None, **cpu), TorchRule)
    assert caplog.text.count("delta rule torch for cpu") == 1
    assert "(flash_linear_attention: it needs a GPU)" in caplog.text
    with pytest.raises(ValueError, match=r"'flash_linear_attention' cannot .* it needs a GPU\. .*"):
        select_delta_rule("flash_linear_attention", **cpu)
    with pytest.raises(ValueError, match="unknown kernel 'fast' of the delta rule: choose one of"):
        select_delta_rule("fast", **cpu)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"dtype": torch.float32}, "it takes bfloat16 and float16"),
        ({"key_dim": 300}, "its keys have at most 256 channels, not 300"),
        ({"deterministic": True}, "two runs may differ"),
    ],
)
def test_what_flash_linear_attention_does_not_compute(inputs: dict[str, Any], reason: str) -> None:
    fits = {"device": GPU, "dtype": torch.bfloat16, "key_dim": 128}
    assert reason in FlashLinearAttentionRule().unsupported(RuleInputs(**{**fits, **inputs}))


@pytest.mark.parametrize(
    ("triton", "capability", "tilelang", "refused"),
    [
        ("3.3.1", 9, None, False),
        ("3.4.0", 9, None, True),
        ("3.7.0+git1234", 9, None, True),
        ("3.7.0", 9, object(), False),
        ("3.7.0", 10, None, False),
        ("3.7.1", 9, None, False),
    ],
)
def test_releases_of_triton_whose_backward_is_wrong_on_hopper_are_told_before_a_run(
    monkeypatch: pytest.MonkeyPatch, triton: str, capability: int, tilelang: object, refused: bool
) -> None:
    monkeypatch.setattr(fla_rule, "_function", lambda: select_delta_rule)
    monkeypatch.setattr(fla_rule, "version", lambda _: triton)
    monkeypatch.setattr(fla_rule.importlib.util, "find_spec", lambda _: tilelang)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (capability, 0))
    fits = RuleInputs(device=GPU, dtype=torch.bfloat16, key_dim=128)
    reason = FlashLinearAttentionRule().unsupported(fits)
    assert (reason is not None) == refused
    assert reason is None or reason.startswith(f"Triton {triton[:5]} compiles its backward wrongly")


class _Wrong:
    name = "wrong"

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def of(self, q: Tensor, *inputs: Any) -> Any:
        if not self.factor:
            raise RuntimeError("no kernel image\nsecond line")
        return TorchRule().of(q * self.factor, *inputs)


def test_a_wrong_rule_is_refused_with_what_to_set() -> None:
    sizes = {"device": "cpu", "num_heads": 2, "key_dim": 8, "value_dim": 4}
    check_delta_rule(_Wrong(1.0), dtype=torch.bfloat16, **sizes)
    for dtype, factor, message in (
        (torch.bfloat16, 1.05, r"is wrong: out is off by 5\.\de-02 .*; dq is off"),
        (torch.float32, 1.001, r"is wrong: out is off by 1\.\de-03"),
        (torch.float32, 0.0, r"fails with RuntimeError: no kernel image\. It was compared"),
    ):
        with pytest.raises(KernelCheckError, match=message) as error:
            check_delta_rule(_Wrong(factor), dtype=dtype, **sizes)
        assert "Set training.delta_rule_kernel" in str(error.value)
    sizes["device"] = torch.device("cpu")
    assert max(rule_errors(TorchRule(), dtype=torch.float32, **sizes).values()) < 1e-5

"""Chunked, vocabulary-parallel log-probabilities against one plain log_softmax in float64."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_prefix.objective import log_probs, vocab_parallel_log_probs
from tests.distributed import run_distributed

N, HIDDEN, VOCAB = 13, 5, 12

# float64, numbers of about 1
EXACT = {"rtol": 0, "atol": 1e-12}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Options of one call, and which of its outputs the loss reads."""

    num_positions: int = N
    chunk_size: int = 4
    temperature: float = 1.0
    with_entropy: bool = False
    vocab_size: int | None = None
    differentiate: str = "both"


CASES = {
    "plain": Case(),
    "chunks of one": Case(chunk_size=1),
    "chunks divide": Case(num_positions=12),
    "one chunk": Case(chunk_size=13),
    "chunk larger than the batch": Case(chunk_size=100),
    "temperature": Case(temperature=0.7),
    "entropy": Case(with_entropy=True),
    "entropy, temperature, one chunk": Case(with_entropy=True, temperature=1.7, chunk_size=64),
    "only entropy differentiated": Case(with_entropy=True, differentiate="entropy"),
    "only log-probabilities differentiated": Case(with_entropy=True, differentiate="log_probs"),
    "padded vocabulary": Case(vocab_size=9, with_entropy=True, temperature=0.7),
    "a rank of padding only": Case(vocab_size=6, with_entropy=True),
    "a rank's border is the vocabulary's": Case(vocab_size=7),
    "no positions": Case(num_positions=0, with_entropy=True),
}


@dataclass(frozen=True, kw_only=True)
class Results:
    log_probs: Tensor
    entropy: Tensor | None
    grad_hidden: Tensor
    grad_weight: Tensor


def make_inputs(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """hidden, weight, labels, and the gradients of both outputs."""
    generator = torch.Generator().manual_seed(0)
    n = case.num_positions
    return (
        torch.randn(n, HIDDEN, dtype=torch.float64, generator=generator).to(dtype),
        torch.randn(VOCAB, HIDDEN, dtype=torch.float64, generator=generator).to(dtype),
        torch.randint(case.vocab_size or VOCAB, (n,), generator=generator),
        *torch.randn(2, n, dtype=torch.float64, generator=generator),
    )


def differentiate(case: Case, outputs: tuple, grads: tuple, inputs: tuple) -> tuple[Tensor, ...]:
    chosen = {"both": (0, 1), "log_probs": (0,), "entropy": (1,)}[case.differentiate]
    loss = sum((outputs[i] * grads[i]).sum() for i in chosen if outputs[i] is not None)
    return torch.autograd.grad(loss, inputs)


def oracle(case: Case) -> Results:
    hidden, weight, labels, *grads = make_inputs(case)
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = hidden @ weight[: case.vocab_size].t() / case.temperature
    log_p = logits.log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1) if case.with_entropy else None
    outputs = (log_p.gather(1, labels[:, None])[:, 0], entropy)
    grad_hidden, grad_weight = differentiate(case, outputs, grads, (hidden, weight))
    return Results(
        log_probs=outputs[0], entropy=entropy, grad_hidden=grad_hidden, grad_weight=grad_weight
    )


def ours(case: Case, group: dist.ProcessGroup | None = None) -> Results:
    """This rank's results: its share of hidden's gradient, and its rows of the weight's."""
    hidden, weight, labels, *grads = make_inputs(case)
    if group is not None:
        weight = weight.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()
    hidden.requires_grad_()
    weight.requires_grad_()
    outputs = vocab_parallel_log_probs(
        hidden,
        weight,
        labels,
        group=group,
        temperature=case.temperature,
        chunk_size=case.chunk_size,
        with_entropy=case.with_entropy,
        vocab_size=case.vocab_size,
    )
    grad_hidden, grad_weight = differentiate(case, outputs, grads, (hidden, weight))
    return Results(
        log_probs=outputs[0].detach(),
        entropy=None if outputs[1] is None else outputs[1].detach(),
        grad_hidden=grad_hidden,
        grad_weight=grad_weight,
    )


def assert_equal(actual: Results, expected: Results) -> None:
    torch.testing.assert_close(actual.log_probs, expected.log_probs, **EXACT)
    torch.testing.assert_close(actual.grad_hidden, expected.grad_hidden, **EXACT)
    torch.testing.assert_close(actual.grad_weight, expected.grad_weight, **EXACT)
    assert (actual.entropy is None) == (expected.entropy is None)
    if expected.entropy is not None:
        torch.testing.assert_close(actual.entropy, expected.entropy, **EXACT)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_log_softmax(case):
    assert_equal(ours(case), oracle(case))


def _all_cases(rank: int, world_size: int) -> list[tuple[Results, list[tuple[bool, int]]]]:
    """Results, and the all-reduces they took: whether it is the maximum, and of how many."""
    results = []
    calls: list[tuple[bool, int]] = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, op: dist.ReduceOp, group: dist.ProcessGroup) -> None:
        calls.append((op == dist.ReduceOp.MAX, tensor.numel()))
        all_reduce(tensor, op=op, group=group)

    dist.all_reduce = counted
    for case in CASES.values():
        calls.clear()
        result = ours(case, dist.group.WORLD)
        results.append((result, list(calls)))
    return results


def test_a_vocabulary_split_over_two_ranks_equals_log_softmax():
    ranks = run_distributed(_all_cases, 2)
    for case, *per_rank in zip(CASES.values(), *ranks, strict=True):
        results = [result for result, _ in per_rank]
        for result in results[1:]:
            assert torch.equal(result.log_probs, results[0].log_probs)
        together = Results(
            log_probs=results[0].log_probs,
            entropy=results[0].entropy,
            grad_hidden=sum(result.grad_hidden for result in results),
            grad_weight=torch.cat([result.grad_weight for result in results]),
        )
        assert_equal(together, oracle(case))
        # Forward and backward together, whatever the number of chunks.
        n, sums = case.num_positions, 3 if case.with_entropy else 2
        for _, calls in per_rank:
            assert calls == ([(True, n), (False, sums * n)] if n else [])


def _megatron_cross_entropy(rank: int, world_size: int) -> tuple[Tensor, ...]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    group = parallel_state.get_tensor_model_parallel_group()
    hidden, weight, labels, grad, _ = make_inputs(Case(), torch.float32)
    weight = weight.chunk(world_size)[rank].clone()
    results = []
    for megatron in (True, False):
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        if megatron:
            logits = (hidden @ weight.t()).unsqueeze(1)
            values = -vocab_parallel_cross_entropy(logits, labels.unsqueeze(1)).squeeze(1)
        else:
            values, _ = vocab_parallel_log_probs(hidden, weight, labels, group=group)
        grads = torch.autograd.grad((values * grad).sum(), (hidden, weight))
        results += [values.detach(), *grads]
    return tuple(results)


def test_equals_megatrons_own_cross_entropy():
    for results in run_distributed(_megatron_cross_entropy, 2):
        for megatron, own in zip(results[:3], results[3:], strict=True):
            # float32 on both sides, sums of 12 numbers of about 1
            torch.testing.assert_close(own, megatron, rtol=0, atol=3e-6)


def test_large_logits_do_not_overflow():
    hidden, weight, labels, *_ = make_inputs(Case())
    values, entropy = vocab_parallel_log_probs(
        1e4 * hidden, weight, labels, group=None, with_entropy=True
    )
    expected = (1e4 * hidden @ weight.t()).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(values, expected, rtol=1e-14, atol=1e-14)
    assert entropy.isfinite().all()


def test_gradcheck():
    hidden, weight, labels, *_ = make_inputs(Case(num_positions=5))

    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return vocab_parallel_log_probs(
            hidden,
            weight,
            labels,
            group=None,
            temperature=0.8,
            chunk_size=2,
            with_entropy=True,
            vocab_size=11,
        )

    assert torch.autograd.gradcheck(outputs, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_a_frozen_input_gets_no_gradient(frozen):
    hidden, weight, labels, *_ = make_inputs(Case())
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    values, _ = vocab_parallel_log_probs(hidden, weight, labels, group=None)
    assert values.requires_grad == (frozen != "both")
    if frozen != "both":
        values.sum().backward()
    assert (hidden.grad is None) == (frozen != "weight")
    assert (weight.grad is None) == (frozen != "hidden")


@pytest.mark.parametrize("case", ["entropy, temperature, one chunk", "padded vocabulary"])
def test_wide_products_of_bfloat16_are_those_of_a_float32_head(case, monkeypatch):
    """Bit for bit but for the order of sums: products of two bfloat16 are exact in float32."""
    monkeypatch.setattr(log_probs, "_WEIGHT_ROWS", 5)
    case = CASES[case]
    hidden, weight, labels, *grads = make_inputs(case, torch.bfloat16)

    def run(*inputs: Tensor, wide: bool) -> tuple[Tensor, ...]:
        inputs = tuple(x.clone().requires_grad_() for x in inputs)
        outputs = vocab_parallel_log_probs(
            *inputs,
            labels,
            group=None,
            temperature=case.temperature,
            chunk_size=case.chunk_size,
            with_entropy=True,
            vocab_size=case.vocab_size,
            wide_products=wide,
        )
        return *(x.detach() for x in outputs), *differentiate(case, outputs, grads, inputs)

    expected = run(hidden.float(), weight.float(), wide=False)
    found = run(hidden, weight, wide=True)
    rounded = run(hidden, weight, wide=False)
    for name, a, b, c in zip(("log_probs", "entropy"), found, expected, rounded, strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6, msg=name)  # sums of 5 to 12 of about 1
        assert (c - b).abs().max() > 1e-3, name  # what rounding logits to 8 bits costs
    for a, b in zip(found[2:], expected[2:], strict=True):
        assert a.dtype == torch.bfloat16
        # One rounding of the result to bfloat16, 8 bits.
        torch.testing.assert_close(a.float(), b, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_are_summed_in_float32(dtype, with_entropy, monkeypatch):
    # Blocks smaller than the vocabulary, so that there are several, and one that is not full.
    monkeypatch.setattr(log_probs, "_WEIGHT_ROWS", 5)
    hidden, weight, labels, *grads = make_inputs(Case(), dtype)
    plain = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    log_p = (plain[0] @ plain[1].t()).float().log_softmax(-1)
    expected = [log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)]
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    actual = vocab_parallel_log_probs(
        *inputs, labels, group=None, chunk_size=4, with_entropy=with_entropy
    )
    loss = expected_loss = 0
    for value, wanted, grad in zip(actual, expected, grads, strict=True):
        if value is not None:
            assert value.dtype == torch.float32
            # The logits are the same; what follows is float32.
            torch.testing.assert_close(value, wanted, rtol=0, atol=5e-6)
            loss, expected_loss = loss + (value * grad).sum(), expected_loss + (wanted * grad).sum()
    # Both sides round each gradient of a logit to the dtype once, and then the sums.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    for value, wanted in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected_loss, plain), strict=True
    ):
        assert value.dtype == dtype
        torch.testing.assert_close(value, wanted, rtol=0, atol=tolerance)


def test_the_weights_gradient_does_not_lose_small_chunks():
    # One position per chunk. The first adds 256 * .75 = 192 to the label's row and -64 to the
    # others, the next 64 add .75 and -.25 each: bfloat16 sums, whose steps are 1 at 192 and .5 at
    # 64, would end at 256 and -64.
    hidden = torch.ones(65, 2, dtype=torch.bfloat16)
    hidden[0] = 256
    weight = torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(65, dtype=torch.int64)
    values, _ = vocab_parallel_log_probs(hidden, weight, labels, group=None, chunk_size=1)
    values.sum().backward()
    expected = torch.tensor([240.0, -80, -80, -80])[:, None].expand(4, 2)
    assert torch.equal(weight.grad.float(), expected)


@pytest.mark.parametrize("label", [-1, 9, 11, 12, 100])
def test_a_label_outside_the_vocabulary_gives_nan(label):
    hidden, weight, _, *_ = make_inputs(Case(num_positions=2))
    values, _ = vocab_parallel_log_probs(
        hidden, weight, torch.tensor([3, label]), group=None, vocab_size=9
    )
    assert values.isnan().tolist() == [False, True]


class RecordSizes(TorchDispatchMode):
    """The largest tensor made by any operation, and the most elements made and alive at once."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.largest = 0
        self.peak = 0
        self._inputs = {tensor.data_ptr() for tensor in inputs}
        self._alive: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and storage_of(leaf) not in self._inputs:
                self.largest = max(self.largest, leaf.numel())
                self._alive.append(weakref.ref(leaf))
        self._alive = [reference for reference in self._alive if reference() is not None]
        alive = [tensor for reference in self._alive if (tensor := reference()) is not None]
        sizes = {storage_of(tensor): tensor.untyped_storage().nbytes() // 4 for tensor in alive}
        self.peak = max(self.peak, sum(sizes.values()))
        return result


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize(("with_entropy", "chunks_alive"), [(False, 1), (True, 2)])
def test_never_holds_more_than_a_chunk_of_logits(with_entropy, chunks_alive):
    n, hidden_size, vocab, chunk_size = 96, 4, 4096, 8
    hidden = torch.randn(n, hidden_size, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    labels = torch.randint(vocab, (n,))
    with RecordSizes(hidden, weight, labels) as sizes:
        outputs = vocab_parallel_log_probs(
            hidden, weight, labels, group=None, chunk_size=chunk_size, with_entropy=with_entropy
        )
        forward_peak = sizes.peak
        sum(output.sum() for output in outputs if output is not None).backward()
    chunk = chunk_size * vocab
    assert sizes.largest == chunk
    # Beside the chunks: some numbers per position and, in backward, both gradients and what the
    # weight's addition to .grad may copy.
    assert forward_peak <= chunks_alive * chunk + 16 * n
    assert sizes.peak <= chunks_alive * chunk + 2 * weight.numel() + 2 * hidden.numel() + 16 * n


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 0}, r"chunk_size=0: set at least 1"),
        ({"temperature": 0.0}, r"temperature=0\.0: set a number above 0"),
        ({"vocab_size": 13}, r"vocab_size=13: the output weight has 12 rows, set 1 to 12"),
        ({"vocab_size": 0}, r"vocab_size=0"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels have shape \[3\]"),
        ({"hidden": torch.zeros(N, 4)}, r"hidden has shape \[13, 4\] and weight \[12, 5\]"),
        ({"hidden": torch.zeros(N, 1, 5)}, r"hidden has shape \[13, 1, 5\]"),
        ({"hidden": torch.zeros(N, HIDDEN)}, r"hidden is torch.float32 and weight torch.float64"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    hidden, weight, labels, *_ = make_inputs(Case())
    arguments = {"hidden": hidden, "weight": weight, "labels": labels, "group": None} | change
    with pytest.raises(ValueError, match=message):
        vocab_parallel_log_probs(**arguments)

"""What a side computes: attention alone, one decoder layer, or a whole training step."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.config import ParallelConfig
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.model.build import ModelChunks, build_gpt_model, build_model_chunks
from megatron_prefix.model.transformer_config import transformer_config
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.training.batch import PackedBatch
from megatron_prefix.training.series import BatchSeries
from megatron_prefix.training.step import accumulate_gradients

from .measuring import Runner
from .mechanisms import Mechanism, build_mechanism
from .names import PEERS, ROWS
from .shapes import ModelSizes, Shape, make_batch, training_config, trees, ungrouped_rows

OBJECTIVE = ObjectiveConfig()


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured."""

    level: str
    shape: Shape
    sizes: ModelSizes
    device: str = "cpu"
    dtype: str = "float32"
    kernel: str | None = None
    recompute: str = "none"
    threads: int = 1
    seed: int = 0


@contextlib.contextmanager
def build_runners(case: Case, sides: Sequence[str]) -> Iterator[dict[str, Runner]]:
    """The sides of a case, on the same rollouts and weights, in one process.

    Raises:
        ValueError: a side that the level does not have.
    """
    torch.set_num_threads(case.threads)
    if case.level == "attention":
        yield _attention_runners(case, sides)
        return
    model, parallel = case.sizes.config(), ParallelConfig()
    training = training_config(device=case.device, dtype=case.dtype, recompute=case.recompute)
    with runtime(parallel, device=case.device, seed=case.seed, timeout_minutes=20):
        if case.level == "layer":
            config = transformer_config(model, parallel, training)
            yield _layer_runners(case, sides, build_gpt_model(model, config).to(case.device))
        else:
            chunks = build_model_chunks(model, parallel, training, use_distributed_optimizer=False)
            yield _step_runners(case, sides, chunks)


class _AttentionRunner:
    def __init__(self, mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
        """q, k, v, dout of the grouped row."""
        rows = torch.from_numpy(mechanism.rows).to(q.device)
        first = torch.from_numpy(mechanism.first).to(q.device)
        self._rows, self._num_rows = rows, q.shape[0]
        self._mechanism, self._scale = mechanism, q.shape[-1] ** -0.5
        self._inputs = [x[rows].detach().requires_grad_() for x in (q, k, v)]
        # A position that stands here several times has its gradient at the first one.
        self._dout = dout[rows] * first[:, None, None]
        self._out = q

    def step(self) -> None:
        for x in self._inputs:
            x.grad = None
        self._out = self._mechanism.attend(*self._inputs, self._scale)
        self._out.backward(self._dout)

    def result(self) -> dict[str, Tensor]:
        grads = dict(zip(("dq", "dk", "dv"), (x.grad for x in self._inputs), strict=True))
        return {
            "out": _first_of(self._out, self._mechanism),
            **{name: _summed(g, self._rows, self._num_rows) for name, g in grads.items()},
        }


def _attention_runners(case: Case, sides: Sequence[str]) -> dict[str, Runner]:
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    sizes, generator = case.sizes, torch.Generator().manual_seed(case.seed)
    dim = sizes.hidden // sizes.heads
    mechanisms = _mechanisms(case, sides, device)
    num_rows = build_mechanism("grouped", case.shape, device=device).layout.num_tokens
    q, k, v, dout = (
        torch.randn(num_rows, heads, dim, generator=generator).to(device, dtype)
        for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads, sizes.heads)
    )
    return {side: _AttentionRunner(m, q, k, v, dout) for side, m in mechanisms.items()}


class _LayerRunner:
    def __init__(
        self, layer: Any, rope: Any, mechanism: Mechanism, hidden: Tensor, dout: Tensor
    ) -> None:
        device = hidden.device
        rows = torch.from_numpy(mechanism.rows).to(device)
        first = torch.from_numpy(mechanism.first).to(device)
        self._rows, self._num_rows = rows, hidden.shape[0]
        self._layer, self._mechanism = layer, mechanism
        setup = AttentionSetup.of(layer.config, device)
        params = PrefixPackedSeqParams.from_layout(mechanism.layout, setup)
        self._params = dataclasses.replace(params, attention=mechanism.core_attention)
        self._rope = rope(params.max_seqlen_q)
        self._hidden = hidden[rows].detach().requires_grad_()
        self._dout = dout[rows] * first[:, None, None]
        self._out = hidden

    def step(self) -> None:
        self._hidden.grad = None
        self._layer.zero_grad(set_to_none=True)
        self._out = self._layer(
            self._hidden, None, rotary_pos_emb=self._rope, packed_seq_params=self._params
        )[0]
        self._out.backward(self._dout)

    def result(self) -> dict[str, Tensor]:
        return {
            "out": _first_of(self._out, self._mechanism),
            "dx": _summed(self._hidden.grad, self._rows, self._num_rows),
            **{f"gradient of {n}": p.grad for n, p in self._layer.named_parameters()},
        }


def _layer_runners(case: Case, sides: Sequence[str], model: GPTModel) -> dict[str, Runner]:
    layer, device = model.decoder.layers[0], torch.device(case.device)
    generator = torch.Generator().manual_seed(case.seed)
    mechanisms = _mechanisms(case, sides, device)
    num_rows = build_mechanism("grouped", case.shape, device=device).layout.num_tokens
    hidden, dout = (
        torch.randn(num_rows, 1, case.sizes.hidden, generator=generator).to(
            device, getattr(torch, case.dtype)
        )
        for _ in range(2)
    )
    return {
        side: _LayerRunner(layer, model.rotary_pos_emb, mechanism, hidden, dout)
        for side, mechanism in mechanisms.items()
    }


class StepRunner:
    """Forward, loss and backward of the whole model, by the trainer's own code."""

    def __init__(self, chunks: ModelChunks, batches: Sequence[PackedBatch | BatchSeries]) -> None:
        self._chunks, self._batches, self._loss = chunks, batches, 0.0

    def step(self) -> None:
        """See `Runner`."""
        found = accumulate_gradients(self._chunks, self._batches, OBJECTIVE)
        self._loss = sum(float(metrics.policy_loss) for metrics in found)

    def result(self) -> dict[str, Tensor]:
        """See `Runner`. The loss, at most 1, is compared as 2 plus itself, since it may be zero."""
        return {
            "loss": torch.tensor(2.0 + self._loss),
            **{f"gradient of {n}": p.main_grad for n, p in self._chunks.named_parameters()},
        }


def _step_runners(case: Case, sides: Sequence[str], chunks: ModelChunks) -> dict[str, Runner]:
    runners: dict[str, Runner] = {}
    both = trees(case.shape, case.sizes.vocab, case.seed)
    device = torch.device(case.device)
    setup = AttentionSetup.of(chunks.config, device, kernel=case.kernel)
    for side in sides:
        if side in PEERS:
            from .prefix_grouper import PrefixGrouperRunner

            runners[side] = PrefixGrouperRunner(case, chunks, side=side)
            continue
        if side == ROWS:
            runners[side] = StepRunner(
                chunks,
                [
                    make_batch(tree, case.shape, setup, sequences=sequences)
                    for tree, sequences in ungrouped_rows(case.shape, case.sizes.vocab, case.seed)
                ],
            )
            continue
        own = side in both
        batch = make_batch(
            both["ungrouped" if side == "ungrouped" else "grouped"],
            case.shape,
            setup,
            trim_last_layer=own and training_config().trim_last_layer,
        )
        if not own:
            mechanism = build_mechanism(side, case.shape, device=device, kernel=case.kernel)
            batch.params = dataclasses.replace(batch.params, attention=mechanism.core_attention)
        runners[side] = StepRunner(chunks, [batch])
    return runners


def _mechanisms(case: Case, sides: Sequence[str], device: torch.device) -> Mapping[str, Mechanism]:
    return {
        side: build_mechanism(side, case.shape, device=device, kernel=case.kernel) for side in sides
    }


def _first_of(x: Tensor, mechanism: Mechanism) -> Tensor:
    """The values of the grouped row's positions, in its order."""
    first = torch.from_numpy(mechanism.first).to(x.device)
    order = torch.from_numpy(mechanism.rows).to(x.device)[first].argsort()
    return x[first][order]


def _summed(x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Gradients of the grouped row's positions, added up over where they stand."""
    return x.new_zeros(num_rows, *x.shape[1:], dtype=torch.float64).index_add(0, rows, x.double())

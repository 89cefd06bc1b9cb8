"""What stands in place of a model's output layer: by Megatron's `output_processor`, and without it.

Both ways run on releases that have it; on earlier ones the way without it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_prefix.config import ParallelConfig
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layout import pack
from megatron_prefix.megatron import output
from megatron_prefix.model import head as head_module
from megatron_prefix.model.build import build_gpt_model, build_model_chunks
from megatron_prefix.model.head import LogProbHead
from megatron_prefix.model.transformer_config import transformer_config
from tests.distributed import run_distributed
from tests.megatron.models import ON_CPU, TRAINING, model_config, random_groups, single_process

WAYS = [False, True] if output.takes_output_processor() else [False]
VOCAB_SIZE = 61


@pytest.fixture(params=WAYS, ids=lambda processor: "processor" if processor else "lent")
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the model is handed an output processor."""
    monkeypatch.setattr(output, "takes_output_processor", lambda: request.param)
    return request.param


def build(tied: bool = False, parallel: ParallelConfig | None = None, **options: Any) -> GPTModel:
    config = model_config(share_embeddings_and_output_weights=tied, **options)
    return build_gpt_model(
        config, transformer_config(config, parallel or ParallelConfig(), TRAINING)
    )


def row_and_call(model: torch.nn.Module, seed: int = 0) -> tuple[Tensor, functools.partial[Tensor]]:
    """Labels [T] of a packed row, and the model's forward on it."""
    layout = pack(random_groups(np.random.default_rng(seed), [(9, [5, 6, 2])]), pad_to_multiple=2)
    params = PrefixPackedSeqParams.from_layout(layout, ON_CPU)
    call = functools.partial(
        model,
        torch.from_numpy(layout.input_ids)[None],
        params.position_ids[None],
        attention_mask=None,
        packed_seq_params=params,
    )
    return torch.from_numpy(layout.labels), call


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("train_entropy", [False, True])
def test_log_probabilities_and_entropies_are_those_of_the_models_own_logits(
    way: bool, tied: bool, train_entropy: bool
) -> None:
    with single_process():
        model = build(tied)
        head = LogProbHead.of(model, vocab_size=VOCAB_SIZE, chunk_tokens=4)
        labels, call = row_and_call(model)
        positions = torch.tensor([0, 3, 4, 11, 17])
        found = head.log_probs(
            call,
            positions,
            labels[positions],
            temperature=0.7,
            with_entropy=True,
            train_entropy=train_entropy,
        )
        assert found.shape == (1, 5, 2)
        weights = torch.randn(5, 2)
        (found[0] * weights).sum().backward()
        found_gradients = gradients(model)

        logits = call()[0][positions]
        assert logits.shape == (5, VOCAB_SIZE)
        log_p = torch.log_softmax(logits / 0.7, -1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        log_probs = log_p.gather(1, labels[positions, None])[:, 0]
        expected = torch.stack((log_probs, entropy if train_entropy else entropy.detach()), -1)
        (expected * weights).sum().backward()
        # float64, chunks of other sizes.
        assert torch.allclose(found[0], expected, rtol=1e-12, atol=1e-12)
        for name, gradient in gradients(model).items():
            assert torch.allclose(found_gradients[name], gradient, rtol=1e-10, atol=1e-12), name


def test_entropy_is_not_computed_where_nobody_asks(way: bool, monkeypatch: Any) -> None:
    asked = []
    function = head_module.vocab_parallel_log_probs

    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["with_entropy"])
        return function(*args, **kwargs)

    monkeypatch.setattr(head_module, "vocab_parallel_log_probs", spy)
    with single_process():
        model = build()
        head = LogProbHead.of(model, vocab_size=VOCAB_SIZE, chunk_tokens=64)
        labels, call = row_and_call(model)
        rows = torch.arange(6)
        how = {"positions": rows, "labels": labels[rows], "temperature": 1.0}
        both = head.log_probs(call, **how, with_entropy=True)
        alone = head.log_probs(call, **how, with_entropy=False)
    assert asked == [True, False]
    assert alone.shape == (1, 6, 1)
    assert torch.equal(alone[..., 0], both[..., 0])


def test_what_is_made_of_logits_comes_in_chunks(way: bool) -> None:
    slices = []

    def make(logits: Tensor, rows: slice) -> Tensor:
        slices.append(rows)
        return logits.topk(3).indices

    with single_process(), torch.no_grad():
        model = build()
        head = LogProbHead.of(model, vocab_size=VOCAB_SIZE, chunk_tokens=2)
        _, call = row_and_call(model)
        positions = torch.tensor([1, 5, 6, 9, 10])
        found = head.from_logits(call, positions, make)
        expected = call()[:, positions].topk(3).indices
    assert torch.equal(found, expected)
    assert slices == [slice(0, 2), slice(2, 4), slice(4, 5)]


def test_the_output_layer_is_its_own_again_after_an_error(way: bool) -> None:
    def fail(logits: Tensor, rows: slice) -> Tensor:
        raise ValueError("no such token")

    with single_process(), torch.no_grad():
        model = build()
        head = LogProbHead.of(model, vocab_size=VOCAB_SIZE, chunk_tokens=2)
        _, call = row_and_call(model)
        expected = call()
        with pytest.raises(ValueError, match="no such token"):
            head.from_logits(call, torch.tensor([1]), fail)
        assert "forward" not in vars(model.output_layer)
        assert torch.equal(call(), expected)


def test_megatrons_wrappers_hand_the_request_on_and_keep_float32(way: bool) -> None:
    """Log-probabilities of a bfloat16 model are computed, and come back, in float32."""
    with single_process(float64=False):
        config = transformer_config(
            model_config(), ParallelConfig(), _with(TRAINING, dtype="bfloat16")
        )
        model = build_gpt_model(model_config(), config)
        head = LogProbHead.of(model, vocab_size=VOCAB_SIZE, chunk_tokens=64)
        wrapped = DistributedDataParallel(
            config, DistributedDataParallelConfig(), Float16Module(config, model)
        )
        labels, call = row_and_call(wrapped)
        rows = torch.arange(6)
        found = head.log_probs(call, rows, labels[rows], temperature=1.0, with_entropy=True)
        assert model.output_layer.weight.dtype == torch.bfloat16
        assert found.shape == (1, 6, 2) and found.dtype == torch.float32
        # Not rounded to bfloat16 on the way.
        assert not torch.equal(found, found.bfloat16().float())


def test_a_float32_output_layer_gives_samplers_and_losses_the_same_logits(way: bool) -> None:
    """Of a bfloat16 model, without rounding logits to bfloat16."""
    training = _with(TRAINING, dtype="bfloat16", head_dtype="float32")
    found = {}
    with single_process(float64=False):
        chunks = build_model_chunks(
            model_config(), ParallelConfig(), training, use_distributed_optimizer=False
        )
        labels, call = row_and_call(chunks.wrapped[0])
        labels, rows = labels[:6], torch.arange(6)
        for wide in (True, False):
            head = dataclasses.replace(chunks.head, wide_products=wide)
            with torch.no_grad():
                logits = head.from_logits(call, rows, lambda logits, _: logits)[0]
                log_probs = head.log_probs(call, rows, labels, temperature=1.0, with_entropy=False)
            of_logits = logits.log_softmax(-1).gather(1, labels[:, None])
            # The same products, added up over the vocabulary in another order.
            assert torch.allclose(log_probs[0], of_logits, rtol=0, atol=1e-5)
            found[wide] = logits
    assert chunks.head.wide_products
    assert torch.equal(found[False], found[False].bfloat16().float())
    assert not torch.equal(found[True], found[True].bfloat16().float())
    # One rounding to 8 bits.
    assert torch.allclose(found[True], found[False], rtol=2**-8, atol=1e-5)


def _with(record: Any, **changes: Any) -> Any:
    return type(record)(**{**vars(record), **changes})


def _on_ranks(rank: int, world_size: int, parallel: dict[str, Any], tied: bool) -> list[Any]:
    """Each way: log-probabilities and gradients on this rank, in float64."""
    results = []
    config = ParallelConfig(**parallel)
    with runtime(config, device="cpu", seed=5, timeout_minutes=2, float64=True):
        model = build(tied, config, vocab_size=60)
        head = LogProbHead.of(model, vocab_size=60, chunk_tokens=4)
        for processor in WAYS:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(output, "takes_output_processor", lambda p=processor: p)
                labels, call = row_and_call(model)
                rows = torch.tensor([1, 2, 8, 15])
                found = head.log_probs(
                    call, rows, labels[rows] % 60, temperature=1.0, with_entropy=True
                )
                found.sum().backward()
                results.append((found.detach(), gradients(model)))
    return results


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_both_ways_are_equal_to_the_bit_under_tensor_parallelism(
    tied: bool, sequence_parallel: bool
) -> None:
    if len(WAYS) == 1:
        pytest.skip("this megatron-core has one of the two ways")
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": sequence_parallel}
    ranks = run_distributed(_on_ranks, 2, parallel, tied)
    for (lent, lent_gradients), (processor, processor_gradients) in ranks:
        assert torch.equal(lent, processor)
        assert lent_gradients.keys() == processor_gradients.keys()
        for name, gradient in lent_gradients.items():
            assert torch.equal(gradient, processor_gradients[name]), name
    assert torch.equal(ranks[0][0][0], ranks[1][0][0])


def _losses(rank: int, world_size: int) -> dict[tuple[bool, bool], list[float]]:
    """Of three steps on two data-parallel ranks, by way and by whether communication overlaps."""
    found = {}
    transformer = {"hidden_size": 64, "num_layers": 3}
    config = model_config(transformer, vocab_size=4000)
    for processor in WAYS:
        for overlap in (False, True):
            with (
                pytest.MonkeyPatch.context() as patch,
                runtime(ParallelConfig(), device="cpu", seed=3, timeout_minutes=2, float64=True),
            ):
                patch.setattr(output, "takes_output_processor", lambda p=processor: p)
                found[processor, overlap] = _train(config, overlap, seed=rank)
    return found


def _train(config: Any, overlap: bool, seed: int) -> list[float]:
    model_options = transformer_config(config, ParallelConfig(), TRAINING)
    model = build_gpt_model(config, model_options)
    head = LogProbHead.of(model, vocab_size=config.vocab_size, chunk_tokens=64)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        bucket_size=10_000,  # the output layer is a bucket of its own
    )
    wrapped = DistributedDataParallel(model_options, ddp_config, model)
    wrapped.broadcast_params()
    options = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        clip_grad=0.0,
        params_dtype=model_options.params_dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=overlap,
    )
    optimizer = get_megatron_optimizer(options, [wrapped])
    losses = []
    for _ in range(3):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        labels, call = row_and_call(wrapped, seed)
        rows = torch.arange(len(labels))
        found = head.log_probs(call, rows, labels, temperature=1.0, with_entropy=False)
        loss = -found.mean()
        loss.backward()
        losses.append(float(loss.detach()))
        finalize_model_grads([wrapped], None)
        optimizer.step()
    return losses


def test_weights_that_are_gathered_while_the_model_runs_are_waited_for() -> None:
    """`overlap_param_gather` waits in a hook of each module, so of the output layer too.

    An output processor that does not call the layer uses weights of which half are not there yet.
    """
    for losses in run_distributed(_losses, 2):
        expected = losses[False, False]
        assert expected[2] < expected[0]
        for found in losses.values():
            assert found == pytest.approx(expected, rel=1e-9)  # buckets are summed in other orders

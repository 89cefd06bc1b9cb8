"""Where sharing does not pay, groups are packed as sequences of their own: same loss, gradients."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import pytest

from megatron_prefix.config import ParallelConfig
from megatron_prefix.config.packing import packing_of_run
from megatron_prefix.layout import ModelShape, Packing
from megatron_prefix.model import head as head_module
from megatron_prefix.model.build import build_model_chunks, model_shape
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.rollouts.records import RolloutGroup
from megatron_prefix.training.minibatch import Minibatch, build_minibatch
from megatron_prefix.training.step import accumulate_gradients, compute_logprobs
from tests.megatron.models import ON_CPU, TRAINING, model_config, single_process

OBJECTIVE = ObjectiveConfig()
# Too short to pay, long, a group of one, one token, and prompts that begin alike.
SHAPES = [(3, [30, 20, 25]), (60, [9, 4, 12, 7]), (50, [20]), (1, [5, 6]), (60, [8, 8])]


def _groups() -> list[RolloutGroup]:
    rng = np.random.default_rng(5)
    start = rng.integers(0, 61, 40).tolist()
    groups = []
    for index, (prompt, responses) in enumerate(SHAPES):
        tokens = (start + rng.integers(0, 61, prompt).tolist())[: max(prompt, 1)]
        groups.append(
            RolloutGroup(
                prompt=tokens,
                responses=[rng.integers(0, 61, n).tolist() for n in responses],
                rewards=[float(i % 2) for i in range(len(responses))],
                source=f"group {index}",
            )
        )
    return groups


def _packing(shape: ModelShape, **options: Any) -> Packing:
    training = dataclasses.replace(TRAINING, token_budget=160, **options)
    return packing_of_run(training, ParallelConfig(), model_shape=shape, data_parallel_size=1)


def _minibatch(shape: Any, pays: bool, sharing: Literal["groups", "everything"]) -> Minibatch:
    return build_minibatch(
        _groups(),
        OBJECTIVE,
        _packing(shape, sharing=sharing, share_only_where_it_pays=pays),
        attention=ON_CPU,
        data_parallel_rank=0,
    )


@pytest.mark.parametrize("sharing", ["groups", "everything"])
def test_results_do_not_depend_on_where_sharing_is_skipped(sharing: str) -> None:
    config = model_config({"hidden_size": 32}, max_sequence_length=256)
    with single_process():
        chunks = build_model_chunks(
            config, ParallelConfig(), TRAINING, use_distributed_optimizer=False
        )
        shape = model_shape(config, chunks.config)
        always, where_it_pays = (
            _minibatch(shape, pays=pays, sharing=sharing) for pays in (False, True)
        )
        results = []
        for minibatch in (always, where_it_pays):
            metrics = accumulate_gradients(chunks, minibatch.batches, OBJECTIVE)
            gradients = {n: p.main_grad.clone() for n, p in chunks.named_parameters()}
            results.append((sum(float(m.policy_loss) for m in metrics), gradients))
    (loss, gradients), (other_loss, other_gradients) = results
    assert other_loss == pytest.approx(loss, abs=1e-13)
    for name, gradient in gradients.items():
        difference = float((gradient - other_gradients[name]).norm())
        assert difference <= 1e-12 * max(float(gradient.norm()), 1e-3), name

    # Something was skipped, not all; what an ungrouped run would do is what it was.
    assert always.packed_tokens < where_it_pays.packed_tokens < always.step.ungrouped_tokens
    assert where_it_pays.step.ungrouped_tokens == always.step.ungrouped_tokens
    assert where_it_pays.flops <= where_it_pays.step.ungrouped_flops
    assert all(batch.num_tokens <= 160 for batch in where_it_pays.batches)


def test_log_probabilities_alone_need_no_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does an optimizer step, unless the objective asks for entropies."""
    asked = []
    function = head_module.vocab_parallel_log_probs

    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["with_entropy"])
        return function(*args, **kwargs)

    monkeypatch.setattr(head_module, "vocab_parallel_log_probs", spy)
    config = model_config({"hidden_size": 32}, max_sequence_length=256)
    with single_process():
        chunks = build_model_chunks(
            config, ParallelConfig(), TRAINING, use_distributed_optimizer=False
        )
        batches = _minibatch(model_shape(config, chunks.config), True, "groups").batches
        found = compute_logprobs(chunks, batches, OBJECTIVE)
        assert asked == [False] * len(batches)
        assert [len(logprobs) for logprobs in found] == [len(b.entry_labels) for b in batches]
        without = accumulate_gradients(chunks, batches, OBJECTIVE)
        assert asked == [False] * 2 * len(batches)
        reported = dataclasses.replace(OBJECTIVE, report_entropy=True)
        metrics = accumulate_gradients(chunks, batches, reported)
    assert asked[2 * len(batches) :] == [True] * len(batches)
    assert all(float(m.entropy) == 0 for m in without)
    assert all(float(m.entropy) > 0 for m in metrics)


def test_a_row_without_sharing_has_no_cross_stage() -> None:
    config = model_config({"hidden_size": 32}, max_sequence_length=256)
    with single_process():
        chunks = build_model_chunks(
            config, ParallelConfig(), TRAINING, use_distributed_optimizer=False
        )
        shape = model_shape(config, chunks.config)
        stages = {}
        for pays in (False, True):
            minibatch = build_minibatch(
                _groups()[:1],
                OBJECTIVE,
                _packing(shape, share_only_where_it_pays=pays),
                attention=ON_CPU,
                data_parallel_rank=0,
            )
            stages[pays] = [len(batch.params.attention.stages.local) for batch in minibatch.batches]
    assert stages == {False: [2], True: [1]}


def test_tokens_that_the_loss_mask_leaves_out_are_seen_and_not_trained() -> None:
    rng = np.random.default_rng(7)
    lengths = [5, 8, 3]
    masks = [np.arange(n) % 2 == 0 for n in lengths]
    group = RolloutGroup(
        prompt=rng.integers(0, 61, 9),
        responses=[rng.integers(0, 61, n) for n in lengths],
        rewards=[1.0, 0.0, 0.5],
        old_logprobs=[-rng.random(n) - 1 for n in lengths],
        loss_mask=masks,
        source="group",
    )
    config = model_config({"hidden_size": 32}, max_sequence_length=256)
    with single_process():
        chunks = build_model_chunks(
            config, ParallelConfig(), TRAINING, use_distributed_optimizer=False
        )
        found = {}
        for masked in (True, False):
            minibatch = build_minibatch(
                [group if masked else dataclasses.replace(group, loss_mask=None)],
                OBJECTIVE,
                _packing(model_shape(config, chunks.config)),
                attention=ON_CPU,
                data_parallel_rank=0,
            )
            (batch,) = minibatch.batches
            (logprobs,) = compute_logprobs(chunks, minibatch.batches, OBJECTIVE)
            names = zip(batch.sequence_ids.tolist(), batch.sequence_tokens.tolist(), strict=True)
            values = zip(logprobs.tolist(), batch.old_logprobs.tolist(), strict=True)
            found[masked] = dict(zip(names, values, strict=True))
            weights = batch.weights
            assert float(weights.sum()) == pytest.approx(1)
    trained = {(i, t) for i, mask in enumerate(masks) for t in np.flatnonzero(mask).tolist()}
    assert found[True].keys() == trained < found[False].keys()
    # The others are inputs as before: nothing that is trained has other log-probabilities.
    for name, values in found[True].items():
        assert values == pytest.approx(found[False][name], abs=1e-12)


def test_positions_that_nothing_is_trained_on_do_not_reach_the_output_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor do they count in the predicted FLOPs; a turn that responses share is one position."""
    rng = np.random.default_rng(8)
    first, tool = rng.integers(0, 61, 30), rng.integers(0, 61, 50)
    last = [rng.integers(0, 61, n) for n in (4, 9)]
    mask = [np.repeat([True, False, True], [30, 50, len(own)]) for own in last]
    group = RolloutGroup(
        prompt=rng.integers(0, 61, 20),
        responses=[np.concatenate([first, tool, own]) for own in last],
        rewards=[1.0, 0.0],
        loss_mask=mask,
        source="group",
    )
    asked = []
    function = head_module.vocab_parallel_log_probs

    def spy(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(len(hidden))
        return function(hidden, *args, **kwargs)

    monkeypatch.setattr(head_module, "vocab_parallel_log_probs", spy)
    config = model_config({"hidden_size": 32}, max_sequence_length=256)
    with single_process():
        chunks = build_model_chunks(
            config, ParallelConfig(), TRAINING, use_distributed_optimizer=False
        )
        shape = model_shape(config, chunks.config)
        flops = []
        for trained in (group, dataclasses.replace(group, loss_mask=None)):
            minibatch = build_minibatch(
                [trained],
                OBJECTIVE,
                dataclasses.replace(_packing(shape), token_budget=400),
                attention=ON_CPU,
                data_parallel_rank=0,
            )
            (batch,) = minibatch.batches
            assert batch.num_tokens == 19 + 80 + 4 + 9
            accumulate_gradients(chunks, minibatch.batches, OBJECTIVE)
            flops.append(minibatch.flops)
    assert asked == [30 + 4 + 9, 30 + 50 + 4 + 9]
    assert flops[1] - flops[0] == 50 * shape.head_flops_per_label()

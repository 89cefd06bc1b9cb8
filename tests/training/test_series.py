"""A run with prompts shared across microbatches is the same run, with fewer tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prefix.config import ParallelConfig
from megatron_prefix.config.packing import packing_of_run
from megatron_prefix.model.build import ModelChunks, build_model_chunks, model_shape
from megatron_prefix.model.full_tensors import FullTensors, full_parameters
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.rollouts.records import RolloutGroup
from megatron_prefix.training import step as step_module
from megatron_prefix.training.minibatch import Minibatch, build_minibatch
from megatron_prefix.training.series import BatchSeries
from megatron_prefix.training.step import accumulate_gradients, compute_logprobs
from tests.distributed import run_distributed
from tests.megatron.models import ON_CPU, TRAINING, model_config, relative_error, single_process
from tests.training.runs import VOCAB_SIZE, read_rows, run_values, trainer, write_records

OBJECTIVE = ObjectiveConfig()
# Those of a run that are equal in exact arithmetic.
COMPARED = ("policy_loss", "kl", "entropy", "ratio_mean", "ratio_std", "old_kl", "grad_norm", "lr")


def _records(count: int) -> list[dict[str, Any]]:
    """Groups of which each needs two rows of 40 tokens."""
    rng = np.random.default_rng(2)
    return [
        {
            "prompt": rng.integers(0, VOCAB_SIZE, int(rng.integers(16, 20))).tolist(),
            "responses": [rng.integers(0, VOCAB_SIZE, n).tolist() for n in (5, 3, 6, 4, 6, 2, 5)],
            "rewards": rng.normal(size=7).tolist(),
        }
        for _ in range(count)
    ]


def _train(rank: int, world_size: int, folder: Path) -> dict[bool, FullTensors | None]:
    weights = {}
    for across in (False, True):
        values = run_values(
            folder / str(across),
            records=folder / "records.jsonl",
            training={
                "steps": 2,
                "token_budget": 40,
                "dtype": "float64",
                "optimizer_steps_per_rollout": 2,
                "epochs_per_rollout": 2,
                # The prompts are short, and each of these rows is to share one.
                "share_only_where_it_pays": False,
                "share_across_microbatches": across,
            },
            objective={"kl_coefficient": 0.3, "entropy_coefficient": 0.01},
            rollouts={"groups_per_step": 4},
            output={"save_last": False},
        )
        with trainer(values) as run:
            run.run()
            weights[across] = full_parameters(run.chunks)
    return weights


def test_losses_and_weights_are_those_of_a_run_without_it(tmp_path: Path) -> None:
    write_records(tmp_path / "records.jsonl", _records(8))
    weights = run_distributed(_train, 2, tmp_path)[0]
    assert weights[True].keys() == weights[False].keys()
    for name, expected in weights[False].items():
        # Eight Adam steps, each of which divides by the root of a small square.
        assert relative_error(weights[True][name], expected) <= 1e-8, name
    rows, expected_rows = (read_rows(tmp_path / str(across)) for across in (True, False))
    assert [row["step"] for row in rows] == [1, 2]
    for row, expected in zip(rows, expected_rows, strict=True):
        for name in COMPARED:
            assert row[name] == pytest.approx(expected[name], rel=1e-8, abs=1e-12), name
        assert row["kl"] > 1e-6
        assert row["tokens_ungrouped"] == expected["tokens_ungrouped"]
        # Each of four prompts once, where it was run twice.
        assert 4 * 15 <= expected["tokens_computed"] - row["tokens_computed"] <= 4 * 18
        assert row["flops_saved_fraction"] > expected["flops_saved_fraction"]


@pytest.fixture(scope="module")
def chunks() -> Iterator[ModelChunks]:
    with single_process():
        yield build_model_chunks(
            model_config(max_sequence_length=256),
            ParallelConfig(),
            TRAINING,
            use_distributed_optimizer=False,
        )


def _minibatch(chunks: ModelChunks, *, across: bool) -> Minibatch:
    """A group in rows of its own, and a small one."""
    rng = np.random.default_rng(4)
    groups = [
        RolloutGroup(
            prompt=rng.integers(0, 61, prompt),
            responses=[rng.integers(0, 61, n) for n in lengths],
            rewards=rng.normal(size=len(lengths)),
            source=f"group {index}",
        )
        for index, (prompt, lengths) in enumerate([(40, [20, 15, 18, 9, 30, 12]), (30, [8, 9])])
    ]
    training = dataclasses.replace(
        TRAINING, token_budget=80, share_across_microbatches=across, share_only_where_it_pays=False
    )
    packing = packing_of_run(
        training,
        ParallelConfig(),
        model_shape=model_shape(model_config(max_sequence_length=256), chunks.config),
        data_parallel_size=1,
    )
    return build_minibatch(groups, OBJECTIVE, packing, attention=ON_CPU, data_parallel_rank=0)


def _gradients(chunks: ModelChunks, minibatch: Minibatch) -> dict[str, torch.Tensor]:
    accumulate_gradients(chunks, minibatch.batches, OBJECTIVE)
    return {name: p.main_grad.clone() for name, p in chunks.named_parameters()}


def _series(minibatch: Minibatch) -> BatchSeries:
    (series,) = (batch for batch in minibatch.batches if isinstance(batch, BatchSeries))
    return series


def test_a_series_keeps_nothing_after_a_step(chunks: ModelChunks) -> None:
    minibatch = _minibatch(chunks, across=True)
    series = _series(minibatch)
    assert len(series.rows) > 1 and len(minibatch.batches) == 2
    first = _gradients(chunks, minibatch)
    assert series.root_keys.layers == ()
    expected = _gradients(chunks, _minibatch(chunks, across=False))
    for name, gradient in _gradients(chunks, minibatch).items():
        assert torch.equal(gradient, first[name]), name
        assert relative_error(gradient, expected[name]) <= 1e-12, name


def test_a_root_counts_as_often_as_sequences_run_through_it(chunks: ModelChunks) -> None:
    in_series = _minibatch(chunks, across=True)
    series = _series(in_series)
    assert set(series.root.params.multiplicity.tolist()) == {6}
    packed_once = _minibatch(chunks, across=False)
    # Each position of each sequence, whatever row it is in.
    counts = [
        sum(int(row.params.multiplicity.sum()) for row in rows)
        for rows in ((series.root, *in_series.rows), packed_once.rows)
    ]
    assert counts == [in_series.step.ungrouped_tokens] * 2


def test_log_probabilities_of_a_series_need_no_gradients(chunks: ModelChunks) -> None:
    found = {}
    for across in (False, True):
        minibatch = _minibatch(chunks, across=across)
        logprobs = compute_logprobs(chunks, minibatch.batches, OBJECTIVE)
        assert not any(of_row.requires_grad for of_row in logprobs)
        assert [len(x) for x in logprobs] == [len(row.entry_labels) for row in minibatch.rows]
        found[across] = torch.cat(logprobs).sort().values
        if across:
            assert _series(minibatch).root_keys.layers == ()
    torch.testing.assert_close(found[True], found[False], rtol=0, atol=1e-12)


def test_rows_of_a_series_share_their_turns_too(chunks: ModelChunks) -> None:
    """Also where all responses of a row begin with the same turn, which its root ends before."""
    rng = np.random.default_rng(6)
    turns = [rng.integers(0, 61, 25) for _ in range(2)]
    last = [rng.integers(0, 61, n) for n in (5, 4, 6, 5, 3, 6)]
    prompt = rng.integers(0, 61, 40)

    def minibatch(sharing: str, across: bool) -> Minibatch:
        group = RolloutGroup(
            prompt=prompt,
            responses=[np.concatenate([turns[i // 3], own]) for i, own in enumerate(last)],
            loss_mask=[np.arange(25 + len(own)) % 12 < 8 for own in last],
            rewards=[float(i % 2) for i in range(6)],
            source="group",
        )
        training = dataclasses.replace(
            TRAINING, token_budget=140, share_across_microbatches=across, sharing=sharing
        )
        packing = packing_of_run(
            dataclasses.replace(training, share_only_where_it_pays=False),
            ParallelConfig(),
            model_shape=model_shape(model_config(max_sequence_length=256), chunks.config),
            data_parallel_size=1,
        )
        return build_minibatch([group], OBJECTIVE, packing, attention=ON_CPU, data_parallel_rank=0)

    in_series = minibatch("groups", True)
    series = _series(in_series)
    # The prompt's row, and what its responses have behind it; a turn runs once in a row.
    tokens = [row.num_tokens for row in series.rows]
    of_responses = sum(25 + len(own) for own in last)
    assert len(tokens) > 1 and sum(tokens) <= of_responses - 2 * 25
    expected = _gradients(chunks, minibatch("none", False))
    for name, gradient in _gradients(chunks, in_series).items():
        assert relative_error(gradient, expected[name]) <= 1e-12, name


def test_an_error_in_the_middle_of_a_series_leaves_nothing_behind(
    chunks: ModelChunks, monkeypatch: pytest.MonkeyPatch
) -> None:
    minibatch = _minibatch(chunks, across=True)
    series = _series(minibatch)
    expected = _gradients(chunks, minibatch)
    kept = []

    def fail_in_the_second_row(*args: Any, **kwargs: Any) -> Any:
        kept.append(series.root_keys.layers)
        if len(kept) == 2:
            raise RuntimeError("in the second row")
        return policy_loss(*args, **kwargs)

    policy_loss = step_module.policy_loss
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="in the second row"):
        patched.setattr(step_module, "policy_loss", fail_in_the_second_row)
        accumulate_gradients(chunks, [series], OBJECTIVE)
    assert kept == [(1, 2), (1, 2)]
    assert series.root_keys.layers == ()
    for name, gradient in _gradients(chunks, minibatch).items():
        assert torch.equal(gradient, expected[name]), name

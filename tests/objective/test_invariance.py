"""Where a token is computed does not change the loss: microbatches, ranks, shared positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.objective import (
    ObjectiveConfig,
    PolicyMetrics,
    policy_loss,
    token_weights,
    vocab_parallel_log_probs,
)
from megatron_prefix.objective.options import CorrectionConfig
from tests.distributed import run_distributed

NAMES = ["grpo", "dr_grpo", "dapo", "gspo", "cispo"]
CORRECTED = ["grpo token", "gspo sequence", "dapo sequence_mean"]
"""An objective and the level of its correction."""
LENGTHS = [1, 7, 3, 12, 2, 5, 4, 9]
SPLITS = [
    [[0, 1, 2, 3, 4, 5, 6, 7]],
    [[7, 2, 5], [0], [6, 1, 3, 4]],
    [[3], [], [0, 1, 2], [5, 4], [7, 6]],
    [[i] for i in range(8)],
]
# Sums of some 40 float64 terms of about 1 in different orders.
TOLERANCE = {"rtol": 0, "atol": 1e-14}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A global batch of sequences; every field is a list with one tensor per sequence."""

    logprobs: list[Tensor]
    old: list[Tensor]
    sampled: list[Tensor]
    reference: list[Tensor]
    entropy: list[Tensor]
    advantages: list[float]
    weights: list[float]


def make_config(name: str) -> ObjectiveConfig:
    name, _, level = name.partition(" ")
    return ObjectiveConfig(
        name=name,
        # Wide enough that some of gspo's sequence ratios are clipped and some are not.
        clip_low=0.1,
        clip_high=0.15,
        max_response_length=12 if name == "dr_grpo" else None,
        kl_coefficient=0.3,
        entropy_coefficient=0.2,
        dual_clip=1.2 if level else None,
        correction=CorrectionConfig(kind="mask", level=level, low=0.6, high=1.4) if level else None,
    ).resolved()


def make_batch(config: ObjectiveConfig) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def sample() -> list[Tensor]:
        return [torch.randn(n, dtype=torch.float64, generator=generator) for n in LENGTHS]

    logprobs = [-x.abs() - 0.5 for x in sample()]
    return Batch(
        logprobs=logprobs,
        old=[x + 0.3 * y for x, y in zip(logprobs, sample(), strict=True)],
        sampled=[x + 0.2 * y for x, y in zip(logprobs, sample(), strict=True)],
        reference=[x + 0.5 * y for x, y in zip(logprobs, sample(), strict=True)],
        entropy=[x.abs() for x in sample()],
        advantages=np.random.default_rng(0).normal(size=len(LENGTHS)).tolist(),
        weights=token_weights(
            LENGTHS, config.aggregation, max_response_length=config.max_response_length
        ).tolist(),
    )


def run_microbatch(
    batch: Batch, sequences: list[int], config: ObjectiveConfig
) -> tuple[Tensor, list[Tensor], PolicyMetrics]:
    """Loss, gradient of each of these sequences' log-probabilities and entropies, metrics."""

    def entries(values: list[Tensor]) -> Tensor:
        return torch.cat([torch.zeros(0, dtype=torch.float64), *(values[i] for i in sequences)])

    ids = torch.repeat_interleave(torch.tensor([LENGTHS[i] for i in sequences], dtype=torch.int64))
    logprobs = entries(batch.logprobs).requires_grad_()
    entropy = entries(batch.entropy).requires_grad_()
    loss, metrics = policy_loss(
        logprobs,
        old_logprobs=entries(batch.old),
        advantages=torch.tensor([batch.advantages[i] for i in sequences], dtype=torch.float64)[ids],
        weights=torch.tensor([batch.weights[i] for i in sequences], dtype=torch.float64)[ids],
        sequence_ids=ids,
        num_sequences=len(sequences),
        config=config,
        sampled_logprobs=entries(batch.sampled) if config.correction else None,
        reference_logprobs=entries(batch.reference),
        entropy=entropy,
    )
    gradients = torch.stack(torch.autograd.grad(loss, (logprobs, entropy)))
    return loss.detach(), gradients.split([LENGTHS[i] for i in sequences], dim=1), metrics


@pytest.mark.parametrize("split", SPLITS[1:], ids=["three", "one empty", "each alone"])
@pytest.mark.parametrize("name", NAMES + CORRECTED)
def test_microbatches_add_up_to_the_whole_batch(name, split):
    config = make_config(name)
    batch = make_batch(config)
    whole_loss, whole_gradients, whole_metrics = run_microbatch(batch, SPLITS[0][0], config)
    assert 0 < whole_metrics.means()["clip_fraction"] < 1
    if config.correction is not None:
        assert 0 < whole_metrics.means()["correction_changed_fraction"] < 1

    loss = torch.zeros((), dtype=torch.float64)
    metrics = PolicyMetrics.zeros()
    for sequences in split:
        part, gradients, part_metrics = run_microbatch(batch, sequences, config)
        loss += part
        metrics += part_metrics
        for sequence, gradient in zip(sequences, gradients, strict=True):
            torch.testing.assert_close(gradient, whole_gradients[sequence], **TOLERANCE)
    torch.testing.assert_close(loss, whole_loss, **TOLERANCE)
    assert metrics.means() == pytest.approx(whole_metrics.means(), rel=1e-13)


def _losses_of_a_rank(rank: int, world_size: int, names: list[str]) -> list[tuple[Tensor, Tensor]]:
    """Each rank computes its own microbatches; what it returns is added up over the ranks."""
    results = []
    for name in names:
        config = make_config(name)
        batch = make_batch(config)
        loss, metrics = torch.zeros((), dtype=torch.float64), PolicyMetrics.zeros()
        gradients = [torch.zeros(2, n, dtype=torch.float64) for n in LENGTHS]
        for sequences in SPLITS[1][rank::world_size]:
            part, part_gradients, part_metrics = run_microbatch(batch, sequences, config)
            loss, metrics = loss + part, metrics + part_metrics
            for sequence, gradient in zip(sequences, part_gradients, strict=True):
                gradients[sequence] += gradient
        sums = torch.cat([loss[None], metrics.stack(), torch.cat(gradients, dim=1).flatten()])
        dist.all_reduce(sums)
        results.append(sums)
    return results


def test_ranks_add_up_to_the_whole_batch():
    first, second = run_distributed(_losses_of_a_rank, 2, NAMES + CORRECTED)
    for name, sums, same_sums in zip(NAMES + CORRECTED, first, second, strict=True):
        assert torch.equal(sums, same_sums)
        config = make_config(name)
        loss, gradients, metrics = run_microbatch(make_batch(config), SPLITS[0][0], config)
        whole = torch.cat([loss[None], metrics.stack(), torch.cat(gradients, dim=1).flatten()])
        torch.testing.assert_close(sums, whole, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", NAMES + CORRECTED)
def test_positions_shared_by_sequences_equal_repeated_positions(name):
    # Sequences 0 and 1 share two trained tokens, then branch; sequence 2 shares nothing.
    paths = [[0, 1, 2, 3], [0, 1, 4], [5, 6]]
    lengths = [len(path) for path in paths]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 6, dtype=torch.float64, generator=generator)
    weight = torch.randn(11, 6, dtype=torch.float64, generator=generator)
    labels = torch.randint(11, (7,), generator=generator)
    positions = torch.tensor([p for path in paths for p in path])
    ids = torch.repeat_interleave(torch.tensor(lengths))
    config = make_config(name)
    weights = token_weights(
        lengths, config.aggregation, max_response_length=config.max_response_length
    )
    moved = 0.3 * torch.randn(3, 7, dtype=torch.float64, generator=generator)

    def run(shared: bool) -> tuple[Tensor, Tensor, Tensor]:
        rows = hidden.clone().requires_grad_()
        output = weight.clone().requires_grad_()
        select = slice(None) if shared else positions
        logprobs, entropy = vocab_parallel_log_probs(
            rows[select], output, labels[select], group=None, with_entropy=True
        )
        if shared:
            logprobs, entropy = logprobs[positions], entropy[positions]
        old, reference, sampled = (logprobs.detach() + moved[:, positions]).unbind()
        loss, _ = policy_loss(
            logprobs,
            old_logprobs=old,
            advantages=torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)[ids],
            weights=torch.from_numpy(weights)[ids],
            sequence_ids=ids,
            num_sequences=3,
            config=config,
            sampled_logprobs=sampled if config.correction else None,
            reference_logprobs=reference,
            entropy=entropy,
        )
        return loss.detach(), *torch.autograd.grad(loss, (rows, output))

    for shared, repeated in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(shared, repeated, **TOLERANCE)

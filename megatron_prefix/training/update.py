"""What a rollout batch does to the policy: log-probabilities, optimizer steps, their metrics."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.config import RunConfig
from megatron_prefix.distributed.agreement import check_equal_across_ranks
from megatron_prefix.distributed.rank_results import raise_together
from megatron_prefix.distributed.runtime import Runtime
from megatron_prefix.layout import Packing
from megatron_prefix.model.build import ModelChunks
from megatron_prefix.objective import ObjectiveConfig, PolicyMetrics
from megatron_prefix.objective.losses import OBJECTIVES
from megatron_prefix.rollouts.records import RolloutBatch, RolloutSummary
from megatron_prefix.training.batch_statistics import BatchStatistics, TeachingWatch, reward_spread
from megatron_prefix.training.kl_reward import put_kl_into_advantages
from megatron_prefix.training.minibatch import Minibatch
from megatron_prefix.training.other_policy import OtherPolicyWatch
from megatron_prefix.training.phases import Phases
from megatron_prefix.training.shares import Distribution
from megatron_prefix.training.step import compute_logprobs, reduce_sums, train_step
from megatron_prefix.training.step_plan import StepPlan, plan_rollouts


class ReferencePolicy:
    """A frozen copy of the weights that the KL term compares with."""

    def __init__(self, chunks: ModelChunks) -> None:
        self._of_model = [parameter for _, parameter in chunks.named_parameters()]
        self._weights = [parameter.detach().clone() for parameter in self._of_model]
        for bias in chunks.expert_biases():
            self._of_model.append(bias)
            # Megatron makes them float32 with the first batch, whatever the model's dtype.
            self._weights.append(bias.detach().float().clone())

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the model has the reference weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the model's weights."""
        for own, weight in zip(self._of_model, self._weights, strict=True):
            weight.copy_(own)

    @torch.no_grad()
    def _swap(self) -> None:
        for own, weight in zip(self._of_model, self._weights, strict=True):
            current = own.detach().clone()
            own.copy_(weight)
            weight.copy_(current)


class PolicyUpdate:
    """Trains the policy on rollout batches, on this process."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        chunks: ModelChunks,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        *,
        packing: Packing,
        attention: AttentionSetup,
    ) -> None:
        """Nothing is trained yet.

        Args:
            config: of the run; read are `training` and `objective`.
            runtime: the process's place.
            chunks: the policy.
            optimizer, scheduler: of the policy.
            packing: of the run.
            attention: of the policy.
        """
        self.reference: ReferencePolicy | None = None
        """What the KL term compares with."""
        self._training, self._objective = config.training, config.objective
        self._runtime = runtime
        self._chunks = chunks
        self._optimizer, self._scheduler = optimizer, scheduler
        self.packing, self.attention = packing, attention
        self.phases = Phases()
        """Where the time goes; what runs beside the update may be measured too."""
        self._watch = TeachingWatch()
        self._other_policy = OtherPolicyWatch()
        self._distribution = Distribution(runtime.data_parallel_rank, runtime.device)

    def minibatches(
        self, batch: RolloutBatch | None, summary: RolloutSummary, *, step: int
    ) -> list[Minibatch]:
        """This rank's microbatches of each optimizer step of a rollout batch. Collective.

        Args:
            batch, summary, step: as for `train_on`.

        Raises:
            ValueError: a group that cannot be trained on.
        """
        with raise_together():
            plan = plan_rollouts(
                summary,
                self._objective,
                self.packing,
                num_steps=self._training.optimizer_steps_per_rollout,
            )
        check_equal_across_ranks(
            f"step {step}: the plan of the rollout batch", plan.fingerprint(), group=None
        )
        share = self._distribution.scatter(batch, plan.shares)
        minibatches = [
            Minibatch(
                part,
                share,
                self.packing,
                attention=self.attention,
                data_parallel_rank=self._runtime.data_parallel_rank,
            )
            for part in plan.steps
        ]
        group = self._runtime.context_parallel_group
        if group is not None:
            check_equal_across_ranks(
                f"step {step}: how packed rows are distributed",
                "; ".join(minibatch.distribution() for minibatch in minibatches),
                group=group,
            )
        return minibatches

    def train_on(
        self, batch: RolloutBatch | None, summary: RolloutSummary, *, step: int
    ) -> dict[str, Any]:
        """All optimizer steps of one rollout batch. Collective.

        Args:
            batch: the rollouts, on rank 0; None elsewhere.
            summary: of the batch, on every rank.
            step: number of the rollout batch, from 1, as errors name it.

        Returns:
            Its metrics, the same on every rank.

        Raises:
            ValueError: a group that cannot be trained on, rollouts without the log-probabilities
                that a correction needs, or a gradient that is not finite.
        """
        started = time.perf_counter()
        if self._objective.correction is not None and not summary.has_old_logprobs:
            raise ValueError(
                f"{summary.sources[0]}: old_logprobs: missing, and objective.correction compares "
                "the trainer's own with them; have the rollouts bring them, or remove "
                "objective.correction"
            )
        with self.phases.measured("plan"):
            minibatches = self.minibatches(batch, summary, step=step)
        objective = self._objective.at_step(step)
        with self.phases.measured("logprob"):
            passes = self._prepare(minibatches, summary, objective)
        reports: list[list[PolicyMetrics]] = []
        grad_norms = []
        for minibatch in [*minibatches] * self._training.epochs_per_rollout:
            with self.phases.measured("optimizer"):
                result = train_step(
                    self._chunks, self._optimizer, self._scheduler, minibatch.batches, objective
                )
            # The same on every rank, and before anything of this step can be saved.
            if not math.isfinite(result.grad_norm):
                raise ValueError(
                    f"step {step}: the gradient's norm is {result.grad_norm}, and so the weights "
                    "are lost; lower optimizer.lr or look for extreme rewards "
                    f"({_largest_advantage(summary, minibatch.step)}), and continue from the last "
                    "checkpoint"
                )
            reports.append(result.metrics)
            grad_norms.append(result.grad_norm)
        if summary.has_old_logprobs and OBJECTIVES[objective.name].uses_advantages:
            first_step = self._policy_metrics(reports[0])
            if self._runtime.is_main:
                corrects = objective.correction is not None
                self._other_policy.see(first_step, step=step, corrects=corrects)
        statistics = BatchStatistics.of(summary, [m.step for m in minibatches], self._objective)
        if self._runtime.is_main:
            self._watch.see(statistics, step=step)
        return {
            "reward": float(summary.rewards.mean()),
            **reward_spread(summary),
            **{f"reward/{n}": float(values.mean()) for n, values in summary.named_rewards.items()},
            "response_length": float(summary.response_lengths.mean()),
            **statistics.metrics(),
            **self._policy_metrics([report for of_step in reports for report in of_step]),
            "kl_coefficient": objective.kl_coefficient,
            "grad_norm": sum(grad_norms) / len(grad_norms),
            "lr": result.lr,  # of the last optimizer step
            **self._work_metrics(minibatches, started, forward_passes=passes),
            **self.phases.take(),
        }

    def _prepare(
        self, minibatches: Sequence[Minibatch], summary: RolloutSummary, objective: ObjectiveConfig
    ) -> int:
        """Compute what the objective compares the policy with, and say in how many forward passes
        over the rollout batch. Collective."""
        passes = 0
        corrects = objective.correction is not None
        # With a single optimizer step the old policy is the current one.
        needs_old = len(minibatches) * self._training.epochs_per_rollout > 1
        needs_old = needs_old or objective.kl_in == "reward"
        if needs_old and (corrects or not summary.has_old_logprobs):
            passes += 1
            for minibatch in minibatches:
                self._fill(minibatch, "recomputed_logprobs" if corrects else "old_logprobs")
        if self.reference is not None:
            passes += 1
            with self.reference.in_place():
                for minibatch in minibatches:
                    # The experts of the records are those of the policy that sampled.
                    self._fill(minibatch, "reference_logprobs", replays=False)
        if objective.kl_in == "reward":
            put_kl_into_advantages(
                minibatches,
                summary,
                objective,
                device=self._runtime.device,
                contributes=self._runtime.reports_metrics,
            )
        return passes

    def _fill(self, minibatch: Minibatch, name: str, *, replays: bool = True) -> None:
        """Compute a kind of log-probabilities of every microbatch (on the last stage)."""
        found = compute_logprobs(self._chunks, minibatch.batches, self._objective, replays=replays)
        for row, log_probs in zip(minibatch.rows, found, strict=False):
            setattr(row, name, log_probs)

    def _policy_metrics(self, reports: Sequence[PolicyMetrics]) -> dict[str, float]:
        """Reduce the microbatches' sums over ranks into the step's means."""
        total = sum(reports, start=PolicyMetrics.zeros(self._runtime.device))
        sums = reduce_sums(total.stack(), contributes=self._runtime.reports_metrics)
        means = PolicyMetrics.from_stack(sums).means()
        if not self._objective.needs_entropy:
            del means["entropy"]
        return means

    def _work_metrics(
        self, minibatches: Sequence[Minibatch], started: float, *, forward_passes: int
    ) -> dict[str, float]:
        """What all ranks have computed, and how fast.

        Args:
            minibatches: of the rollout batch.
            started: when this process began with it.
            forward_passes: over the batch, beside those that were trained on.
        """
        own = torch.tensor(
            [
                sum(minibatch.packed_tokens for minibatch in minibatches),
                sum(minibatch.flops for minibatch in minibatches),
                sum(minibatch.prediction_flops for minibatch in minibatches),
            ],
            dtype=torch.float64,
            device=self._runtime.device,
        )
        # Context-parallel ranks have a part of the same rows.
        own /= self.attention.num_ranks
        sums = reduce_sums(own, contributes=self._runtime.reports_metrics)
        packed, flops, predicted = sums.tolist()
        packed = round(packed)
        seconds = time.perf_counter() - started
        ungrouped = sum(minibatch.step.ungrouped_tokens for minibatch in minibatches)
        ungrouped_flops = sum(minibatch.step.ungrouped_flops for minibatch in minibatches)
        # Backward has twice the matrix products of forward; what is recomputed does not count.
        computed = 3 * self._training.epochs_per_rollout * flops
        computed += forward_passes * (flops - predicted)
        ranks = self._runtime.world_size
        tflops_per_second = computed / 1e12 / seconds / ranks
        peak = self._training.peak_tflops
        return {
            "tokens_computed": packed,
            "tokens_ungrouped": ungrouped,
            "flops_saved_fraction": 1.0 - flops / ungrouped_flops if ungrouped_flops else 0.0,
            "train_seconds": seconds,
            "tokens_per_second": packed / seconds,
            "ungrouped_tokens_per_second": ungrouped / seconds,
            "tokens_per_second_per_gpu": packed / seconds / ranks,
            "tflops_per_second_per_gpu": tflops_per_second,
            **({} if peak is None else {"mfu": tflops_per_second / peak}),
        }


def _largest_advantage(summary: RolloutSummary, step: StepPlan) -> str:
    """The advantage of an optimizer step that is farthest from 0, and whose it is, in words."""
    index = int(np.abs(step.advantages).argmax())
    response = step.first_response + index
    group = int(np.searchsorted(summary.group_offsets, response, side="right")) - 1
    return (
        f"the advantage farthest from 0 is {step.advantages[index]:.3g}, in "
        f"{summary.sources[group]}: responses[{response - summary.group_offsets[group]}]"
    )

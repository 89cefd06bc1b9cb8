"""The GRPO loop: rollouts, old and reference log-probabilities, optimizer steps, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_prefix.checkpoints.folder import CheckpointFolder
from megatron_prefix.checkpoints.initial_weights import check_initial_weights
from megatron_prefix.checkpoints.weights import load_weights
from megatron_prefix.config import RunConfig, config_summary
from megatron_prefix.distributed.agreement import check_equal_across_ranks
from megatron_prefix.distributed.rank_results import raise_together
from megatron_prefix.distributed.runtime import Runtime
from megatron_prefix.distributed.stop import StopRequest
from megatron_prefix.model.build import ModelChunks, build_model_chunks, model_shape
from megatron_prefix.objective import PolicyMetrics
from megatron_prefix.rollouts.build import build_engine, build_evaluator
from megatron_prefix.rollouts.engine import EndOfRollouts
from megatron_prefix.rollouts.records import RolloutGroup
from megatron_prefix.training.kernel_check import check_kernel_of_run
from megatron_prefix.training.metrics import MetricsLog, plot_reward, read_metrics
from megatron_prefix.training.minibatch import (
    Minibatch,
    build_minibatch,
    split_groups,
)
from megatron_prefix.training.optimizer import (
    build_optimizer,
    build_scheduler,
    settings_in_use,
    warn_of_ended_schedule,
)
from megatron_prefix.training.packing import packing_of_run
from megatron_prefix.training.report import progress, report_end, report_start
from megatron_prefix.training.step import compute_logprobs, reduce_sums, train_step
from megatron_prefix.training.waiting import read_waiting, write_waiting

logger = logging.getLogger(__name__)

_SIGNALS = 128  # more than there are


class ReferencePolicy:
    """A frozen copy of the weights that the KL term compares with."""

    def __init__(self, chunks: ModelChunks) -> None:
        self._parameters = [parameter for _, parameter in chunks.named_parameters()]
        self._weights = [parameter.detach().clone() for parameter in self._parameters]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the model has the reference weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, weight in zip(self._parameters, self._weights, strict=True):
            current = parameter.detach().clone()
            parameter.copy_(weight)
            weight.copy_(current)


class Trainer:
    """One run, on this process."""

    def __init__(
        self, config: RunConfig, runtime: Runtime, *, stop: StopRequest | None = None
    ) -> None:
        """Build everything and load the latest checkpoint.

        Args:
            stop: when it is made on any rank, `run` saves and returns.
        """
        self.config = config
        self._stop = stop
        self.runtime = runtime
        self.chunks = build_model_chunks(
            config.model,
            config.parallel,
            config.training,
            use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
        )
        check_kernel_of_run(config.training, self.chunks.config, runtime.device)
        self.optimizer = build_optimizer(config.optimizer, self.chunks)
        self.scheduler = build_scheduler(
            config.optimizer,
            self.optimizer,
            total_steps=config.training.optimizer_steps,
        )
        self.packing = packing_of_run(
            config.training,
            config.parallel,
            model_shape=model_shape(config.model, self.chunks.config),
            data_parallel_size=runtime.data_parallel_size,
        )
        with raise_together():
            self.engine = build_engine(config, self.chunks, runtime)
            self.evaluator = build_evaluator(config, self.chunks, runtime)
        self.checkpoints = CheckpointFolder(
            config.output.directory / "checkpoints",
            keep=config.output.keep,
            writer=config.output.checkpoint_writer,
        )
        self.step = 0
        self._weights = "random weights"
        """Where they are from, in words."""
        self.stopped = False
        """Whether `run` has returned because it was asked to."""
        self._waiting: list[RolloutGroup] | None = None  # rollouts that are not trained on yet
        self.reference: ReferencePolicy | None = None
        self._restore()

    def _restore(self) -> None:
        """Weights to start from, the reference policy, then the latest checkpoint."""
        output = self.config.output
        if output.resume:
            self.checkpoints.begin()
        resuming = output.resume and self.checkpoints.latest_step() is not None
        if output.load is not None and not resuming:
            check_initial_weights(output.load, self.config.model, self.chunks)
            load_weights(output.load, self.chunks, self.optimizer)
            self._weights = f"weights of {output.load}"
        if not resuming:
            self.checkpoints.set_aside()
        if self.config.objective.kl_coefficient > 0:
            if resuming:
                if not self.checkpoints.reference_path.is_dir():
                    raise ValueError(
                        f"objective.kl_coefficient: {self.config.objective.kl_coefficient}, but "
                        f"the run in {output.directory} began with 0 and has not kept the weights "
                        "that it started from, which are the reference; set it to 0, or begin anew "
                        "in another output.directory"
                    )
                load_weights(self.checkpoints.reference_path, self.chunks, self.optimizer)
            else:
                self.checkpoints.save_reference(self.chunks)
            self.reference = ReferencePolicy(self.chunks)
        if resuming:
            settings = self.config.optimizer
            keep_settings = settings.on_resume == "checkpoint"
            state = self.checkpoints.load_latest(
                self.chunks,
                self.optimizer,
                self.scheduler,
                keep_settings=keep_settings,
                remaining_steps=None if settings.lr_decay_steps else self._steps_behind,
            )
            if keep_settings:
                settings = settings_in_use(settings, self.optimizer, self.scheduler)
                self.config = dataclasses.replace(self.config, optimizer=settings)
            self.step = state["step"]
            warn_of_ended_schedule(self.scheduler, self._steps_behind(self.step))
            self._weights = f"resumed after step {self.step} ({self.checkpoints.path(self.step)})"
            if output.load is not None:
                self._weights += f", output.load: {output.load} is not used"
            with raise_together():
                waiting = read_waiting(self.checkpoints.path(self.step))
            if waiting is not None:
                self._waiting, state["engine"] = waiting
            self.engine.load_state_dict(state["engine"])

    def _steps_behind(self, step: int) -> int:
        """Optimizer steps that the run still takes when rollout batch `step` is done."""
        training = self.config.training
        return training.optimizer_steps_of(max(training.steps - step, 0))

    def run(self) -> dict[str, Any]:
        """Train to the configured number of steps, or until a stop is requested.

        Returns:
            The last step's metrics, the same on every rank.
        """
        config, output = self.config, self.config.output
        began, why = self.step, ""
        report_start(config, self.runtime, self.chunks, weights=self._weights, step=began)
        log = None
        if self.runtime.is_main:
            log = MetricsLog(
                output.directory, resume_after=self.step, tensorboard=output.tensorboard
            )
        metrics: dict[str, Any] = {}
        saved_step = self.step
        try:
            with self._progress() as advance:
                if self.evaluator is not None and self.step == 0:
                    metrics = {"eval": self._evaluate()}
                    self._log(log, 0, metrics)
                while self.step < config.training.steps:
                    if self._is_to_stop():
                        break
                    groups = self._waiting or self._next_groups()
                    if groups is None:
                        why = "the rollouts have ended"
                        break
                    self._waiting = groups
                    if self._is_to_stop():
                        break
                    metrics = {**self.train_on(groups), **self.engine.metrics()}
                    self._waiting = None
                    self.step += 1
                    if self._evaluates_now():
                        metrics["eval"] = self._evaluate()
                    self._log(log, self.step, metrics)
                    advance(self.step, metrics)
                    if output.save_every and self.step % output.save_every == 0:
                        self._save(background=output.save_in_background)
                        saved_step = self.step
            if saved_step != self.step and (output.save_last or self.stopped):
                self._save(background=False)
            self.checkpoints.finish()
            if self.stopped:
                self._keep_waiting()
        except BaseException:
            self.checkpoints.abandon()
            raise
        finally:
            if log is not None:
                log.close()
            self.engine.close()
        # No rank is gone before all have closed what they hold.
        dist.barrier()
        if self.runtime.is_main and output.plot and not self.stopped:
            plot_reward(
                read_metrics(output.directory / "metrics.jsonl"), output.directory / "reward.png"
            )
        if self.runtime.is_main:
            why = "it was asked to stop; start the run again to go on" if self.stopped else why
            report_end(config, self.checkpoints, began=began, step=self.step, why=why)
        return metrics

    def _is_to_stop(self) -> bool:
        """Between two steps: complete a checkpoint that is written; whether any rank is to stop."""
        self.checkpoints.poll()
        if self._stop is None:
            return False
        # The largest of rank and signal in one number: one small reduction.
        number = 0 if self._stop.signal is None else self._stop.signal
        request = torch.tensor(
            number and (self.runtime.rank + 1) * _SIGNALS + number, device=self.runtime.device
        )
        dist.all_reduce(request, op=dist.ReduceOp.MAX)
        rank, number = divmod(int(request), _SIGNALS)
        self.stopped = rank > 0
        if self.stopped and self.runtime.is_main:
            logger.warning(
                "rank %d has got %s: stopping after step %d of %d; start the run again to continue",
                *(rank - 1, signal.Signals(number).name, self.step, self.config.training.steps),
            )
        return self.stopped

    def _keep_waiting(self) -> None:
        """Write rollouts that were made and not trained on beside the checkpoint."""
        path = self.checkpoints.path(self.step)
        if self.runtime.is_main and self._waiting is not None and path.is_dir():
            write_waiting(path, self._waiting, self.engine.state_dict())

    @contextlib.contextmanager
    def _failing_together(self) -> Iterator[None]:
        """`raise_together`, and the checkpoint that is being written is completed."""
        try:
            with raise_together():
                yield
        except ValueError:
            self.checkpoints.finish()
            raise

    def _next_groups(self) -> list[RolloutGroup] | None:
        """The next rollout batch; None at the end of the rollouts."""
        groups = None
        with self._failing_together():
            try:
                groups = self.engine.next_groups(
                    self.config.rollouts.groups_per_step, step=self.step
                )
            except EndOfRollouts as end:
                logger.info("stopping after step %d: %s", self.step, end)
        check_equal_across_ranks(
            f"step {self.step + 1}: whether there are rollouts",
            str(groups is not None),
            group=None,
        )
        return groups

    def _evaluate(self) -> float:
        assert self.evaluator is not None
        with self._failing_together():
            score = self.evaluator.evaluate()
        return score

    def train_on(self, groups: Sequence[RolloutGroup]) -> dict[str, Any]:
        """All optimizer steps of one rollout batch; returns its metrics.

        Raises:
            ValueError: a group that cannot be trained on, or a gradient that is not finite.
        """
        started = time.perf_counter()
        training = self.config.training
        with self._failing_together():
            minibatches = [
                build_minibatch(
                    part,
                    self.config.objective,
                    self.packing,
                    data_parallel_rank=self.runtime.data_parallel_rank,
                    device=self.runtime.device,
                    kernel=training.kernel,
                    deterministic=training.deterministic,
                    context_parallel_group=self.runtime.context_parallel_group,
                )
                for part in split_groups(groups, training.optimizer_steps_per_rollout)
            ]
        check_equal_across_ranks(
            f"step {self.step + 1}: the plan of the rollout batch",
            _fingerprint(groups, minibatches),
            group=None,
        )
        if self.runtime.context_parallel_group is not None:
            check_equal_across_ranks(
                f"step {self.step + 1}: how packed rows are distributed",
                "; ".join(minibatch.distribution() for minibatch in minibatches),
                group=self.runtime.context_parallel_group,
            )
        # With a single optimizer step the old policy is the current one.
        if len(minibatches) * training.epochs_per_rollout > 1:
            for minibatch in minibatches:
                if not minibatch.knows_old_logprobs:
                    self._fill(minibatch, "old_logprobs")
        if self.reference is not None:
            with self.reference.in_place():
                for minibatch in minibatches:
                    self._fill(minibatch, "reference_logprobs")
        reports: list[PolicyMetrics] = []
        grad_norms = []
        for _ in range(training.epochs_per_rollout):
            for minibatch in minibatches:
                result = train_step(
                    self.chunks,
                    self.optimizer,
                    self.scheduler,
                    minibatch.batches,
                    self.config.objective,
                )
                # The same on every rank, and before anything of this step can be saved.
                if not math.isfinite(result.grad_norm):
                    self.checkpoints.finish()
                    raise ValueError(
                        f"step {self.step + 1}: the gradient's norm is {result.grad_norm}, and "
                        "so the weights are lost; look for extreme old_logprobs or lower "
                        "optimizer.lr, and continue from the last checkpoint"
                    )
                reports += result.metrics
                grad_norms.append(result.grad_norm)
        return {
            **self._rollout_metrics(groups),
            **self._policy_metrics(reports),
            "grad_norm": sum(grad_norms) / len(grad_norms),
            "lr": result.lr,  # of the last optimizer step
            **self._work_metrics(minibatches, time.perf_counter() - started),
        }

    def _fill(self, minibatch: Minibatch, name: str) -> None:
        """Compute a kind of log-probabilities of every microbatch (on the last stage)."""
        found = compute_logprobs(self.chunks, minibatch.batches, self.config.objective)
        for batch, log_probs in zip(minibatch.batches, found, strict=False):
            setattr(batch, name, log_probs)

    def _rollout_metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        rewards = [reward for group in groups for reward in group.rewards]
        lengths = [len(response) for group in groups for response in group.responses]
        return {
            "reward": sum(rewards) / len(rewards),
            "response_length": sum(lengths) / len(lengths),
        }

    def _policy_metrics(self, reports: Sequence[PolicyMetrics]) -> dict[str, float]:
        """Reduce the microbatches' sums over ranks into the step's means."""
        total = sum(reports, start=PolicyMetrics.zeros(self.runtime.device))
        sums = reduce_sums(total.stack(), contributes=self.runtime.reports_metrics)
        return PolicyMetrics.from_stack(sums).means()

    def _work_metrics(self, minibatches: Sequence[Minibatch], seconds: float) -> dict[str, float]:
        packed = sum(minibatch.packed_tokens for minibatch in minibatches)
        ungrouped = sum(minibatch.ungrouped_tokens for minibatch in minibatches)
        flops = sum(minibatch.flops for minibatch in minibatches)
        ungrouped_flops = sum(minibatch.ungrouped_flops for minibatch in minibatches)
        return {
            "tokens_computed": packed,
            "tokens_ungrouped": ungrouped,
            "flops_saved_fraction": 1.0 - flops / ungrouped_flops,
            "train_seconds": seconds,
            "tokens_per_second": packed / seconds,
            "ungrouped_tokens_per_second": ungrouped / seconds,
        }

    def _evaluates_now(self) -> bool:
        if self.evaluator is None:
            return False
        every = self.config.evaluation.every
        return self.step == self.config.training.steps or bool(every and self.step % every == 0)

    def _log(self, log: MetricsLog | None, step: int, metrics: dict[str, Any]) -> None:
        if log is not None:
            log.write(step, metrics)

    def _save(self, *, background: bool) -> None:
        self.checkpoints.save(
            self.step,
            self.chunks,
            self.optimizer,
            self.scheduler,
            state={
                "step": self.step,
                "engine": self.engine.state_dict(),
                "config": config_summary(self.config),
            },
            background=background,
        )

    def _progress(self) -> contextlib.AbstractContextManager[Callable[..., None]]:
        """Shows each step on rank 0; elsewhere nothing."""
        if self.runtime.is_main:
            return progress(self.config, self.step)
        return contextlib.nullcontext(lambda step, metrics: None)


def _fingerprint(groups: Sequence[RolloutGroup], minibatches: Sequence[Minibatch]) -> str:
    """A short hash of the rollouts and of the plan, equal on ranks that hold the same."""
    digest = hashlib.sha256()
    for group in groups:
        digest.update(repr(dataclasses.astuple(group)).encode())
    for minibatch in minibatches:
        digest.update(minibatch.plan.fingerprint().encode())
    return digest.hexdigest()[:16]

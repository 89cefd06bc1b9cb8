"""The GRPO loop: rollouts, updates of the policy, evaluations, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_prefix.attention.comm_types import model_comm_types
from megatron_prefix.attention.row_attention import (
    AttentionSetup,
    has_mrope,
    recurrence_width,
)
from megatron_prefix.attention.windows import model_window
from megatron_prefix.checkpoints.folder import CheckpointFolder
from megatron_prefix.checkpoints.initial_weights import check_initial_weights
from megatron_prefix.checkpoints.weights import load_weights
from megatron_prefix.config import RunConfig, config_summary
from megatron_prefix.config.packing import packing_of_run
from megatron_prefix.distributed.rank_results import raise_together, rank_0_alone
from megatron_prefix.distributed.runtime import Runtime
from megatron_prefix.distributed.stop import StopRequest
from megatron_prefix.model.build import build_model_chunks, model_shape
from megatron_prefix.rollouts.build import build_engine, build_evaluator
from megatron_prefix.rollouts.parts import ALL_RECORDS, RolloutParts
from megatron_prefix.training.kernel_check import check_delta_rule_of_run, check_kernel_of_run
from megatron_prefix.training.metrics import plot_reward, read_metrics
from megatron_prefix.training.next_rollouts import NextRollouts
from megatron_prefix.training.optimizer import (
    build_optimizer,
    build_scheduler,
    settings_in_use,
    warn_of_ended_schedule,
)
from megatron_prefix.training.report import progress, report_end, report_start
from megatron_prefix.training.run_log import RunLog
from megatron_prefix.training.update import PolicyUpdate, ReferencePolicy

logger = logging.getLogger(__name__)

_SIGNALS = 128  # more than there are


class Trainer:
    """One run, on this process."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        *,
        stop: StopRequest | None = None,
        writes: bool = True,
    ) -> None:
        """Build everything and load the latest checkpoint.

        Args:
            stop: when it is made on any rank, `run` saves and returns.
            writes: False where the run is only checked: all records are looked at, nothing in its
                folder is written, renamed or removed, and `run` is not called.
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
        kernel = check_kernel_of_run(config.training, self.chunks.config, runtime.device)
        delta_rule = check_delta_rule_of_run(config.training, self.chunks.config, runtime.device)
        self.optimizer = build_optimizer(config.optimizer, self.chunks)
        self.scheduler = build_scheduler(
            config.optimizer,
            self.optimizer,
            total_steps=config.training.optimizer_steps,
        )
        self.update = PolicyUpdate(
            config,
            runtime,
            self.chunks,
            self.optimizer,
            self.scheduler,
            packing=packing_of_run(
                config.training,
                config.parallel,
                model_shape=model_shape(config.model, self.chunks.config),
                data_parallel_size=runtime.data_parallel_size,
            ),
            attention=AttentionSetup(
                device=runtime.device,
                kernel=kernel,
                deterministic=config.training.deterministic,
                context_parallel_group=runtime.context_parallel_group,
                comm_types=model_comm_types(self.chunks.config),
                window=model_window(self.chunks.config),
                recurrence_width=recurrence_width(self.chunks.config),
                delta_rule=delta_rule,
                mrope=has_mrope(self.chunks.config),
            ),
        )
        self.rollouts = RolloutParts(config, is_main=runtime.is_main)
        with raise_together(name_rank="others"):
            self.engine = build_engine(self.rollouts, self.chunks, runtime)
            self.evaluator = build_evaluator(self.rollouts, self.chunks, runtime)
        at_most = config.rollouts.check_records if writes else ALL_RECORDS
        self.survey = rank_0_alone(lambda: self.rollouts.survey(at_most))
        """Of the records that were looked at, on rank 0."""
        self.checkpoints = CheckpointFolder(
            config.output.directory / "checkpoints",
            keep=config.output.keep,
            writer=config.output.checkpoint_writer,
        )
        self.next = NextRollouts(config, self.engine, self.checkpoints)
        self._log: RunLog | None = None
        """On rank 0, while it runs."""
        self.step = 0
        self.weights = "random weights"
        """Where they are from, in words."""
        self.best: tuple[int, float] | None = None
        """Step and `eval` of the best evaluation so far."""
        self.stopped = False
        """Whether `run` has returned because it was asked to."""
        self._restore(writes=writes)

    def _restore(self, *, writes: bool) -> None:
        """Weights to start from, the reference policy, then the latest checkpoint."""
        output = self.config.output
        if output.resume and writes:
            self.checkpoints.begin()
        resuming = output.resume and self.checkpoints.latest_step() is not None
        if output.load is not None and not resuming:
            check_initial_weights(output.load, self.config.model, self.chunks)
            load_weights(output.load, self.chunks, self.optimizer)
            self.weights = f"weights of {output.load}"
        if not resuming and writes:
            self.checkpoints.set_aside()
        if self.config.objective.kl_coefficient > 0:
            self._begin_reference(resuming=resuming, writes=writes)
        if resuming:
            self._resume()

    def _begin_reference(self, *, resuming: bool, writes: bool) -> None:
        """Have the reference policy: the weights that the run started from, or has taken since."""
        if resuming:
            path = self.checkpoints.reference_path(self.checkpoints.latest_step() or 0)
            if path is None:
                coefficient = self.config.objective.kl_coefficient
                raise ValueError(
                    f"objective.kl_coefficient: {coefficient}, but the run in "
                    f"{self.config.output.directory} began with 0 and has not kept the weights "
                    "that it started from, which are the reference; set it to 0, or begin anew in "
                    "another output.directory"
                )
            load_weights(path, self.chunks, self.optimizer)
        elif writes:
            self.checkpoints.save_reference(self.chunks, step=0)
        self.update.reference = ReferencePolicy(self.chunks)

    def _resume(self) -> None:
        """Go on from the latest checkpoint, with the rollouts that were made after it."""
        output, settings = self.config.output, self.config.optimizer
        keep_settings = settings.on_resume == "checkpoint"
        state = self.checkpoints.load_latest(
            self.chunks,
            self.optimizer,
            self.scheduler,
            keep_settings=keep_settings,
            remaining_steps=None if settings.lr_decay_steps else self._steps_behind,
        )
        # A checkpoint may hold more than has been loaded, and options that no weights show.
        path = self.checkpoints.path(state["step"])
        check_initial_weights(path, self.config.model, self.chunks)
        if keep_settings:
            settings = settings_in_use(settings, self.optimizer, self.scheduler)
            self.config = dataclasses.replace(self.config, optimizer=settings)
        self.step = state["step"]
        if state.get("best") is not None:
            self._take_as_best(*state["best"])
        warn_of_ended_schedule(self.scheduler, self._steps_behind(self.step))
        self.weights = f"resumed after step {self.step} ({path})"
        if output.load is not None:
            self.weights += f", output.load: {output.load} is not used"
        waiting = self.next.take_waiting(path)
        with raise_together():
            self.engine.load_state_dict(state["engine"] if waiting is None else waiting)

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
        report_start(config, self.runtime, self.chunks, weights=self.weights, step=began)
        with raise_together(name_rank=False):
            if self.runtime.is_main:
                self._log = RunLog(config, self.rollouts.read, resume_after=self.step)
        metrics: dict[str, Any] = {}
        saved_step = self.step
        has_failed = True
        try:
            with self._progress() as advance:
                if self.evaluator is not None and self.step == 0:
                    metrics = self._evaluate()
                    self._write(metrics)
                while self.step < config.training.steps:
                    if self._is_to_stop():
                        break
                    if not self._has_rollouts():
                        why = "the rollouts have ended"
                        break
                    if self._is_to_stop():
                        break
                    metrics = self._update()
                    self.step += 1
                    if self._evaluates_now():
                        metrics |= self._evaluate()
                    self._write(metrics)
                    advance(self.step, metrics)
                    self._refresh_reference()
                    is_time = output.save_every and self.step % output.save_every == 0
                    if is_time or self.checkpoints.bests[-1:] == [self.step]:
                        self._save(background=output.save_in_background)
                        saved_step = self.step
            if saved_step != self.step and (output.save_last or self.stopped):
                self._save(background=False)
            self.checkpoints.finish()
            if self.stopped:
                self.next.keep_waiting(self.checkpoints.path(self.step))
            has_failed = False
        except BaseException:
            self.checkpoints.abandon()
            raise
        finally:
            if self._log is not None:
                self._log.close(failed=has_failed)
            self.engine.close()
            if self.evaluator is not None:
                self.evaluator.close()
        # No rank is gone before all have closed what they hold.
        dist.barrier()
        if self.runtime.is_main:
            if output.plot and not self.stopped:
                folder = output.directory
                plot_reward(read_metrics(folder / "metrics.jsonl"), folder / "reward.png")
            why = "it was asked to stop; start the run again to go on" if self.stopped else why
            report_end(
                config, self.checkpoints, began=began, step=self.step, why=why, best=self.best
            )
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

    def _has_rollouts(self) -> bool:
        """Have the next rollout batch made unless it is there; whether there is one. Collective."""
        if self.next.summary is not None:
            return True
        return self.next.make(step=self.step, phases=self.update.phases)

    def _update(self) -> dict[str, Any]:
        """Train on the rollout batch that was made. Collective."""
        batch, summary = self.next.batch, self.next.summary
        assert summary is not None
        if self._log is not None and batch is not None:
            self._log.training_samples(self.step + 1, batch)
        with self.checkpoints.finished_when_refused():
            metrics = self.update.train_on(batch, summary, step=self.step + 1)
        self.next.clear()
        return {**metrics, **self.next.metrics()}

    def _refresh_reference(self) -> None:
        """Take the policy as the reference where it is time. Collective."""
        every = self.config.objective.reference_refresh_steps
        if self.update.reference is not None and every and self.step % every == 0:
            self.checkpoints.save_reference(self.chunks, step=self.step)
            self.update.reference.refresh()

    def _evaluate(self) -> dict[str, float]:
        """Metrics of the policy on prompts that it is not trained on. Collective."""
        assert self.evaluator is not None
        with self.checkpoints.finished_when_refused(), raise_together(name_rank=False):
            started = time.perf_counter()
            score = self.evaluator.evaluate()
            seconds = time.perf_counter() - started
        if self._log is not None and self.evaluator.batch is not None:
            self._log.evaluation(self.step, self.evaluator.batch)
        if self.best is None or score > self.best[1]:
            self._take_as_best(self.step, score)
        return {"eval": score, "eval_seconds": seconds, **self.evaluator.metrics()}

    def _take_as_best(self, step: int, score: float) -> None:
        self.best = (step, score)
        if self.config.output.keep_best:
            self.checkpoints.bests.append(step)

    def _evaluates_now(self) -> bool:
        if self.evaluator is None:
            return False
        every = self.config.evaluation.every
        return self.step == self.config.training.steps or bool(every and self.step % every == 0)

    def _write(self, metrics: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.metrics(self.step, metrics)

    def _save(self, *, background: bool) -> None:
        with self.update.phases.measured("save"):
            self.checkpoints.save(
                self.step,
                self.chunks,
                self.optimizer,
                self.scheduler,
                state={
                    "step": self.step,
                    "engine": self.engine.state_dict(),
                    "best": self.best,
                    "config": config_summary(self.config),
                },
                background=background,
            )

    def _progress(self) -> contextlib.AbstractContextManager[Callable[..., None]]:
        """Shows each step on rank 0; elsewhere nothing."""
        if self.runtime.is_main:
            return progress(self.config, self.step)
        return contextlib.nullcontext(lambda step, metrics: None)

"""All that rank 0 writes of a run beside its checkpoints: metrics, and what the policy says."""

from __future__ import annotations

import json
from typing import Any, Literal

from megatron_prefix.config import RunConfig
from megatron_prefix.rollouts.records import RolloutBatch
from megatron_prefix.training.metrics import MetricsLog, open_lines
from megatron_prefix.training.report import say_above_bar
from megatron_prefix.training.samples import Reader, markdown, samples_of, table
from megatron_prefix.training.trackers import Trackers


class RunLog:
    """Metrics of each step, and some responses every few steps."""

    def __init__(self, config: RunConfig, read: Reader, *, resume_after: int) -> None:
        """Open the files.

        Args:
            config: the run's.
            read: writes tokens as text.
            resume_after: lines of later steps are dropped; 0 starts anew.

        Raises:
            ValueError: a tracker that is not there.
        """
        output = config.output
        self._output = output
        self._read = read
        self._metrics = MetricsLog(
            output.directory, resume_after=resume_after, tensorboard=output.tensorboard
        )
        self._trackers = Trackers(config, continues=resume_after > 0)
        self._samples, self._evaluations = (
            open_lines(output.directory / name, resume_after=resume_after)
            for name in ("samples.jsonl", "evaluations.jsonl")
        )

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Write a step's metrics."""
        self._metrics.write(step, values)
        self._trackers.metrics(step, values)

    def training_samples(self, step: int, batch: RolloutBatch) -> None:
        """Write and show samples of a rollout batch, where it is the step's turn."""
        every = self._output.samples_every
        if every and (step == 1 or step % every == 0):
            self._show(step, "training", batch)

    def evaluation(self, step: int, batch: RolloutBatch) -> None:
        """Write an evaluation's rewards prompt by prompt, and show samples of it."""
        for group, source in enumerate(batch.sources):
            rewards = [float(batch.rewards[response]) for response in batch.responses_of(group)]
            row = {"step": step, "source": source, "rewards": rewards}
            self._evaluations.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._evaluations.flush()
        self._show(step, "evaluation", batch)

    def _show(
        self, step: int, kind: Literal["training", "evaluation"], batch: RolloutBatch
    ) -> None:
        samples = samples_of(batch, self._output.samples, self._read)
        if not samples:
            return
        for sample in samples:
            self._samples.write(json.dumps(sample.as_row(step, kind), ensure_ascii=False) + "\n")
        self._samples.flush()
        self._metrics.write_text(f"samples/{kind}", markdown(samples), step)
        self._trackers.samples(step, kind, samples)
        say_above_bar(
            table(
                samples,
                f"samples of {kind}, step {step} ({len(samples)} of {batch.num_responses} "
                f"responses; {self._output.directory / 'samples.jsonl'})",
            )
        )

    def close(self, *, failed: bool) -> None:
        """Flush and close all files, and end the runs of trackers, which show a failure."""
        self._metrics.close()
        self._samples.close()
        self._evaluations.close()
        self._trackers.close(failed=failed)

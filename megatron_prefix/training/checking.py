"""`--check`: everything that a run needs is built and read, and nothing is trained or written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch.distributed as dist

from megatron_prefix.config import RunConfig
from megatron_prefix.distributed.rank_results import on_rank_0
from megatron_prefix.distributed.runtime import Runtime
from megatron_prefix.training.report import report_start, say
from megatron_prefix.training.step_plan import plan_rollouts
from megatron_prefix.training.token_advantages import with_token_advantages
from megatron_prefix.training.trainer import Trainer

_READ_AT_ONCE = 256
"""Groups or prompts."""


@dataclass(frozen=True, kw_only=True)
class _Records:
    """What the files of `rollouts.paths` hold."""

    what: str
    """In words: how many there are, and how long."""
    count: int
    """Groups or prompts."""


def check_run(config: RunConfig, runtime: Runtime) -> None:
    """Build the model, load its weights, read all records, and say what was found. Collective.

    A server is not asked, rewards of responses that have not been sampled are not computed, and
    memory for activations is not needed.

    Raises:
        ValueError: what the run would end with, naming the option or the record.
    """
    trainer = Trainer(config, runtime, writes=False)
    try:
        report_start(
            *(config, runtime, trainer.chunks),
            weights=trainer.weights,
            step=trainer.step,
            writes=False,
        )
        lines = on_rank_0(lambda: _lines(trainer))
    finally:
        trainer.engine.close()
        if trainer.evaluator is not None:
            trainer.evaluator.close()
    if runtime.is_main:
        for line in lines:
            say(line)
        say("checked: nothing is wrong with this; nothing was trained or written")
    dist.barrier()


def _lines(trainer: Trainer) -> list[str]:
    rollouts, steps = trainer.config.rollouts, trainer.config.training.steps
    found = _groups(trainer) if rollouts.engine == "file" else _prompts(trainer)
    lines = [f"records: {found.what}"]
    wanted = steps * rollouts.groups_per_step
    if rollouts.epochs is not None and rollouts.epochs * found.count < wanted:
        lasting = rollouts.epochs * found.count // rollouts.groups_per_step
        lines.append(
            f"records: they last for {lasting} of the {steps} steps, with "
            f"rollouts.epochs: {rollouts.epochs} and rollouts.groups_per_step: "
            f"{rollouts.groups_per_step}"
        )
    elif found.count < rollouts.groups_per_step:
        lines.append(
            f"records: a step holds some of them more than once: rollouts.groups_per_step: "
            f"{rollouts.groups_per_step} is more than the {found.count} that there are"
        )
    return lines


def _groups(trainer: Trainer) -> _Records:
    """Read every group, with its rewards, and plan it."""
    objective = trainer.config.objective
    groups, equal, tokens = 0, 0, 0
    sequences: list[int] = []
    for batch in trainer.rollouts.file_engine.batches(_READ_AT_ONCE):
        summary = with_token_advantages(batch, objective).summary()
        plan_rollouts(summary, objective, trainer.update.packing)
        groups += summary.num_groups
        starts = batch.group_offsets[:-1]
        high = np.maximum.reduceat(batch.rewards, starts)
        equal += int((high == np.minimum.reduceat(batch.rewards, starts)).sum())
        tokens += int(summary.response_lengths.sum())
        prompts = np.repeat(summary.prompt_lengths, summary.group_sizes)
        sequences += (prompts + summary.response_lengths).tolist()
    return _Records(
        what=f"{groups:,} groups of {len(sequences):,} responses with {tokens:,} tokens, the "
        f"longest sequence {max(sequences, default=0):,} tokens; in {equal:,} groups all rewards "
        "are equal",
        count=groups,
    )


def _prompts(trainer: Trainer) -> _Records:
    """What the look at every prompt has found."""
    found = trainer.survey
    assert found is not None
    return _Records(
        what=f"{found.records:,} prompts with {found.prompt_tokens:,} tokens, the longest "
        f"{found.longest_prompt:,}; {found.answers:,} have an answer",
        count=found.records,
    )

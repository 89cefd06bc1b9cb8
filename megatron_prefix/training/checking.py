"""`--check`: everything that a run needs is built and read, and nothing is trained or written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist

from megatron_prefix.config import RunConfig
from megatron_prefix.distributed.rank_results import on_rank_0
from megatron_prefix.distributed.runtime import Runtime
from megatron_prefix.layout import Packing
from megatron_prefix.rollouts.build import groups_of_files, prompts_of_files
from megatron_prefix.rollouts.engine import EndOfRollouts
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
        lines = on_rank_0(lambda: _lines(config, trainer.update.packing))
    finally:
        trainer.engine.close()
    if runtime.is_main:
        for line in lines:
            say(line)
        say("checked: nothing is wrong with this; nothing was trained or written")
    dist.barrier()


def _lines(config: RunConfig, packing: Packing) -> list[str]:
    rollouts = config.rollouts
    is_file = rollouts.engine == "file"
    found = _groups(config, packing) if is_file else _prompts(config)
    lines = [f"records: {found.what}"]
    wanted = config.training.steps * rollouts.groups_per_step
    if rollouts.epochs is not None and rollouts.epochs * found.count < wanted:
        steps = rollouts.epochs * found.count // rollouts.groups_per_step
        lines.append(
            f"records: they last for {steps} of the {config.training.steps} steps, with "
            f"rollouts.epochs: {rollouts.epochs} and rollouts.groups_per_step: "
            f"{rollouts.groups_per_step}"
        )
    elif found.count < rollouts.groups_per_step:
        lines.append(
            f"records: a step holds some of them more than once: rollouts.groups_per_step: "
            f"{rollouts.groups_per_step} is more than the {found.count} that there are"
        )
    return lines


def _groups(config: RunConfig, packing: Packing) -> _Records:
    """Read every group, with its rewards, and plan it."""
    engine = groups_of_files(config)
    groups, equal, tokens = 0, 0, 0
    sequences: list[int] = []
    try:
        for batch in _all(lambda count: engine.next_rollouts(count, step=0)):
            assert batch is not None
            summary = with_token_advantages(batch, config.objective).summary()
            plan_rollouts(summary, config.objective, packing)
            groups += summary.num_groups
            starts = batch.group_offsets[:-1]
            high = np.maximum.reduceat(batch.rewards, starts)
            equal += int((high == np.minimum.reduceat(batch.rewards, starts)).sum())
            tokens += int(summary.response_lengths.sum())
            prompts = np.repeat(summary.prompt_lengths, summary.group_sizes)
            sequences += (prompts + summary.response_lengths).tolist()
    finally:
        engine.close()
    return _Records(
        what=f"{groups:,} groups of {len(sequences):,} responses with {tokens:,} tokens, the "
        f"longest sequence {max(sequences, default=0):,} tokens; in {equal:,} groups all rewards "
        "are equal",
        count=groups,
    )


def _prompts(config: RunConfig) -> _Records:
    """Read every prompt."""
    source = prompts_of_files(config)
    lengths: list[int] = []
    answers = 0
    try:
        for prompts in _all(source.take):
            lengths += [len(prompt.tokens) for prompt in prompts]
            answers += sum(prompt.answer is not None for prompt in prompts)
    finally:
        source.close()
    return _Records(
        what=f"{len(lengths):,} prompts with {sum(lengths):,} tokens, the longest "
        f"{max(lengths, default=0):,}; {answers:,} have an answer",
        count=len(lengths),
    )


def _all(take: Callable[[int], object]) -> Iterator:
    """All that there is, in parts: at the end of the files one by one."""
    for count in (_READ_AT_ONCE, 1):
        while True:
            try:
                part = take(count)
            except EndOfRollouts:
                break
            yield part

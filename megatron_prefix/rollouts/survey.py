"""All records are looked at before the first step: what is wrong is said then, and what is there.

A record that only comes up in the second hour would end the run there, and again after a restart.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from megatron_prefix.rollouts.group_reader import ReadGroup
from megatron_prefix.rollouts.prompts import Prompt
from megatron_prefix.rollouts.rewards import RewardFunction, check_answer
from megatron_prefix.rollouts.usable import Usable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Surveyed:
    """What a survey wants to know of one prompt or group."""

    prompt_length: int
    response_lengths: Sequence[int] = ()
    record: Mapping[str, Any]
    """Its fields that are for a reward function only."""


def survey_prompts(
    prompts: Iterable[Prompt],
    reward: RewardFunction | None,
    usable: Usable,
    *,
    at_most: int,
    read_fields: Set[str] = frozenset(),
) -> None:
    """Read prompts, try their answers, and log what there is.

    Args:
        prompts: all of a source, once.
        reward: that their answers are for; None where an environment reads them.
        usable: counts what the source leaves out.
        at_most: records that are read.
        read_fields: beside those of every record.

    Raises:
        ValueError: a record that is wrong, or an answer that the reward cannot compare with.
    """

    def looked_at(prompt: Prompt) -> Surveyed:
        if reward is not None:
            check_answer(reward, prompt.answer, prompt.source)
        return Surveyed(prompt_length=len(prompt.tokens), record=prompt.record)

    _survey("prompts", map(looked_at, prompts), usable, at_most, read_fields)


def survey_groups(
    groups: Iterable[ReadGroup], reward: RewardFunction | None, usable: Usable, *, at_most: int
) -> None:
    """Read finished rollouts, try the answers of those without rewards, and log what there is.

    Raises:
        ValueError: see `survey_prompts`.
    """

    def looked_at(read: ReadGroup) -> Surveyed:
        for part in read.unrewarded:
            assert reward is not None
            check_answer(reward, part.group.answer, part.group.source)
        group = read.batch.group(0)
        return Surveyed(
            prompt_length=len(group.prompt),
            response_lengths=[len(response) for response in group.responses],
            record=group.record,
        )

    _survey("groups", map(looked_at, groups), usable, at_most, frozenset())


def _survey(
    kind: str, found: Iterable[Surveyed], usable: Usable, at_most: int, read_fields: Set[str]
) -> None:
    if at_most == 0:
        return
    usable.left_out.clear()
    count = tokens = longest = responses = response_tokens = 0
    not_read: dict[str, None] = {}
    for item in itertools.islice(found, at_most):
        count += 1
        tokens += item.prompt_length
        longest = max(longest, item.prompt_length)
        responses += len(item.response_lengths)
        response_tokens += sum(item.response_lengths)
        not_read.update(dict.fromkeys(name for name in item.record if name not in read_fields))
    left_out = ", ".join(f"{number} {reason}" for reason, number in usable.left_out.items())
    if count == 0 and left_out:
        raise ValueError(f"rollouts.unusable: leave_out leaves no record: {left_out}")
    said = f"{count} {kind}, {tokens} prompt tokens (the longest has {longest})"
    if responses:
        said += f", {responses} responses of {response_tokens} tokens"
    if count == at_most:
        said = f"the first {said} (rollouts.check_records)"
    logger.info("records: %s; left out: %s", said, left_out or "none")
    if not_read:
        logger.info(
            "records: fields that only a reward function of your own may read: %s",
            ", ".join(not_read),
        )

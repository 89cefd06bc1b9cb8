"""All records are looked at before the first step: what is wrong is said then, and what is there.

A record that only comes up in the second hour would end the run there, and again after a restart.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Set
from dataclasses import dataclass

from megatron_prefix.rollouts.group_reader import ReadGroup
from megatron_prefix.rollouts.prompts import Prompt
from megatron_prefix.rollouts.rewards import RewardFunction, check_answer
from megatron_prefix.rollouts.usable import Usable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What there is."""

    records: int = 0
    """Prompts or groups that can be used."""
    prompt_tokens: int = 0
    longest_prompt: int = 0
    responses: int = 0
    response_tokens: int = 0
    answers: int = 0
    """Records that have one."""

    def plus(self, other: Survey) -> Survey:
        """Of the records of both."""
        sums = {name: value + getattr(other, name) for name, value in vars(self).items()}
        longest = max(self.longest_prompt, other.longest_prompt)
        return Survey(**{**sums, "longest_prompt": longest})


Looked = tuple[Survey, Iterable[str]]
"""At one record, and the fields of it that are for a reward function only."""


def survey_prompts(
    prompts: Iterable[Prompt],
    reward: RewardFunction | None,
    usable: Usable,
    *,
    at_most: int,
    read_fields: Set[str] = frozenset(),
) -> Survey:
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

    def looked_at(prompt: Prompt) -> Looked:
        if reward is not None:
            check_answer(reward, prompt.answer, prompt.source)
        length = len(prompt.tokens)
        one = Survey(
            records=1,
            prompt_tokens=length,
            longest_prompt=length,
            answers=prompt.answer is not None,
        )
        return one, (name for name in prompt.record if name not in read_fields)

    return _survey("prompts", map(looked_at, prompts), usable, at_most)


def survey_groups(
    groups: Iterable[ReadGroup], reward: RewardFunction | None, usable: Usable, *, at_most: int
) -> Survey:
    """Read finished rollouts, try the answers of those without rewards, and log what there is.

    Raises:
        ValueError: see `survey_prompts`.
    """

    def looked_at(read: ReadGroup) -> Looked:
        for _, group in read.unrewarded:
            assert reward is not None
            check_answer(reward, group.answer, group.source)
        batch = read.batch
        one = Survey(
            records=1,
            prompt_tokens=len(batch.prompt_tokens),
            longest_prompt=len(batch.prompt_tokens),
            responses=batch.num_responses,
            response_tokens=len(batch.response_tokens),
            answers=batch.answers[0] is not None,
        )
        return one, batch.records[0] if batch.records else ()

    return _survey("groups", map(looked_at, groups), usable, at_most)


def _survey(kind: str, found: Iterable[Looked], usable: Usable, at_most: int) -> Survey:
    usable.left_out.clear()
    survey = Survey()
    not_read: dict[str, None] = {}
    for one, fields in itertools.islice(found, at_most):
        survey = survey.plus(one)
        not_read.update(dict.fromkeys(fields))
    left_out = ", ".join(f"{number} {reason}" for reason, number in usable.left_out.items())
    if survey.records == 0 and left_out:
        raise ValueError(f"rollouts.unusable: leave_out leaves no record: {left_out}")
    said = (
        f"{survey.records} {kind}, {survey.prompt_tokens} prompt tokens (the longest has "
        f"{survey.longest_prompt})"
    )
    if survey.responses:
        said += f", {survey.responses} responses of {survey.response_tokens} tokens"
    if survey.records == at_most:
        said = f"the first {said} (rollouts.check_records)"
    logger.info("records: %s; left out: %s", said, left_out or "none")
    if not_read:
        logger.info(
            "records: fields that only a reward function of your own may read: %s",
            ", ".join(not_read),
        )
    return survey

"""Groups of rollouts from the records of a file, each checked when it is read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron_prefix.rollouts.named_rewards import weighted_record
from megatron_prefix.rollouts.parsing import check_same_group, group_id, other_fields, read_group
from megatron_prefix.rollouts.positions import FIELDS as POSITIONS
from megatron_prefix.rollouts.positions import with_positions
from megatron_prefix.rollouts.record import FilePosition, GroupRecords, Record
from megatron_prefix.rollouts.record_forms import RecordForms
from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup
from megatron_prefix.rollouts.rewards import RewardFunction
from megatron_prefix.rollouts.routes import FIELD as ROUTES
from megatron_prefix.rollouts.routes import RouteReader
from megatron_prefix.rollouts.usable import Usable
from megatron_prefix.rollouts.validation import Limits, validate_batch


@dataclass(frozen=True, kw_only=True)
class ReadGroup:
    """A group as its records give it."""

    batch: RolloutBatch
    """This group alone; a reward that is missing is 0."""
    unrewarded: tuple[tuple[int, RolloutGroup], ...]
    """What has to be rewarded: the responses of each record that gives an answer and no rewards,
    with the index of the first one in the group."""


@dataclass(frozen=True, kw_only=True)
class GroupReader:
    """Makes groups of records."""

    limits: Limits
    """Of the model."""
    group_size: int | None = None
    """Responses that every group must have; None takes groups of any size."""
    reward: RewardFunction | None = None
    """For rewards that are missing; they are not computed here."""
    forms: RecordForms = field(default_factory=RecordForms)
    """Of the records; without more, this package's own and token ids of other programs."""
    reward_weights: Mapping[str, float] | None = None
    """Of rewards by name; None: a response has one reward."""
    usable: Usable = field(default_factory=Usable)
    """What becomes of groups that the model cannot train on; without more, they are errors."""
    routes: RouteReader | None = None
    """Reads the routes that all records must have; None: no record may have any."""
    has_mrope: bool = False
    """Whether the model has mRoPE; without it no record may have positions."""

    def read(self, records: Iterator[Record]) -> Iterator[tuple[ReadGroup, FilePosition]]:
        """The groups of one file, each with the position after its last record."""
        in_own_form = (weighted_record(self.forms(r), self.reward_weights) for r in records)
        for key, members in itertools.groupby(in_own_form, key=_consecutive_group):
            found = self._members(key, members)
            group = self.usable.made(partial(self._group, GroupRecords(records=found)))
            if group is not None:
                yield group, found[-1].end

    def _members(self, name: Any, records: Iterator[Record]) -> list[Record]:
        """The records of one group: one that holds it whole, or consecutive ones of its name."""
        if not isinstance(name, (str, int)):
            # Unpacking `records` would read the next line, which a later batch answers for.
            return [next(records)]
        found = []
        for record in records:
            found.append(record)
            # At once: a file in which every record has the same group must not be read to its end.
            if self.group_size is not None and len(found) > self.group_size:
                raise ValueError(
                    f"{record.source}: group: {name!r} has more responses than "
                    f"group_size={self.group_size}"
                )
        return found

    def _group(self, group: GroupRecords) -> ReadGroup:
        batch = read_group(group)
        validate_batch(batch, self.limits, records=group)
        unrewarded = []
        for index, record in enumerate(group.records):
            if self._lacks_rewards(record):
                responses = batch.responses_of(0) if group.is_whole else [index]
                to_reward = RolloutGroup(
                    prompt=batch.prompt(0),
                    responses=[batch.response_tokens[batch.tokens_of(r)] for r in responses],
                    rewards=(),
                    answer=record.values["answer"],
                    record=other_fields(record.values),
                    source=record.source,
                )
                unrewarded.append((index, to_reward))
            self._check_extras(record)
        check_same_group(group, batch)
        if self.group_size is not None and batch.num_responses != self.group_size:
            raise ValueError(
                f"{group.source}: responses: {batch.num_responses} of them, but "
                f"group_size={self.group_size}"
            )
        if any(name in record.values for name in POSITIONS for record in group.records):
            batch = with_positions(batch, group)
        if self.routes is not None:
            batch = self.routes.of_group(batch, group)
        return ReadGroup(batch=batch, unrewarded=tuple(unrewarded))

    def _check_extras(self, record: Record) -> None:
        """Refuse positions that the model has not; all records have routes, or none has any."""
        for name in POSITIONS:
            if name in record.values and not self.has_mrope:
                raise ValueError(
                    f"{record.source}: {name}: only a model with mRoPE has positions of its own "
                    "(model.position_embedding_type: mrope); leave them out"
                )
        is_there = ROUTES in record.values
        if self.routes is None and is_there:
            raise ValueError(
                f"{record.source}: {ROUTES}: given, but training.replayed_routes: null does not "
                "say what to do with them; set it to exact, first or ignore"
            )
        if self.routes is not None and not is_there:
            raise ValueError(
                f"{record.source}: {ROUTES}: missing, and training.replayed_routes replays those "
                "of all records; have the engine that samples give them, or set replayed_routes: "
                "null"
            )

    def _lacks_rewards(self, record: Record) -> bool:
        """Whether the rewards of a record are to be computed."""
        is_whole = "responses" in record.values
        field, other = ("rewards", "reward") if is_whole else ("reward", "rewards")
        if other in record.values:
            kind = "a whole group" if is_whole else "one response"
            raise ValueError(f"{record.source}: {other}: a record of {kind} has {field}; rename it")
        if "turn_rewards" in record.values:
            for other in (field, "advantages"):
                if other in record.values:
                    raise ValueError(
                        f"{record.source}: {other}: given beside turn_rewards, from which "
                        f"{'rewards' if other == field else 'advantages'} are computed; leave one "
                        "of them out"
                    )
            return False
        if field in record.values:
            return False
        if "answer" not in record.values:
            raise ValueError(
                f"{record.source}: {field}: missing, and so is answer; a record needs one of them"
            )
        if self.reward is None:
            raise ValueError(
                f"{record.source}: {field}: missing; give it, or set a reward function that "
                "computes it from the answer"
            )
        return True


def _consecutive_group(record: Record) -> Any:
    """Equal for neighbouring records of one group; a record of a whole group equals none."""
    name = group_id(record)
    return object() if name is None else name

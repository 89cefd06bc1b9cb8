"""Groups of rollouts from the records of a file, each checked when it is read."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from megatron_prefix.rollouts.batch_builder import BatchBuilder
from megatron_prefix.rollouts.kinds import offsets_of
from megatron_prefix.rollouts.named_rewards import weighted_record
from megatron_prefix.rollouts.parsing import ALL_OR_NONE, group_id, read_group
from megatron_prefix.rollouts.positions import FIELDS as POSITIONS
from megatron_prefix.rollouts.positions import with_positions
from megatron_prefix.rollouts.record import FilePosition, Record
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
            if isinstance(key, (str, int)):
                joined = self.usable.made(partial(self._join, key, members))
                if joined is not None:
                    yield joined
            else:
                # Unpacking `members` would read the next line, which a later batch answers for.
                record = next(members)
                whole = self.usable.made(partial(self._whole, record))
                if whole is not None:
                    yield whole, record.end

    def _whole(self, record: Record) -> ReadGroup:
        """The group of a record that holds a whole one."""
        batch, routes, unrewarded = self._read(record, 0)
        self._check_size(record.source, batch.num_responses)
        return self._finished(batch, routes, unrewarded)

    def _join(self, name: str | int, records: Iterable[Record]) -> tuple[ReadGroup, FilePosition]:
        """One group of the consecutive records of one response each, and the position after it."""
        builder = BatchBuilder()
        routes: list[tuple[Any, str]] = []
        unrewarded: list[tuple[int, RolloutGroup]] = []
        first: tuple[Record, RolloutBatch] | None = None
        for count, record in enumerate(records, start=1):
            part, of_part, to_reward = self._read(record, count - 1)
            routes += of_part
            unrewarded += to_reward
            first = first or (record, part)
            _check_same_group(name, first, (record, part))
            builder.add(part)
            # At once: a file in which every record has the same group must not be read to its end.
            if self.group_size is not None and count > self.group_size:
                raise ValueError(
                    f"{record.source}: group: {name!r} has more responses than "
                    f"group_size={self.group_size}"
                )
        assert first is not None
        source = _source_range(first[0].source, record.source)
        self._check_size(source, count)
        parts, beginning = builder.build(), first[1]
        of_group = ("prompt_offsets", "prompt_tokens", "prompt_keys", "prompt_position_shifts")
        batch = dataclasses.replace(
            parts,
            group_offsets=offsets_of([count]),
            **{field: getattr(beginning, field) for field in (*of_group, "answers", "records")},
            policy_versions=beginning.policy_versions,
            sources=(source,),
        )
        return self._finished(batch, routes, unrewarded), record.end

    def _read(
        self, record: Record, first: int
    ) -> tuple[RolloutBatch, list[tuple[Any, str]], list[tuple[int, RolloutGroup]]]:
        """A record's responses, the first of which has this index in its group.

        Returns:
            The responses, their routes (see `_finished`), and what has to be rewarded.
        """
        batch = read_group(record)
        validate_batch(batch, self.limits, is_whole=record.is_whole)
        unrewarded = [(first, batch.group(0))] if self._lacks_rewards(record) else []
        if any(name in record.values for name in POSITIONS):
            if not self.has_mrope:
                raise ValueError(
                    f"{record.source}: {next(n for n in POSITIONS if n in record.values)}: only a "
                    "model with mRoPE has positions of its own (model.position_embedding_type: "
                    "mrope); leave them out"
                )
            batch = with_positions(batch, record)
        self._check_routes(record)
        routes = []
        if self.routes is not None:
            values = record.of_each_response(ROUTES, batch.num_responses)
            routes = [(value, record.where(ROUTES, i)) for i, value in enumerate(values)]
        return batch, routes, unrewarded

    def _finished(
        self,
        batch: RolloutBatch,
        routes: list[tuple[Any, str]],
        unrewarded: list[tuple[int, RolloutGroup]],
    ) -> ReadGroup:
        """A whole group; `routes` are the field's values, each with how its errors begin."""
        if self.routes is not None:
            batch = self.routes.of_group(batch, *zip(*routes, strict=True))
        return ReadGroup(batch=batch, unrewarded=tuple(unrewarded))

    def _check_routes(self, record: Record) -> None:
        """All records have routes, or none has any."""
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
        field, other = ("rewards", "reward") if record.is_whole else ("reward", "rewards")
        if other in record.values:
            kind = "a whole group" if record.is_whole else "one response"
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

    def _check_size(self, source: str, num_responses: int) -> None:
        if self.group_size is not None and num_responses != self.group_size:
            raise ValueError(
                f"{source}: responses: {num_responses} of them, but group_size={self.group_size}"
            )


def _consecutive_group(record: Record) -> Any:
    """Equal for neighbouring records of one group; a record of a whole group equals none."""
    name = group_id(record)
    return object() if name is None else name


def _check_same_group(
    group: str | int, first: tuple[Record, RolloutBatch], part: tuple[Record, RolloutBatch]
) -> None:
    """Refuse a record that is not of the group which the first one begins."""
    (begun, beginning), (record, batch) = first, part
    where, differ = record.source, f"group {group!r} of different"
    ours, theirs = batch.prompt_tokens, beginning.prompt_tokens
    if not np.array_equal(ours, theirs):
        common = min(len(ours), len(theirs))
        differs = np.append(ours[:common] != theirs[:common], True)
        raise ValueError(
            f"{where}: prompt: {differ} prompts; {begun.source} begins it with {len(theirs)} "
            f"tokens, these are {len(ours)}, and they differ first at position {differs.argmax()}"
        )
    if batch.answers != beginning.answers:
        raise ValueError(
            f"{where}: answer: {differ} answers; {begun.source} begins it with another"
        )
    for name in ALL_OR_NONE:
        if (name in record.values) != (name in begun.values):
            raise ValueError(
                f"{where}: {name}: of group {group!r}, some records have it and some do not; "
                f"{begun.source} begins it; give it in all of them or in none"
            )
    for name, attribute in (("keys", "prompt_keys"), ("positions", "prompt_position_shifts")):
        found = (getattr(of, attribute) for of in (batch, beginning))
        mine, first_ones = (
            np.zeros((len(ours), 1)) if values is None else values.reshape(len(ours), -1)
            for values in found
        )
        differs = (mine != first_ones).any(axis=1)
        if differs.any():
            raise ValueError(
                f"{where}: prompt_{name}: {differ} prompts; their {name} differ from those of "
                f"{begun.source} first at position {differs.argmax()}"
            )


def _source_range(first: str, last: str) -> str:
    """`file.jsonl:17` and `file.jsonl:20` as `file.jsonl:17-20`."""
    if first == last:
        return first
    number = len(last) - len(last.rstrip("0123456789"))
    return f"{first}-{last[-number:]}"

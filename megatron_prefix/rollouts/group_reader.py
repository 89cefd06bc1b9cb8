"""Groups of rollouts from the records of a file, each checked when it is read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.rollouts.named_rewards import weighted_record
from megatron_prefix.rollouts.parsing import (
    batch_of_arrays,
    group_id,
    parse_group,
    parse_response,
    response_field,
)
from megatron_prefix.rollouts.positions import FIELDS as POSITIONS
from megatron_prefix.rollouts.positions import read_positions, with_positions
from megatron_prefix.rollouts.record import START, FilePosition, Record
from megatron_prefix.rollouts.record_forms import RecordForms
from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup, plain_tokens
from megatron_prefix.rollouts.rewards import RewardFunction
from megatron_prefix.rollouts.routes import FIELD as ROUTES
from megatron_prefix.rollouts.routes import RouteReader, of_each_response
from megatron_prefix.rollouts.usable import Usable
from megatron_prefix.rollouts.validation import Limits, is_trainable, validate_group

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Unrewarded:
    """Responses of one record that gives an answer and no rewards."""

    first: int
    """Index of the first one in the group."""
    group: RolloutGroup
    """As the record gives them."""


@dataclass(frozen=True, kw_only=True)
class ReadGroup:
    """A group as its records give it."""

    batch: RolloutBatch
    """This group alone; a reward that is missing is 0."""
    unrewarded: tuple[Unrewarded, ...]
    """What has to be rewarded."""


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
        batch = batch_of_arrays(record)
        if batch is None or not is_trainable(batch, self.limits):
            group = parse_group(record)
            validate_group(group, self.limits)
            batch = RolloutBatch.from_groups([group])
        unrewarded: tuple[Unrewarded, ...] = ()
        if self._lacks_rewards(record, "rewards"):
            unrewarded = (Unrewarded(first=0, group=batch.group(0)),)
        self._check_size(record.source, batch.num_responses)
        self._check_positions(record)
        if any(name in record.values for name in POSITIONS):
            batch = self._with_positions(batch, record)
        routes = self._routes_of(record)
        if self.routes is not None:
            where = f"{record.source}: {ROUTES}"
            values = of_each_response(routes, where, batch.num_responses)
            names = [f"{where}[{response}]" for response in range(len(values))]
            batch = self.routes.of_group(batch, values, names)
        return ReadGroup(batch=batch, unrewarded=unrewarded)

    def _join(self, name: str | int, records: Iterable[Record]) -> tuple[ReadGroup, FilePosition]:
        """One group of the consecutive records of one response each, and the position after it."""
        parts: list[RolloutGroup] = []
        unrewarded: list[Unrewarded] = []
        routes: list[tuple[Any, str]] = []
        positions: list[tuple[NDArray | None, NDArray | None]] = []
        end = START
        for record in records:
            end = record.end
            part = parse_response(record)
            validate_group(part, self.limits, field_name=response_field)
            if self._lacks_rewards(record, "reward"):
                unrewarded.append(Unrewarded(first=len(parts), group=part))
            routes.append((self._routes_of(record), f"{record.source}: {ROUTES}"))
            self._check_positions(record)
            positions.append(_positions_of_response(record, part))
            _check_same_positions(name, positions, parts[:1] or [part], part)
            parts.append(part)
            _check_same_group(name, parts[0], part)
            # At once: a file in which every record has the same group must not be read to its end.
            if self.group_size is not None and len(parts) > self.group_size:
                raise ValueError(
                    f"{part.source}: group: {name!r} has more responses than "
                    f"group_size={self.group_size}"
                )
        first, last = parts[0], parts[-1]
        group = RolloutGroup(
            prompt=first.prompt,
            responses=_chained(part.responses for part in parts),
            rewards=_chained(part.rewards for part in parts),
            named_rewards={
                name: np.concatenate([part.named_rewards.get(name, [np.nan]) for part in parts])
                for name in dict.fromkeys(name for part in parts for name in part.named_rewards)
            },
            # Every part has one response: nothing to chain means that none gives them.
            turn_rewards=_chained(part.turn_rewards for part in parts) or None,
            advantages=_chained(part.advantages for part in parts) or None,
            old_logprobs=_chained(part.old_logprobs for part in parts) or None,
            loss_mask=_chained(part.loss_mask for part in parts) or None,
            prompt_keys=first.prompt_keys,
            keys=_chained(part.keys for part in parts) or None,
            finished=_chained(part.finished for part in parts) or None,
            answer=first.answer,
            record=first.record,
            source=_source_range(first.source, last.source),
        )
        self._check_size(group.source, len(parts))
        batch = RolloutBatch.from_groups([group])
        if any(found is not None for of_part in positions for found in of_part):
            batch = with_positions(batch, positions[0][0], [own for _, own in positions])
        if self.routes is not None:
            batch = self.routes.of_group(batch, *zip(*routes, strict=True))
        return ReadGroup(batch=batch, unrewarded=tuple(unrewarded)), end

    def _routes_of(self, record: Record) -> Any:
        """The field of a record; None where no record has it."""
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
        return record.values.get(ROUTES)

    def _check_positions(self, record: Record) -> None:
        """Refuse positions of a model without mRoPE."""
        for name in POSITIONS:
            if name in record.values and not self.has_mrope:
                raise ValueError(
                    f"{record.source}: {name}: only a model with mRoPE has positions of its own "
                    "(model.position_embedding_type: mrope); leave them out"
                )

    def _with_positions(self, batch: RolloutBatch, record: Record) -> RolloutBatch:
        """The group of a record that holds a whole one and has positions."""
        prompt = _read_optional(record, POSITIONS[0], len(batch.prompt_tokens))
        lengths = np.diff(batch.response_offsets).tolist()
        found: list[NDArray | None] = [None] * len(lengths)
        if POSITIONS[1] in record.values:
            where = f"{record.source}: {POSITIONS[1]}"
            values = of_each_response(record.values[POSITIONS[1]], where, len(lengths))
            found = [
                read_positions(value, f"{where}[{index}]", lengths[index])
                for index, value in enumerate(values)
            ]
        return with_positions(batch, prompt, found)

    def _lacks_rewards(self, record: Record, field: str) -> bool:
        """Whether the rewards of a record, in the field of that name, are to be computed."""
        other = "reward" if field == "rewards" else "rewards"
        if other in record.values:
            kind = "a whole group" if field == "rewards" else "one response"
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


def _read_optional(record: Record, name: str, num_tokens: int) -> NDArray | None:
    if name not in record.values:
        return None
    return read_positions(record.values[name], f"{record.source}: {name}", num_tokens)


def _positions_of_response(
    record: Record, part: RolloutGroup
) -> tuple[NDArray | None, NDArray | None]:
    """Those of the prompt and of the response of a record of one response."""
    (response,) = part.responses
    lengths = (len(part.prompt), len(response))
    prompt, own = (_read_optional(record, *of) for of in zip(POSITIONS, lengths, strict=True))
    return prompt, own


def _check_same_positions(
    name: str | int,
    positions: Sequence[tuple[NDArray | None, NDArray | None]],
    first: Sequence[RolloutGroup],
    part: RolloutGroup,
) -> None:
    """Refuse positions of the last record's prompt that are not those of the first one's."""
    known, found = positions[0][0], positions[-1][0]
    if (known is None) != (found is None) or not np.array_equal(known, found):
        raise ValueError(
            f"{part.source}: {POSITIONS[0]}: group {name!r} of different prompts; their positions "
            f"differ from those of {first[0].source}"
        )


def _check_same_group(name: str | int, first: RolloutGroup, part: RolloutGroup) -> None:
    where = part.source
    if not np.array_equal(part.prompt, first.prompt):
        pairs = itertools.zip_longest(plain_tokens(first.prompt), plain_tokens(part.prompt))
        position = next(i for i, (a, b) in enumerate(pairs) if a != b)
        raise ValueError(
            f"{where}: prompt: group {name!r} of different prompts; {first.source} begins it with "
            f"{len(first.prompt)} tokens, these are {len(part.prompt)}, and they differ first at "
            f"position {position}"
        )
    if part.answer != first.answer:
        raise ValueError(
            f"{where}: answer: group {name!r} of different answers; {first.source} begins it with "
            "another"
        )
    if first.prompt_keys is not None and part.prompt_keys is not None:
        differs = np.asarray(part.prompt_keys) != np.asarray(first.prompt_keys)
        if differs.any():
            raise ValueError(
                f"{where}: prompt_keys: group {name!r} of different prompts; their keys differ "
                f"from those of {first.source} first at position {int(differs.argmax())}"
            )
    for attribute in (
        "turn_rewards",
        "advantages",
        "old_logprobs",
        "loss_mask",
        "finished",
        "prompt_keys",
        "keys",
    ):
        if (getattr(part, attribute) is None) != (getattr(first, attribute) is None):
            raise ValueError(
                f"{where}: {attribute}: of group {name!r}, some records have it and some do not; "
                f"{first.source} begins it; give it in all of them or in none"
            )


def _chained(parts: Iterable[tuple[Value, ...] | None]) -> tuple[Value, ...]:
    return tuple(value for part in parts if part is not None for value in part)


def _source_range(first: str, last: str) -> str:
    """`file.jsonl:17` and `file.jsonl:20` as `file.jsonl:17-20`."""
    if first == last:
        return first
    number = len(last) - len(last.rstrip("0123456789"))
    return f"{first}-{last[-number:]}"

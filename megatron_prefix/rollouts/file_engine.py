"""The `file` engine: groups of finished rollouts from JSON Lines or Parquet.

A record holds a whole group,

    {"prompt": [5, 7], "responses": [[1, 2], [3]], "rewards": [1.0, 0.0]}

or one response of it; then the records of a group follow one another in one file:

    {"group": "a", "prompt": [5, 7], "response": [1, 2], "reward": 1.0}
    {"group": "a", "prompt": [5, 7], "response": [3], "reward": 0.0}

Instead of the rewards there may be an "answer" for a reward function. "old_logprobs" (numbers, one
for each token of the responses) and "finished" (true or false, one for each response) are optional.
Null is as good as absent, and fields of other names are passed over.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeVar

from megatron_prefix.rollouts.engine import EndOfRollouts
from megatron_prefix.rollouts.parsing import (
    group_id,
    parse_group,
    parse_response,
    response_field,
)
from megatron_prefix.rollouts.record_files import START, FilePosition, Record
from megatron_prefix.rollouts.records import RolloutGroup
from megatron_prefix.rollouts.rewards import RewardFunction, close_reward, reward_groups
from megatron_prefix.rollouts.stream import RecordStream
from megatron_prefix.rollouts.validation import indexed_field, validate_group

Value = TypeVar("Value")

RunOnce = Callable[[Callable[[], Any]], Any]
"""Runs a function on one rank and gives every rank what it returned, or raised."""


@dataclass(frozen=True, kw_only=True)
class _ReadGroup:
    """A group as its records give it."""

    group: RolloutGroup
    unrewarded: tuple[tuple[int, RolloutGroup], ...]
    """What a record gives without rewards, and the index of its first response in the group."""

    def rewarded(self, computed: Iterator[tuple[str, tuple[float, ...]]]) -> RolloutGroup:
        """The group with the next of the computed rewards in their places.

        Raises:
            ValueError: those are of other records.
        """
        rewards = list(self.group.rewards)
        for first, part in self.unrewarded:
            source, values = next(computed, ("", ()))
            if source != part.source:
                raise _other_rollouts()
            rewards[first : first + len(values)] = values
        return dataclasses.replace(self.group, rewards=tuple(rewards))


class FileEngine:
    """Streams groups from files, each record checked before any group of a batch is used.

    Every rank reads all files and gets the same groups. Files are gone through in the order given,
    their groups in the order in which they stand. Rewards that are to be computed are computed once
    for all ranks: a function of a user may be slow, may cost money, or may time out.
    """

    def __init__(
        self,
        paths: Sequence[str | PathLike[str]],
        *,
        vocab_size: int,
        max_positions: int,
        group_size: int | None = None,
        reward: RewardFunction | None = None,
        run_once: RunOnce = lambda compute: compute(),
        epochs: int | None = None,
    ) -> None:
        """Check the files' names; nothing is read yet.

        Args:
            paths: .jsonl, .jsonl.gz and .parquet files.
            vocab_size: token ids lie in [0, vocab_size).
            max_positions: positions of the model (see `validate_group`).
            group_size: responses that every group must have; None takes groups of any size.
            reward: computes rewards where a record has an answer and no rewards.
            run_once: on several ranks, what runs it on one of them; it is called by every batch
                where there is a `reward`.
            epochs: how often to go through the files; None is without end.

        Raises:
            ValueError: no paths, a file that is not there or of unknown format, or epochs below 1.
        """
        self._vocab_size = vocab_size
        self._max_positions = max_positions
        self._group_size = group_size
        self._reward = reward
        self._run_once = run_once
        self._stream = RecordStream(paths, self._read_groups, epochs=epochs)

    @property
    def epoch(self) -> int:
        """Times that all files have been gone through."""
        return self._stream.epoch

    def next_groups(self, num_groups: int, *, step: int) -> list[RolloutGroup]:
        """The next `num_groups` groups; a batch may reach over the end of an epoch.

        Collective where there is a reward function, see `run_once`.

        Args:
            num_groups: how many.
            step: not used, since nothing is drawn at random.

        Raises:
            EndOfRollouts: fewer are left in the last epoch. None of them is used up.
            ValueError: a record that is wrong, naming the file, the line or row, and the field; or
                a reward that could not be computed. No group is used up.
        """
        if self._reward is None:
            return [read.group for read in self._stream.take(num_groups)]
        before = self._stream.state_dict()
        read: list[_ReadGroup] = []
        failure: Exception | None = None
        try:
            read = self._stream.take(num_groups)
        except (ValueError, EndOfRollouts) as error:
            failure = error  # it may be this rank's alone, and the others wait in `run_once`
        try:
            computed = self._compute_rewards([part for item in read for _, part in item.unrewarded])
            if failure is not None:
                raise failure
            rewards = iter(computed)
            groups = [item.rewarded(rewards) for item in read]
            if next(rewards, None) is not None:
                raise _other_rollouts()
        except ValueError:
            self._stream.load_state_dict(before)
            raise
        return groups

    def _compute_rewards(
        self, groups: Sequence[RolloutGroup]
    ) -> list[tuple[str, tuple[float, ...]]]:
        """The source and the rewards of each group, as the rank that computes them has them.

        Raises:
            ValueError: a reward could not be computed.
        """
        reward = self._reward
        assert reward is not None
        return self._run_once(
            lambda: [(group.source, group.rewards) for group in reward_groups(reward, groups)]
        )

    def metrics(self) -> dict[str, float]:
        """Nothing: the trainer's own metrics say all."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Where the engine stands in its files, as plain values."""
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict` with exactly the groups that would have come next.

        Raises:
            ValueError: the files have changed since (see `RecordStream.load_state_dict`).
        """
        self._stream.load_state_dict(state)

    def close(self) -> None:
        """Close the file that is open, and end the reward's processes."""
        self._stream.close()
        close_reward(self._reward)

    def _read_groups(self, records: Iterator[Record]) -> Iterator[tuple[_ReadGroup, FilePosition]]:
        """The groups of one file, each with the position after its last record."""
        for key, members in itertools.groupby(records, key=_consecutive_group):
            if isinstance(key, (str, int)):
                yield self._join(key, members)
            else:
                # Unpacking `members` would read the next line, which a later batch answers for.
                record = next(members)
                group = parse_group(record)
                unrewarded = ((0, group),) if self._lacks_rewards(group, record) else ()
                self._check_size(group)
                yield _ReadGroup(group=group, unrewarded=unrewarded), record.end

    def _join(self, name: str | int, records: Iterable[Record]) -> tuple[_ReadGroup, FilePosition]:
        """One group of the consecutive records of one response each, and the position after it."""
        parts: list[RolloutGroup] = []
        unrewarded: list[tuple[int, RolloutGroup]] = []
        end = START
        for record in records:
            end = record.end
            part = parse_response(record)
            if self._lacks_rewards(part, record):
                unrewarded.append((len(parts), part))
            parts.append(part)
            _check_same_group(name, parts[0], part)
            # At once: a file in which every record has the same group must not be read to its end.
            if self._group_size is not None and len(parts) > self._group_size:
                raise ValueError(
                    f"{part.source}: group: {name!r} has more responses than "
                    f"group_size={self._group_size}"
                )
        first, last = parts[0], parts[-1]
        group = RolloutGroup(
            prompt=first.prompt,
            responses=_chained(part.responses for part in parts),
            rewards=_chained(part.rewards for part in parts),
            # Every part has one response: nothing to chain means that none gives them.
            old_logprobs=_chained(part.old_logprobs for part in parts) or None,
            finished=_chained(part.finished for part in parts) or None,
            answer=first.answer,
            source=_source_range(first.source, last.source),
        )
        self._check_size(group)
        return _ReadGroup(group=group, unrewarded=tuple(unrewarded)), end

    def _lacks_rewards(self, group: RolloutGroup, record: Record) -> bool:
        """Check what a record gave; whether its rewards are to be computed."""
        is_whole = "responses" in record.values
        field = "rewards" if is_whole else "reward"
        validate_group(
            group,
            vocab_size=self._vocab_size,
            max_positions=self._max_positions,
            field_name=indexed_field if is_whole else response_field,
        )
        if field in record.values:
            return False
        if group.answer is None:
            raise ValueError(
                f"{record.source}: {field}: missing, and so is answer; a record needs one of them"
            )
        if self._reward is None:
            raise ValueError(
                f"{record.source}: {field}: missing; give it, or set a reward function that "
                "computes it from the answer"
            )
        return True

    def _check_size(self, group: RolloutGroup) -> None:
        if self._group_size is not None and len(group.responses) != self._group_size:
            raise ValueError(
                f"{group.source}: responses: {len(group.responses)} of them, but "
                f"group_size={self._group_size}"
            )


def _other_rollouts() -> ValueError:
    return ValueError(
        "this rank has read other rollouts than the rank that computes their rewards; give all "
        "ranks the same files"
    )


def _consecutive_group(record: Record) -> Any:
    """Equal for neighbouring records of one group; a record of a whole group equals none."""
    name = group_id(record)
    return object() if name is None else name


def _check_same_group(name: str | int, first: RolloutGroup, part: RolloutGroup) -> None:
    where = part.source
    if part.prompt != first.prompt:
        position = next(
            i for i, (a, b) in enumerate(itertools.zip_longest(first.prompt, part.prompt)) if a != b
        )
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
    for field in ("old_logprobs", "finished"):
        if (getattr(part, field) is None) != (getattr(first, field) is None):
            raise ValueError(
                f"{where}: {field}: of group {name!r}, some records have it and some do not; "
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

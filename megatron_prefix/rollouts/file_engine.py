"""The `file` engine: groups of finished rollouts from JSON Lines or Parquet.

A record holds a whole group,

    {"prompt": [5, 7], "responses": [[1, 2], [3]], "rewards": [1.0, 0.0]}

or one response of it; then the records of a group follow one another in one file:

    {"group": "a", "prompt": [5, 7], "response": [1, 2], "reward": 1.0}
    {"group": "a", "prompt": [5, 7], "response": [3], "reward": 0.0}

Instead of the rewards there may be an "answer" for a reward function. Optional are "old_logprobs"
(numbers) and "loss_mask" (true or false: whether a token is trained on), one for each token of the
responses, and "finished" (true or false), one for each response. "prompt_keys" and "keys" (whole
numbers), one for each token of the prompt and of the responses, tell tokens of one id apart.
"routed_experts" are the experts that each token was sent to (`routes`), "prompt_positions" and
"positions" the three positions of each token in a model with mRoPE (`positions`).
Rewards may be several by name (`named_rewards`). "turn_rewards" stand in place of rewards, and
"advantages" beside them. Null is as good as absent, and fields of other names are passed over.
`record_forms` reads the records of other programs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

from megatron_prefix.rollouts.batch_builder import BatchBuilder
from megatron_prefix.rollouts.group_reader import GroupReader, ReadGroup, Unrewarded
from megatron_prefix.rollouts.record_forms import RecordForms
from megatron_prefix.rollouts.records import RolloutBatch
from megatron_prefix.rollouts.rewards import RewardFunction, close_reward, computed_rewards
from megatron_prefix.rollouts.routes import RouteReader
from megatron_prefix.rollouts.stream import RecordStream
from megatron_prefix.rollouts.usable import Usable

RunAlone = Callable[[Callable[[], RolloutBatch]], "RolloutBatch | None"]
"""Runs a function on one rank, which gets the result. Every rank gets None or the error."""


class FileEngine:
    """Streams groups from files, each record checked before any group of a batch is used.

    One rank reads. Files are gone through in the order given, their groups in the order in which
    they stand. Rewards that are to be computed are computed by the rank that reads.
    """

    def __init__(
        self,
        paths: Sequence[str | PathLike[str]],
        *,
        vocab_size: int,
        max_positions: int,
        group_size: int | None = None,
        forms: RecordForms | None = None,
        reward: RewardFunction | None = None,
        reward_weights: Mapping[str, float] | None = None,
        usable: Usable | None = None,
        is_corrected: bool = False,
        routes: RouteReader | None = None,
        has_mrope: bool = False,
        reads: bool = True,
        run_alone: RunAlone = lambda read: read(),
        epochs: int | None = None,
    ) -> None:
        """Check the files' names; nothing is read yet.

        Args:
            paths: .jsonl, .jsonl.gz and .parquet files.
            vocab_size: token ids lie in [0, vocab_size).
            max_positions: positions of the model (see `validate_group`).
            group_size: responses that every group must have; None takes groups of any size.
            forms: of the records; None: this package's own, and token ids of others.
            reward: computes rewards where a record has an answer and no rewards.
            reward_weights: of rewards by name; None: a response has one reward.
            usable: what becomes of groups that the model cannot train on; None: they are errors.
            is_corrected: see `validate_group`.
            routes: reads the routes that all records must have; None: no record may have any.
            has_mrope: whether the model has mRoPE; without it no record may have positions.
            reads: whether this rank reads; a rank that does not needs no files.
            run_alone: on several ranks, what runs a function on the rank that reads; the other
                ranks wait for it.
            epochs: how often to go through the files; None is without end.

        Raises:
            ValueError: no paths, a file that is not there or of unknown format, or epochs below 1.
        """
        self._reward = reward
        self._run_alone = run_alone
        self._stream: RecordStream[ReadGroup] | None = None
        if reads:
            reader = GroupReader(
                vocab_size=vocab_size,
                max_positions=max_positions,
                group_size=group_size,
                forms=forms,
                has_reward=reward is not None,
                reward_weights=reward_weights,
                usable=usable,
                is_corrected=is_corrected,
                routes=routes,
                has_mrope=has_mrope,
            )
            self._stream = RecordStream(paths, reader.read, epochs=epochs, as_arrays=True)

    @property
    def epoch(self) -> int:
        """Times that all files have been gone through; for the rank that reads."""
        assert self._stream is not None
        return self._stream.epoch

    def next_rollouts(self, num_groups: int, *, step: int) -> RolloutBatch | None:
        """The next `num_groups` groups; a batch may reach over the end of an epoch.

        Args:
            num_groups: how many.
            step: not used, since nothing is drawn at random.

        Raises:
            EndOfRollouts: fewer are left in the last epoch. None of them is used up.
            ValueError: a record that is wrong, naming the file, the line or row, and the field; or
                a reward that could not be computed. No group is used up.
        """
        return self._run_alone(lambda: self._read(num_groups))

    def _read(self, num_groups: int) -> RolloutBatch:
        stream = self._stream
        assert stream is not None
        before = stream.state_dict()
        builder = BatchBuilder()
        unrewarded: list[tuple[Unrewarded, ...]] = []

        def add(read: ReadGroup) -> None:
            builder.add(read.batch)
            unrewarded.append(read.unrewarded)

        stream.take_each(num_groups, add)
        try:
            return self._rewarded(builder.build(), unrewarded)
        except ValueError:
            stream.load_state_dict(before)
            raise

    def _rewarded(
        self, batch: RolloutBatch, unrewarded: Sequence[tuple[Unrewarded, ...]]
    ) -> RolloutBatch:
        """The batch with the rewards that are to be computed, given for each group.

        Raises:
            ValueError: a reward could not be computed.
        """
        parts = [
            (int(start) + part.first, part.group)
            for start, of_group in zip(batch.group_offsets[:-1], unrewarded, strict=True)
            for part in of_group
        ]
        if not parts:
            return batch
        assert self._reward is not None
        computed = computed_rewards(self._reward, [group for _, group in parts])
        places = np.concatenate([first + np.arange(len(group.responses)) for first, group in parts])
        rewards = batch.rewards.copy()
        rewards[places] = computed.totals
        named_rewards = dict(batch.named_rewards)
        for name, values in computed.named.items():
            known = named_rewards.get(name, np.full(len(rewards), np.nan))
            named_rewards[name] = known.copy()
            named_rewards[name][places] = values
        return dataclasses.replace(batch, rewards=rewards, named_rewards=named_rewards)

    def each(self) -> Iterator[ReadGroup]:
        """All groups once, for the rank that reads; the position stays.

        Raises:
            ValueError: a record that is wrong.
        """
        assert self._stream is not None
        return self._stream.each()

    def metrics(self) -> dict[str, float]:
        """Nothing: the trainer's own metrics say all."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Where the engine stands in its files; empty on a rank that does not read."""
        return {} if self._stream is None else self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the reading rank's `state_dict` with the groups that would have come next.

        Raises:
            ValueError: the files have changed since (see `RecordStream.load_state_dict`).
        """
        if self._stream is not None:
            self._stream.load_state_dict(state)

    def close(self) -> None:
        """Close the file that is open, and end the reward's processes."""
        if self._stream is not None:
            self._stream.close()
        close_reward(self._reward)

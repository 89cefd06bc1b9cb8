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

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from os import PathLike
from typing import Any

from megatron_prefix.rollouts.batch_builder import BatchBuilder
from megatron_prefix.rollouts.group_reader import GroupReader, ReadGroup
from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup
from megatron_prefix.rollouts.rewards import close_reward, reward_batch
from megatron_prefix.rollouts.stream import RecordStream, position_kept

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
        reader: GroupReader,
        *,
        reads: bool = True,
        run_alone: RunAlone = lambda read: read(),
        epochs: int | None = None,
    ) -> None:
        """Check the files' names; nothing is read yet.

        Args:
            paths: .jsonl, .jsonl.gz and .parquet files.
            reader: makes groups of their records.
            reads: whether this rank reads; a rank that does not needs no files.
            run_alone: on several ranks, what runs a function on the rank that reads; the other
                ranks wait for it.
            epochs: how often to go through the files; None is without end.

        Raises:
            ValueError: no paths, a file that is not there or of unknown format, or epochs below 1.
        """
        self._reward = reader.reward
        self._run_alone = run_alone
        self._stream: RecordStream[ReadGroup] | None = None
        if reads:
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
        with position_kept(stream), closing(stream.take_each(num_groups)) as groups:
            return self._batch_of(groups)

    def _batch_of(self, groups: Iterable[ReadGroup]) -> RolloutBatch:
        """The batch of these groups, with the rewards that are to be computed.

        Raises:
            ValueError: a reward could not be computed.
        """
        builder, num_responses = BatchBuilder(), 0
        unrewarded: list[tuple[int, RolloutGroup]] = []
        for read in groups:
            builder.add(read.batch)
            unrewarded += [(num_responses + first, group) for first, group in read.unrewarded]
            num_responses += read.batch.num_responses
        batch = builder.build()
        if not unrewarded:
            return batch
        assert self._reward is not None
        return reward_batch(self._reward, batch, unrewarded)

    def each(self) -> Iterator[ReadGroup]:
        """All groups once, for the rank that reads; the position stays.

        Raises:
            ValueError: a record that is wrong.
        """
        assert self._stream is not None
        return self._stream.each()

    def batches(self, num_groups: int) -> Iterator[RolloutBatch]:
        """All groups once with their rewards, at most so many at a time; the position stays.

        Raises:
            ValueError: a record that is wrong, or a reward that could not be computed.
        """
        groups = self.each()
        while part := list(itertools.islice(groups, num_groups)):
            yield self._batch_of(part)

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

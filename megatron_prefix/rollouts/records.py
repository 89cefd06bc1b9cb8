"""Rollouts as records: a group by itself, and a batch of groups in flat arrays.

A batch is what travels through a run. It is arrays from the reader to the device: no Python object
stands for a token. Offsets say where each item begins: item i of `tokens` is
`tokens[offsets[i] : offsets[i + 1]]`.

Legend: G groups, R responses of all groups, P prompt tokens, T response tokens, S inputs of all
sequences: the tokens of each prompt and response together, but the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.rollouts.identity import prompt_routes, repeated_responses
from megatron_prefix.rollouts.kinds import offsets_of
from megatron_prefix.rollouts.summary import RolloutSummary

Tokens = Sequence[int] | NDArray
"""Token ids."""

UNKNOWN = -1
"""The value of `finished` and `policy_versions` where it is not known."""


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """One prompt with the responses that were sampled for it. Tokens are ids, whole numbers.

    What stands for a sequence may be an array or any sequence of plain numbers.
    """

    prompt: Tokens
    responses: Sequence[Tokens]
    rewards: Sequence[float] | NDArray
    """One for each response."""
    named_rewards: Mapping[str, Sequence[float] | NDArray] = field(default_factory=dict)
    """Where a response has several rewards, each by its name, one for each response; `rewards` are
    their weighted sum."""
    old_logprobs: Sequence[Sequence[float] | NDArray] | None = None
    """For each response and each of its tokens, the log-probability that it was sampled with."""
    loss_mask: Sequence[Sequence[bool] | NDArray] | None = None
    """For each response and each of its tokens, whether it is trained on; None: all are."""
    turn_rewards: Sequence[Sequence[float] | NDArray] | None = None
    """For each response and each of its trained turns (runs of trained tokens), its reward."""
    advantages: Sequence[Sequence[float] | NDArray] | None = None
    """For each response and each of its tokens, its advantage; None: they come from rewards."""
    prompt_keys: Tokens | None = None
    """For each token of the prompt what its id leaves open, such as which image it stands for: a
    whole number. Tokens are shared where ids and keys agree. None: all are 0."""
    keys: Sequence[Tokens] | None = None
    """The same for each response and each of its tokens."""
    prompt_position_shifts: NDArray | None = None
    """[prompt tokens, 3] for a model with mRoPE: time, height and width of each token, less its
    place in its sequence; None: all are 0."""
    position_shifts: Sequence[NDArray] | None = None
    """[tokens, 3] the same for each response."""
    routes: Sequence[NDArray] | None = None
    """For each response [inputs, layers with experts, topk]: the experts that each token of the
    prompt and of the response, but the last, is sent to; None: the model's routers choose."""
    finished: Sequence[bool] | NDArray | None = None
    """For each response, whether it ended by itself, rather than at a limit of length."""
    answer: Any = None
    """What a reward function compares with."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of the record that it comes from, for a reward function."""
    policy_version: int | None = None
    """Rollout batches that the weights which sampled it had been trained on; None: not known."""
    source: str
    """Where the group comes from, as errors name it: "file.jsonl:17"."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RolloutBatch:
    """Groups in flat arrays; nobody writes to them."""

    prompt_tokens: NDArray[np.int32]
    """[P]"""
    prompt_offsets: NDArray[np.int64]
    """[G + 1]"""
    group_offsets: NDArray[np.int64]
    """[G + 1] into the R responses."""
    response_tokens: NDArray[np.int32]
    """[T]"""
    response_offsets: NDArray[np.int64]
    """[R + 1]"""
    rewards: NDArray[np.float64]
    """[R]"""
    named_rewards: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """[R] each, where responses have several rewards; NaN where they do not."""
    old_logprobs: NDArray[np.float32] | None = None
    """[T] under the policy that sampled them; None: not known."""
    loss_mask: NDArray[np.bool_] | None = None
    """[T] whether a token is trained on; None: all are."""
    turn_rewards: NDArray[np.float64] | None = None
    """[T] rewards of trained turns, each at its turn's last token, NaN at all other tokens; None:
    no group has any."""
    advantages: NDArray[np.float64] | None = None
    """[T] NaN for groups whose advantages come from rewards; None: those of all groups do."""
    prompt_keys: NDArray[np.int64] | None = None
    """[P] what the ids of tokens leave open, see `RolloutGroup.prompt_keys`; None: all are 0."""
    keys: NDArray[np.int64] | None = None
    """[T] the same for responses."""
    prompt_position_shifts: NDArray[np.int32] | None = None
    """[P, 3] see `RolloutGroup.prompt_position_shifts`; None: all are 0."""
    position_shifts: NDArray[np.int32] | None = None
    """[T, 3] the same for responses; given where those of prompts are."""
    routes: NDArray | None = None
    """[S, layers with experts, topk] see `RolloutGroup.routes`; None: no group has any."""
    finished: NDArray[np.int8]
    """[R] 1: the response ended by itself; 0: at a limit of length; `UNKNOWN`."""
    policy_versions: NDArray[np.int64]
    """[G] rollout batches that the weights which sampled had been trained on, or `UNKNOWN`."""
    answers: tuple[Any, ...]
    """[G] what a reward function compares with."""
    sources: tuple[str, ...]
    """[G] where each group comes from, as errors name it."""
    records: tuple[Mapping[str, Any], ...] = ()
    """[G] other fields of the groups' records, until rewards are computed; none: they have none."""

    def __post_init__(self) -> None:
        groups, responses = self.num_groups, self.num_responses
        assert len(self.prompt_offsets) == len(self.group_offsets) == groups + 1
        assert len(self.answers) == len(self.policy_versions) == groups
        assert len(self.rewards) == len(self.finished) == responses
        assert all(len(values) == responses for values in self.named_rewards.values())
        assert self.prompt_offsets[-1] == len(self.prompt_tokens)
        assert self.response_offsets[-1] == len(self.response_tokens)
        per_token = (self.old_logprobs, self.loss_mask, self.turn_rewards, self.advantages)
        for values in (*per_token, self.keys, self.position_shifts):
            assert values is None or len(values) == len(self.response_tokens)
        for values in (self.prompt_keys, self.prompt_position_shifts):
            assert values is None or len(values) == len(self.prompt_tokens)
        assert (self.position_shifts is None) == (self.prompt_position_shifts is None)
        assert self.routes is None or len(self.routes) == self.sequence_offsets[-1]

    @classmethod
    def from_groups(cls, groups: Iterable[RolloutGroup]) -> RolloutBatch:
        """A batch of groups.

        Raises:
            ValueError: a value is not of its type, or missing, see `read_group`; or some groups
                have old log-probabilities and some do not, naming two of them.
        """
        # Both import this file.
        from megatron_prefix.rollouts.batch_builder import BatchBuilder
        from megatron_prefix.rollouts.parsing import batch_of_group

        builder = BatchBuilder()
        for group in groups:
            builder.add(batch_of_group(group))
        return builder.build()

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.sources)

    @property
    def num_responses(self) -> int:
        """R."""
        return len(self.response_offsets) - 1

    def prompt(self, group: int) -> NDArray[np.int32]:
        """The tokens of a group's prompt, a view."""
        return self.prompt_tokens[self._prompt_range(group)]

    def _prompt_range(self, group: int) -> slice:
        return slice(int(self.prompt_offsets[group]), int(self.prompt_offsets[group + 1]))

    def responses_of(self, group: int) -> range:
        """Indices of a group's responses."""
        return range(int(self.group_offsets[group]), int(self.group_offsets[group + 1]))

    def tokens_of(self, response: int) -> slice:
        """Where a response's tokens are in the arrays of T."""
        return slice(int(self.response_offsets[response]), int(self.response_offsets[response + 1]))

    @cached_property
    def sequence_offsets(self) -> NDArray[np.int64]:
        """[R + 1] into the S inputs."""
        prompts = np.repeat(np.diff(self.prompt_offsets), np.diff(self.group_offsets))
        return offsets_of(prompts + np.diff(self.response_offsets) - 1)

    def routes_of(self, response: int) -> NDArray:
        """The routes of a response's sequence, which the batch has; a view."""
        assert self.routes is not None
        return self.routes[self.sequence_offsets[response] : self.sequence_offsets[response + 1]]

    def group(self, index: int) -> RolloutGroup:
        """One group by itself; its arrays are views."""
        responses = self.responses_of(index)
        tokens = [self.tokens_of(response) for response in responses]
        version = int(self.policy_versions[index])
        finished = self.finished[responses.start : responses.stop]
        turn_rewards, advantages = (
            self._of_responses(values, responses) for values in (self.turn_rewards, self.advantages)
        )
        if turn_rewards is not None:
            turn_rewards = [values[~np.isnan(values)] for values in turn_rewards]
        return RolloutGroup(
            prompt=self.prompt(index),
            responses=tuple(self.response_tokens[part] for part in tokens),
            rewards=self.rewards[responses.start : responses.stop],
            named_rewards={
                name: values[responses.start : responses.stop]
                for name, values in self.named_rewards.items()
            },
            old_logprobs=_parts(self.old_logprobs, tokens),
            loss_mask=_parts(self.loss_mask, tokens),
            turn_rewards=turn_rewards,
            advantages=advantages,
            prompt_keys=_part(self.prompt_keys, self._prompt_range(index)),
            keys=_parts(self.keys, tokens),
            prompt_position_shifts=_part(self.prompt_position_shifts, self._prompt_range(index)),
            position_shifts=_parts(self.position_shifts, tokens),
            routes=None if self.routes is None else tuple(map(self.routes_of, responses)),
            finished=None if (finished == UNKNOWN).any() else finished == 1,
            answer=self.answers[index],
            record=self.records[index] if self.records else {},
            policy_version=None if version == UNKNOWN else version,
            source=self.sources[index],
        )

    def _of_responses(
        self, values: NDArray[np.float64] | None, responses: range
    ) -> list[NDArray[np.float64]] | None:
        """Values of the tokens of each of a group's responses; None where all are NaN."""
        if values is None:
            return None
        found = [values[self.tokens_of(response)] for response in responses]
        return None if all(np.isnan(part).all() for part in found) else found

    def groups(self) -> Iterable[RolloutGroup]:
        """All groups, one at a time."""
        return (self.group(index) for index in range(self.num_groups))

    def summary(self) -> RolloutSummary:
        """What every rank has to know of the batch."""
        lengths = np.diff(self.response_offsets).astype(np.int32)
        trained = lengths
        if self.loss_mask is not None:
            before = np.append(0, np.cumsum(self.loss_mask, dtype=np.int64))
            trained = np.diff(before[self.response_offsets]).astype(np.int32)
        return RolloutSummary(
            prompt_lengths=np.diff(self.prompt_offsets).astype(np.int32),
            group_sizes=np.diff(self.group_offsets).astype(np.int32),
            response_lengths=lengths,
            trained_lengths=trained,
            rewards=self.rewards,
            named_rewards=self.named_rewards,
            finished=self.finished,
            repeated=repeated_responses(self),
            largest_advantages=self._largest_advantages(),
            sources=self.sources,
            has_old_logprobs=self.old_logprobs is not None,
            has_loss_mask=self.loss_mask is not None,
            has_prompt_keys=self.prompt_keys is not None,
            has_keys=self.keys is not None,
            has_position_shifts=self.position_shifts is not None,
            no_routes=None if self.routes is None else np.empty_like(self.routes[:0]),
            prompt_routes=None if self.routes is None else prompt_routes(self),
        )

    def _largest_advantages(self) -> NDArray[np.float64] | None:
        """See `RolloutSummary.largest_advantages`."""
        if self.advantages is None:
            return None
        values = self.advantages
        if self.loss_mask is not None:
            values = np.where(self.loss_mask | np.isnan(values), values, 0.0)
        starts = self.response_offsets[:-1]
        high = np.maximum.reduceat(values, starts)
        low = np.minimum.reduceat(values, starts)
        return np.where(-low > high, low, high)


def plain_tokens(tokens: Tokens) -> tuple[int, ...]:
    """The tokens as Python's own whole numbers."""
    return tuple(tokens.tolist() if isinstance(tokens, np.ndarray) else tokens)


def _part(values: NDArray | None, where: slice) -> NDArray | None:
    return None if values is None else values[where]


def _parts(values: NDArray | None, where: Sequence[slice]) -> tuple[NDArray, ...] | None:
    return None if values is None else tuple(values[part] for part in where)


def check_all_or_none(known: Mapping[bool, str]) -> None:
    """Refuse old log-probabilities of some groups of a batch only.

    A response's ratio would depend on which groups share its row.

    Args:
        known: the source of a group with (True) and of one without (False), where there are such.
    """
    if len(known) > 1:
        raise ValueError(
            f"{known[False]}: old_logprobs: missing, but {known[True]}, of the same rollout batch, "
            "has them; give them for all groups or for none"
        )

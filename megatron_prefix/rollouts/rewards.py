"""Rewards: functions of a prompt, a response and what the data says about the answer.

Where the run has a tokenizer, `exact_match` compares text with an answer that is text,
`numeric` and `multiple_choice` read text, and so does a function of the user's, named
`module:function`. Without one, all of them see token ids.
"""

from __future__ import annotations

import dataclasses
import functools
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.packages import is_installed, missing_line
from megatron_prefix.rollouts.named_rewards import weighted_sum
from megatron_prefix.rollouts.names import (
    LIBRARY_REWARDS,
    REWARD_NAMES,
    TEXT_REWARD_NAMES,
    fault_of_name,
)
from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup, plain_tokens
from megatron_prefix.rollouts.reward_process import ProcessReward, reward_of
from megatron_prefix.rollouts.text.rewards import TEXT_REWARDS, TextRewardFunction
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
from megatron_prefix.rollouts.user_process import CallFailed
from megatron_prefix.rollouts.user_worker import result_of

if TYPE_CHECKING:  # reading rollouts needs NumPy only
    from megatron_prefix.config import RewardProcessConfig


Ids = tuple[int, ...]

RewardFunction = Callable[[Ids, Ids, Any], float]
"""How good a response is, a finite number: of the prompt, the response and the record's answer, as
JSON or Parquet gave it."""


def exact_match(prompt: Ids, response: Ids, answer: Any) -> float:
    """1 if the response is the answer, token for token (a stop token included), else 0."""
    return float(response == _answer_tokens(answer))


def token_match_fraction(prompt: Ids, response: Ids, answer: Any) -> float:
    """Positions at which response and answer agree, over the length of the longer one."""
    tokens = _answer_tokens(answer)
    agreeing = sum(a == b for a, b in zip(response, tokens, strict=False))
    return agreeing / max(len(response), len(tokens))


def contains_answer(prompt: Ids, response: Ids, answer: Any) -> float:
    """1 if the answer's tokens occur in the response one after another, else 0."""
    tokens = _answer_tokens(answer)
    starts = range(len(response) - len(tokens) + 1)
    return float(any(response[start : start + len(tokens)] == tokens for start in starts))


def ends_with_answer(prompt: Ids, response: Ids, answer: Any) -> float:
    """1 if the response ends with the answer's tokens (a stop token included), else 0."""
    tokens = _answer_tokens(answer)
    return float(response[-len(tokens) :] == tokens)


REWARDS: dict[str, RewardFunction] = {
    function.__name__: function
    for function in (exact_match, token_match_fraction, contains_answer, ends_with_answer)
}
"""The rewards that have a name."""

assert set(REWARDS) == set(REWARD_NAMES) and set(TEXT_REWARDS) == set(TEXT_REWARD_NAMES)


@dataclass(frozen=True)
class WeightedReward:
    """Several reward functions by name, which together give the weighted sum of their values."""

    functions: Mapping[str, RewardFunction]
    weights: Mapping[str, float]
    """Of each function."""

    def __call__(self, prompt: Ids, response: Ids, answer: Any) -> float:
        """The weighted sum of one response."""
        named = {
            name: np.array([function(prompt, response, answer)])
            for name, function in self.functions.items()
        }
        return float(weighted_sum(named, self.weights)[0])


def load_reward(
    spec: str,
    *,
    tokenizer: TextTokenizer | None = None,
    process: RewardProcessConfig | None = None,
) -> RewardFunction:
    """The reward function of a name, or of `module:function`.

    A module is imported, in another process, as Python finds it here: from the folder of the script
    that runs (with `python -m`, the current one), PYTHONPATH and what is installed.

    Args:
        spec: a name in `REWARDS`, `TEXT_REWARDS` or `LIBRARY_REWARDS`, or module:function.
        tokenizer: for rewards that read text.
        process: how a module:function is run.

    Raises:
        ValueError: there is no such name, module or function, the module does not import, its
            library is not installed, or a text reward has no tokenizer.
    """
    if fault := fault_of_name(spec, has_tokenizer=tokenizer is not None):
        raise ValueError(f"reward {spec!r}: {fault}")
    if spec in TEXT_REWARDS and tokenizer is not None:
        return _of_text(TEXT_REWARDS[spec], tokenizer, REWARDS.get(spec))
    if spec in REWARDS:
        return REWARDS[spec]
    if process is None:
        from megatron_prefix.config import RewardProcessConfig

        process = RewardProcessConfig()
    library = LIBRARY_REWARDS.get(spec)
    if library is None:
        return ProcessReward(spec, process, tokenizer=tokenizer)
    if library.package is not None and not is_installed(library.package):
        raise ValueError(missing_line(f"reward {spec!r}", library.project, library.extra))
    # A response that takes the library too long, or all the memory, is a wrong one.
    return ProcessReward(library.function, process, tokenizer=tokenizer, name=spec, when_ended=0.0)


def _of_text(
    function: TextRewardFunction, tokenizer: TextTokenizer, of_tokens: RewardFunction | None
) -> RewardFunction:
    """A text reward as a function of token ids; with `of_tokens`, where the answer is no text."""

    @functools.wraps(function)
    def reward(prompt: Ids, response: Ids, answer: Any) -> float:
        if of_tokens is not None and not isinstance(answer, str):
            return of_tokens(prompt, response, answer)
        return function(tokenizer.read(prompt), tokenizer.read(response), answer)

    return reward


def reward_batch(
    reward: RewardFunction,
    batch: RolloutBatch,
    unrewarded: Sequence[tuple[int, RolloutGroup]] | None = None,
) -> RolloutBatch:
    """The batch with rewards of its responses (see `reward_groups`).

    Args:
        reward: that is computed.
        batch: of any size.
        unrewarded: the responses that have none yet: groups, each with the index of its first
            response in the batch; None: all.
    """
    if unrewarded is None:
        unrewarded = list(zip(batch.group_offsets[:-1].tolist(), batch.groups(), strict=True))
    if not unrewarded:
        return batch
    groups = [group for _, group in unrewarded]
    places = np.concatenate(
        [first + np.arange(len(group.responses)) for first, group in unrewarded]
    )

    def placed(known: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
        filled = known.copy()
        filled[places] = values
        return filled

    def computed(function: RewardFunction) -> NDArray[np.float64]:
        return np.concatenate([np.array(found) for found in reward_groups(function, groups)])

    if not isinstance(reward, WeightedReward):
        return dataclasses.replace(batch, rewards=placed(batch.rewards, computed(reward)))
    values = {name: computed(function) for name, function in reward.functions.items()}
    unknown = np.full(batch.num_responses, np.nan)
    named = {
        name: placed(batch.named_rewards.get(name, unknown), found)
        for name, found in values.items()
    }
    return dataclasses.replace(
        batch,
        rewards=placed(batch.rewards, weighted_sum(values, reward.weights)),
        named_rewards={**batch.named_rewards, **named},
    )


def compute_rewards(reward: RewardFunction, group: RolloutGroup) -> tuple[float, ...]:
    """The reward of each response of the group, whose own rewards are not looked at."""
    return reward_groups(reward, [group])[0]


def reward_groups(
    reward: RewardFunction, groups: Sequence[RolloutGroup]
) -> list[tuple[float, ...]]:
    """For each group the reward of each of its responses.

    Raises:
        ValueError: the function raised, returned no finite float or int, or (in a process of its
            own) crashed or took too long; the message names the group's source, the response and
            the function.
    """
    if isinstance(reward, ProcessReward):
        values = iter(
            reward.map(
                [
                    (g.prompt, response, g.answer, g.record)
                    for g in groups
                    for response in g.responses
                ]
            )
        )
    else:
        values = (value for group in groups for value in _computed_here(reward, group))
    return [
        tuple(
            _checked(next(values), f"{group.source}: responses[{i}]: reward {_name(reward)}")
            for i in range(len(group.responses))
        )
        for group in groups
    ]


def _computed_here(reward: RewardFunction, group: RolloutGroup) -> Iterator[float | CallFailed]:
    """The rewards of a group's responses, in this process; a failed one is its `CallFailed`."""
    prompt = plain_tokens(group.prompt)
    for response in group.responses:
        try:
            result = result_of(reward(prompt, plain_tokens(response), group.answer))
        except Exception as error:
            # One line about somebody else's code; its traceback stays in the cause.
            failed = CallFailed(f"failed: {type(error).__name__}: {error}")
            failed.__cause__ = error
            yield failed
        else:
            yield reward_of(result)


def _checked(value: float | CallFailed, where: str) -> float:
    if isinstance(value, CallFailed):
        raise ValueError(f"{where} {value}") from (value.__cause__ or value)
    return value


def check_answer(reward: RewardFunction, answer: Any, source: str) -> None:
    """Refuse an answer that a reward with a name cannot compare with, such as token ids where text
    is compared, by a ValueError that begins with `source`; a user's function may read anything."""
    for function in _single(reward):
        if not isinstance(function, ProcessReward):
            try:
                function((0,), (0,), answer)
            except Exception as error:
                raise ValueError(
                    f"{source}: answer: reward {_name(function)}: {type(error).__name__}: {error}"
                ) from error


def close_reward(reward: RewardFunction | None) -> None:
    """End the processes that a reward runs in, if it has any."""
    for function in _single(reward):
        if isinstance(function, ProcessReward):
            function.close()


def _single(reward: RewardFunction | None) -> Sequence[RewardFunction | None]:
    """Those that a reward is the sum of, or itself."""
    return [*reward.functions.values()] if isinstance(reward, WeightedReward) else [reward]


def _answer_tokens(answer: Any) -> Ids:
    is_list = isinstance(answer, Sequence) and len(answer) > 0
    if not is_list or any(type(token) is not int for token in answer):
        raise ValueError(
            f"it compares with the answer's token ids; answer is {reprlib.repr(answer)}"
        )
    return tuple(answer)


def _name(reward: RewardFunction) -> str:
    if isinstance(reward, ProcessReward):
        return reward.name
    named = reward if hasattr(reward, "__qualname__") else type(reward)
    is_ours = named.__module__.startswith("megatron_prefix.")
    return named.__qualname__ if is_ours else f"{named.__module__}:{named.__qualname__}"

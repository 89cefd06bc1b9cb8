"""Rewards: functions of a prompt, a response and what the data says about the answer.

Where the run has a tokenizer, `exact_match` compares text with an answer that is text,
`numeric` and `multiple_choice` read text, and so does a function of the user's, named
`module:function`. Without one, all of them see token ids.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

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
from megatron_prefix.rollouts.reward_process import ProcessReward
from megatron_prefix.rollouts.text.rewards import TEXT_REWARDS, TextReward
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
from megatron_prefix.rollouts.user_process import CallFailed
from megatron_prefix.rollouts.user_worker import as_number

if TYPE_CHECKING:  # reading rollouts needs NumPy only
    from megatron_prefix.config import RewardProcessConfig


class RewardFunction(Protocol):
    """How good a response is. The same on every rank for the same arguments."""

    def __call__(self, prompt: tuple[int, ...], response: tuple[int, ...], answer: Any) -> float:
        """The reward, a finite number; `answer` is the record's, as JSON or Parquet gave it."""
        ...


def exact_match(prompt: tuple[int, ...], response: tuple[int, ...], answer: Any) -> float:
    """1 if the response is the answer, token for token (a stop token included), else 0."""
    return float(response == _answer_tokens(answer))


def token_match_fraction(prompt: tuple[int, ...], response: tuple[int, ...], answer: Any) -> float:
    """Positions at which response and answer agree, over the length of the longer one."""
    tokens = _answer_tokens(answer)
    agreeing = sum(a == b for a, b in zip(response, tokens, strict=False))
    return agreeing / max(len(response), len(tokens))


def contains_answer(prompt: tuple[int, ...], response: tuple[int, ...], answer: Any) -> float:
    """1 if the answer's tokens occur in the response one after another, else 0."""
    tokens = _answer_tokens(answer)
    starts = range(len(response) - len(tokens) + 1)
    return float(any(response[start : start + len(tokens)] == tokens for start in starts))


def ends_with_answer(prompt: tuple[int, ...], response: tuple[int, ...], answer: Any) -> float:
    """1 if the response ends with the answer's tokens (a stop token included), else 0."""
    tokens = _answer_tokens(answer)
    return float(response[-len(tokens) :] == tokens)


REWARDS: dict[str, RewardFunction] = {
    function.__name__: function
    for function in (exact_match, token_match_fraction, contains_answer, ends_with_answer)
}
"""The rewards that have a name."""

assert set(REWARDS) == set(REWARD_NAMES) and set(TEXT_REWARDS) == set(TEXT_REWARD_NAMES)


class _ExactMatch:
    """`exact_match`, of text or of tokens as the answer is one or the other."""

    name = "exact_match"

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._of_text = TextReward(TEXT_REWARDS["exact_match"], tokenizer)

    def __call__(self, prompt: tuple[int, ...], response: tuple[int, ...], answer: Any) -> float:
        compare = self._of_text if isinstance(answer, str) else exact_match
        return compare(prompt, response, answer)


class WeightedReward:
    """Several reward functions by name, which together give the weighted sum of their values."""

    def __init__(
        self, functions: Mapping[str, RewardFunction], weights: Mapping[str, float]
    ) -> None:
        """Of the same names.

        Args:
            functions: at least one.
            weights: of each.
        """
        assert functions.keys() == weights.keys()
        self.functions, self.weights = functions, weights

    def __call__(self, prompt: tuple[int, ...], response: tuple[int, ...], answer: Any) -> float:
        """The weighted sum of one response."""
        group = RolloutGroup(
            prompt=prompt, responses=(response,), rewards=(), answer=answer, source="response"
        )
        return float(computed_rewards(self, [group]).totals[0])


@dataclass(frozen=True, kw_only=True, eq=False)
class ComputedRewards:
    """Of R responses of several groups."""

    totals: NDArray[np.float64]
    """[R] what they are trained by."""
    named: Mapping[str, NDArray[np.float64]]
    """[R] each, of a `WeightedReward`; empty for a single reward."""


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
        if spec in REWARDS:
            return _ExactMatch(tokenizer)
        return TextReward(TEXT_REWARDS[spec], tokenizer)
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


def reward_batch(
    reward: RewardFunction,
    batch: RolloutBatch,
    unrewarded: Sequence[tuple[int, RolloutGroup]] | None = None,
) -> RolloutBatch:
    """The batch with rewards of its responses.

    Args:
        reward: that is computed.
        batch: of any size.
        unrewarded: the responses that have none yet: groups, each with the index of its first
            response in the batch; None: all.

    Raises:
        ValueError: see `compute_rewards`.
    """
    if unrewarded is None:
        unrewarded = list(zip(batch.group_offsets[:-1].tolist(), batch.groups(), strict=True))
    if not unrewarded:
        return batch
    computed = computed_rewards(reward, [group for _, group in unrewarded])
    places = np.concatenate(
        [first + np.arange(len(group.responses)) for first, group in unrewarded]
    )

    def placed(known: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
        filled = known.copy()
        filled[places] = values
        return filled

    unknown = np.full(batch.num_responses, np.nan)
    named = {
        name: placed(batch.named_rewards.get(name, unknown), values)
        for name, values in computed.named.items()
    }
    return dataclasses.replace(
        batch,
        rewards=placed(batch.rewards, computed.totals),
        named_rewards={**batch.named_rewards, **named},
    )


def computed_rewards(reward: RewardFunction, groups: Sequence[RolloutGroup]) -> ComputedRewards:
    """The rewards of all responses of the groups, one group behind the other.

    Raises:
        ValueError: see `compute_rewards`.
    """
    if isinstance(reward, WeightedReward):
        named = {
            name: computed_rewards(function, groups).totals
            for name, function in reward.functions.items()
        }
        return ComputedRewards(totals=weighted_sum(named, reward.weights), named=named)
    found = [value for of_group in reward_groups(reward, groups) for value in of_group]
    return ComputedRewards(totals=np.array(found, dtype=np.float64), named={})


def compute_rewards(reward: RewardFunction, group: RolloutGroup) -> tuple[float, ...]:
    """The reward of each response of the group, whose own rewards are not looked at.

    Raises:
        ValueError: the function raised, returned no finite float or int, or (in a process of its
            own) crashed or took too long; the message names the group's source, the response and
            the function.
    """
    return reward_groups(reward, [group])[0]


def reward_groups(
    reward: RewardFunction, groups: Sequence[RolloutGroup]
) -> list[tuple[float, ...]]:
    """For each group the reward of each of its responses.

    Raises:
        ValueError: see `compute_rewards`.
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
            _checked(next(values), group, response, reward)
            for response in range(len(group.responses))
        )
        for group in groups
    ]


def _computed_here(reward: RewardFunction, group: RolloutGroup) -> Iterator[float | CallFailed]:
    """The rewards of a group's responses, in this process; a failed one is its `CallFailed`."""
    prompt = plain_tokens(group.prompt)
    for response in group.responses:
        try:
            value = reward(prompt, plain_tokens(response), group.answer)
        except Exception as error:
            failed = CallFailed(f"failed: {_described(error)}")
            failed.__cause__ = error
            yield failed
            continue
        number = as_number(value)
        if number is None:
            shown = f"{reprlib.repr(value)}, a {type(value).__name__}; it must return a float"
            yield CallFailed(f"returned {shown}")
        elif not math.isfinite(number):
            yield CallFailed(f"returned {value}; it must return a finite number")
        else:
            yield number


def _checked(
    value: float | CallFailed, group: RolloutGroup, response: int, reward: RewardFunction
) -> float:
    if isinstance(value, CallFailed):
        where = f"{group.source}: responses[{response}]: reward {_name(reward)}"
        raise ValueError(f"{where} {value}") from (value.__cause__ or value)
    return value


def check_answer(reward: RewardFunction, answer: Any, source: str) -> None:
    """Refuse an answer that a reward with a name cannot compare with; a user's function may read
    anything.

    Raises:
        ValueError: such as token ids where text is compared; the message begins with `source`.
    """
    if isinstance(reward, WeightedReward):
        for function in reward.functions.values():
            check_answer(function, answer, source)
    elif not isinstance(reward, ProcessReward):
        try:
            reward((0,), (0,), answer)
        except Exception as error:
            raise ValueError(
                f"{source}: answer: reward {_name(reward)}: {_described(error)}"
            ) from error


def close_reward(reward: RewardFunction | None) -> None:
    """End the processes that a reward runs in, if it has any."""
    if isinstance(reward, WeightedReward):
        for function in reward.functions.values():
            close_reward(function)
    if isinstance(reward, ProcessReward):
        reward.close()


def _answer_tokens(answer: Any) -> tuple[int, ...]:
    if (
        not isinstance(answer, Sequence)
        or len(answer) == 0
        or any(type(token) is not int for token in answer)
    ):
        raise ValueError(
            f"it compares with the answer's token ids; answer is {reprlib.repr(answer)}"
        )
    return tuple(answer)


def _name(reward: RewardFunction) -> str:
    for name, function in REWARDS.items():
        if function is reward:
            return name
    if isinstance(reward, (ProcessReward, TextReward, _ExactMatch)):
        return reward.name
    module = getattr(reward, "__module__", type(reward).__module__)
    return f"{module}:{getattr(reward, '__qualname__', type(reward).__qualname__)}"


def _described(error: Exception) -> str:
    """One line about an error of somebody else's code; its traceback stays in the cause."""
    return f"{type(error).__name__}: {error}"

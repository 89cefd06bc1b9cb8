"""A user's reward function in processes of its own (see `user_process`).

def reward(prompt, response, answer): ...                   a number
def reward(prompt, response, answer, record): ...           with the record's other fields
def reward(prompts, responses, answers[, records]): ...     a number for each of many responses
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from megatron_prefix.rollouts.records import Tokens, plain_tokens
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
from megatron_prefix.rollouts.user_process import CallEnded, CallFailed, UserFunction

if TYPE_CHECKING:  # reading rollouts needs NumPy only
    from megatron_prefix.config import RewardProcessConfig

logger = logging.getLogger(__name__)

Call = tuple[Tokens, Tokens, Any, Mapping[str, Any]]
"""The prompt, the response, the answer and the record's other fields that a call is about."""
_SEVERAL = ["prompts", "responses", "answers"]
"""Names of the first parameters of a function that takes many responses at once."""


class WrongValue(CallFailed):
    """A call that returned what is no reward: the function is wrong, whatever it is called with."""


class ProcessReward:
    """A `RewardFunction` whose calls run in worker processes."""

    def __init__(
        self,
        spec: str,
        config: RewardProcessConfig,
        *,
        tokenizer: TextTokenizer | None = None,
        name: str | None = None,
        when_ended: float | None = None,
    ) -> None:
        """Start the first process, which imports the function.

        Args:
            spec: module:function.
            config: how many processes, how long a call may take, what a failed one is worth.
            tokenizer: gives the function the text of prompt and response; without one it gets
                their token ids.
            name: what errors call it; None: `spec`.
            when_ended: reward of a response whose call crashed or took too long, where the config
                gives none.

        Raises:
            ValueError: there is no such module or function, or the module does not import.
        """
        self.name = name or spec
        self._when_ended = when_ended
        self._config = config
        self._tokenizer = tokenizer
        try:
            self._function = UserFunction(
                spec, processes=config.processes, timeout_s=config.timeout_s
            )
        except CallFailed as error:
            raise ValueError(f"reward {self.name!r}: {error}") from error
        self.failures = 0
        """Calls that were given `on_failure`."""

    def __call__(
        self,
        prompt: tuple[int, ...],
        response: tuple[int, ...],
        answer: Any,
        record: Mapping[str, Any] | None = None,
    ) -> float:
        """The reward of one response.

        Raises:
            CallFailed: the call failed and `on_failure` is None, or it returned no finite number.
        """
        (found,) = self.map([(prompt, response, answer, record or {})])
        if isinstance(found, CallFailed):
            raise found
        return found

    def map(self, calls: Sequence[Call]) -> list[Any]:
        """Rewards of many responses, side by side; a failed one leaves its `CallFailed`."""
        if self._function.parameters[:3] == _SEVERAL:
            return self._together(calls)
        with ThreadPoolExecutor(max_workers=self._config.processes) as threads:
            return list(threads.map(self._one, calls))

    def _one(self, call: Call) -> Any:
        try:
            return _reward(self._function(*self._arguments(call)))
        except CallFailed as error:
            return self._on_failure(error)

    def _together(self, calls: Sequence[Call]) -> list[Any]:
        """Of a function that takes all of them in one call."""
        arguments = [list(values) for values in zip(*map(self._arguments, calls), strict=True)]
        try:
            answer = self._function(*arguments)
        except CallFailed as error:
            return [self._on_failure(error) for _ in calls]
        items = answer.get("items")
        if items is None or len(items) != len(calls):
            shown = answer.get("shown", answer.get("value"))
            wrong = WrongValue(f"returned {shown}; it must return a list of {len(calls)} numbers")
            return [wrong] * len(calls)
        return [_reward_or_fault(item) for item in items]

    def _arguments(self, call: Call) -> tuple[Any, ...]:
        prompt, response, answer, record = call
        read = self._tokenizer.read if self._tokenizer is not None else tuple
        # Only now: plain numbers of a whole batch would take gigabytes.
        given = (read(plain_tokens(prompt)), read(plain_tokens(response)), answer, dict(record))
        return given if len(self._function.parameters) > 3 else given[:3]

    def _on_failure(self, error: CallFailed) -> CallFailed | float:
        on_failure = self._config.on_failure
        if on_failure is None and isinstance(error, CallEnded):
            on_failure = self._when_ended
        if on_failure is None or isinstance(error, WrongValue):
            return error
        self.failures += 1
        logger.warning("reward %s %s; it counts as %g", self.name, error, on_failure)
        return on_failure

    def close(self) -> None:
        """End the processes; a later call starts new ones."""
        self._function.close()


def _reward(answer: dict[str, Any]) -> float:
    if "value" not in answer:
        raise WrongValue(f"returned {answer['shown']}, a {answer['kind']}; it must return a float")
    if not math.isfinite(answer["value"]):
        raise WrongValue(f"returned {answer['value']}; it must return a finite number")
    return answer["value"]


def _reward_or_fault(answer: dict[str, Any]) -> float | WrongValue:
    try:
        return _reward(answer)
    except WrongValue as wrong:
        return wrong

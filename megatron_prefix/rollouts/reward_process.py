"""A user's reward function in processes of its own (see `user_process`).

def reward(prompt, response, answer): ...                   a number
def reward(prompt, response, answer, record): ...           with the record's other fields
def reward(prompts, responses, answers[, records]): ...     a number for each of many responses
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
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
        """Start the first process, which imports the function of `spec`, module:function.

        Args:
            spec, config: see `UserFunction`; the config also says what a failed call is worth.
            tokenizer: gives the function text; without one it gets token ids.
            name: what errors call it; None: `spec`.
            when_ended: reward of a response whose call crashed or took too long, where the config
                gives none.

        Raises:
            ValueError: there is no such module or function, or the module does not import.
        """
        self.name = name or spec
        self._config = config
        self._when_ended = when_ended if config.on_failure is None else config.on_failure
        self._read = tuple if tokenizer is None else tokenizer.read
        try:
            self._function = UserFunction(
                spec, processes=config.processes, timeout_s=config.timeout_s
            )
        except CallFailed as error:
            raise ValueError(f"reward {self.name!r}: {error}") from error
        self.failures = 0
        """Calls that were given a reward though they failed."""

    def __call__(self, prompt: tuple[int, ...], response: tuple[int, ...], answer: Any) -> float:
        """The reward of one response; raises the `CallFailed` that `map` leaves."""
        (found,) = self.map([(prompt, response, answer, {})])
        if isinstance(found, CallFailed):
            raise found
        return found

    def map(self, calls: Sequence[Call]) -> list[float | CallFailed]:
        """Rewards of many responses, side by side; a failed one leaves its `CallFailed`."""
        if self._function.parameters[:3] != _SEVERAL:
            return [self._reward(found) for found in self._function.map(calls, self._arguments)]
        (answer,) = self._function.map(
            [calls], lambda all_of: list(map(list, zip(*map(self._arguments, all_of), strict=True)))
        )
        if isinstance(answer, CallFailed):
            return [self._reward(answer) for _ in calls]
        items = answer.get("items", ())
        if len(items) != len(calls):
            shown = answer.get("shown", answer.get("value"))
            text = f"returned {shown}; it must return a list of {len(calls)} numbers"
            return [CallFailed(text)] * len(calls)
        return [self._reward(item) for item in items]

    def _arguments(self, call: Call) -> tuple[Any, ...]:
        prompt, response = (self._read(plain_tokens(tokens)) for tokens in call[:2])
        given = (prompt, response, call[2], dict(call[3]))
        return given if len(self._function.parameters) > 3 else given[:3]

    def _reward(self, answer: dict[str, Any] | CallFailed) -> float | CallFailed:
        """The reward of an answer; of a call that failed, what it is worth."""
        if not isinstance(answer, CallFailed):
            return reward_of(answer)
        worth = self._config.on_failure
        if isinstance(answer, CallEnded):
            worth = self._when_ended
        if worth is None:
            return answer
        self.failures += 1
        logger.warning("reward %s %s; it counts as %g", self.name, answer, worth)
        return worth

    def close(self) -> None:
        """End the processes; a later call starts new ones."""
        self._function.close()


def reward_of(result: Mapping[str, Any]) -> float | CallFailed:
    """The reward that a result is (see `result_of`): a function that returns anything but a finite
    number is wrong, whatever it is called with."""
    if "value" not in result:
        return CallFailed(f"returned {result['shown']}, a {result['kind']}; it must return a float")
    if not math.isfinite(result["value"]):
        return CallFailed(f"returned {result['shown']}; it must return a finite number")
    return result["value"]

"""A user's reward function in processes of its own (see `user_process`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from megatron_prefix.rollouts.records import Tokens, plain_tokens
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
from megatron_prefix.rollouts.user_process import CallEnded, CallFailed, UserFunction

if TYPE_CHECKING:  # reading rollouts needs NumPy only
    from megatron_prefix.config import RewardProcessConfig

logger = logging.getLogger(__name__)

Call = tuple[Tokens, Tokens, Any]
"""The prompt, the response and the answer that one call is about."""


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

    def __call__(self, prompt: tuple[int, ...], response: tuple[int, ...], answer: Any) -> float:
        """The reward of one response.

        Raises:
            CallFailed: the call failed, and there is no reward for that.
        """
        read = self._tokenizer.read if self._tokenizer is not None else tuple
        try:
            return _reward(self._function(read(prompt), read(response), answer))
        except CallFailed as error:
            on_failure = self._config.on_failure
            if on_failure is None and isinstance(error, CallEnded):
                on_failure = self._when_ended
            if on_failure is None:
                raise
            self.failures += 1
            logger.warning("reward %s %s; it counts as %g", self.name, error, on_failure)
            return on_failure

    def map(self, calls: Sequence[Call]) -> list[Any]:
        """Rewards of many responses, side by side; a failed one leaves its `CallFailed`."""

        def attempt(call: Call) -> Any:
            prompt, response, answer = call
            try:
                # Only now: plain numbers of a whole batch would take gigabytes.
                return self(plain_tokens(prompt), plain_tokens(response), answer)
            except CallFailed as error:
                return error

        with ThreadPoolExecutor(max_workers=self._config.processes) as threads:
            return list(threads.map(attempt, calls))

    def close(self) -> None:
        """End the processes; a later call starts new ones."""
        self._function.close()


def _reward(answer: dict[str, Any]) -> float:
    if "value" not in answer:
        raise CallFailed(f"returned {answer['shown']}, a {answer['kind']}; it must return a float")
    if not math.isfinite(answer["value"]):
        raise CallFailed(f"returned {answer['value']}; it must return a finite number")
    return answer["value"]

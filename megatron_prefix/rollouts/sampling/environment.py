"""The user's environment: what it is asked after a turn, and what it may answer.

    def environment(messages, answer):
        return {"messages": [{"role": "tool", "content": "5"}], "reward": 0.0}

Without messages, or with "done": true, the dialogue has ended. It keeps nothing between calls: each
call has the whole dialogue, and may run in another process than the last one.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from megatron_prefix.config.rollouts import AgentConfig
from megatron_prefix.rollouts.text.messages import Message, checked_messages
from megatron_prefix.rollouts.user_process import CallFailed, UserFunction

_KEYS = ("messages", "reward", "done")


@dataclass(frozen=True, kw_only=True)
class Reaction:
    """What the environment says to a turn."""

    messages: tuple[Message, ...]
    """That the model sees next; none where the dialogue has ended."""
    reward: float


class Environment:
    """Runs the function in processes of its own."""

    def __init__(self, config: AgentConfig) -> None:
        """Start the first process, which imports the function.

        Raises:
            ValueError: there is no such module or function, or the module does not import.
        """
        try:
            self._function = UserFunction(
                config.environment,
                processes=config.processes,
                timeout_s=config.turn_timeout_s,
            )
        except CallFailed as error:
            raise ValueError(
                f"rollouts.agent.environment: {config.environment}: {error}"
            ) from error

    def react(
        self, dialogues: Sequence[tuple[Sequence[Message], Any]]
    ) -> list[Reaction | CallFailed]:
        """For each dialogue and its record's answer the reaction to its last turn, or its failure.

        Calls run side by side.
        """

        def attempt(dialogue: tuple[Sequence[Message], Any]) -> Reaction | CallFailed:
            messages, answer = dialogue
            try:
                return _reaction(self._function(list(messages), answer))
            except CallFailed as error:
                return error

        with ThreadPoolExecutor(max_workers=self._function.processes) as threads:
            return list(threads.map(attempt, dialogues))

    def close(self) -> None:
        """End the processes."""
        self._function.close()


def _reaction(answer: dict[str, Any]) -> Reaction:
    found = answer.get("object")
    if not isinstance(found, dict):
        shown = answer.get("shown", answer.get("value"))
        raise CallFailed(
            f"returned {shown}; it must return a dict of what JSON can hold, with "
            f"{', '.join(_KEYS)}"
        )
    for key in found:
        if key not in _KEYS:
            raise CallFailed(f"returned {key!r}; what is read are {', '.join(_KEYS)}")
    reward = found.get("reward", 0.0)
    if type(reward) not in (int, float) or not abs(reward) < float("inf"):
        raise CallFailed(f"returned the reward {reprlib.repr(reward)}; it must be a finite number")
    messages: list[Message] = []
    if found.get("messages") and not found.get("done"):
        try:
            messages = checked_messages(found["messages"], "returned messages")
        except ValueError as error:
            raise CallFailed(str(error)) from error
        if any(message["role"] == "assistant" for message in messages):
            raise CallFailed("returned a message of the assistant, which only the model says")
    return Reaction(messages=tuple(messages), reward=float(reward))

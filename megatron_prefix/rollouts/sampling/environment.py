"""The user's environment: what it is asked after a turn, and what it may answer.

    def environment(messages, answer):
        return {"messages": [{"role": "tool", "content": "5"}], "reward": 0.0}

Without messages, or with "done": true, the dialogue has ended. It keeps nothing between calls: each
call has the whole dialogue, and may run in another process than the last one.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
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
        answers = self._function.map(dialogues, lambda item: (list(item[0]), item[1]))
        return [_reaction(answer) for answer in answers]

    def close(self) -> None:
        """End the processes."""
        self._function.close()


def _reaction(answer: dict[str, Any] | CallFailed) -> Reaction | CallFailed:
    try:
        return answer if isinstance(answer, CallFailed) else _checked(answer)
    except ValueError as error:
        return CallFailed(str(error))


def _checked(answer: dict[str, Any]) -> Reaction:
    found = answer.get("object")
    if not isinstance(found, dict):
        shown = answer.get("shown", answer.get("value"))
        raise ValueError(
            f"returned {shown}; it must return a dict of what JSON can hold, with "
            f"{', '.join(_KEYS)}"
        )
    for key in found:
        if key not in _KEYS:
            raise ValueError(f"returned {key!r}; what is read are {', '.join(_KEYS)}")
    reward = found.get("reward", 0.0)
    if type(reward) not in (int, float) or not abs(reward) < float("inf"):
        raise ValueError(f"returned the reward {reprlib.repr(reward)}; it must be a finite number")
    messages: list[Message] = []
    if found.get("messages") and not found.get("done"):
        messages = checked_messages(found["messages"], "returned messages")
        if any(message["role"] == "assistant" for message in messages):
            raise ValueError("returned a message of the assistant, which only the model says")
    return Reaction(messages=tuple(messages), reward=float(reward))

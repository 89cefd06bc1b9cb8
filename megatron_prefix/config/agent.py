"""The part of the `rollouts` section about agents: several turns with an environment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_prefix.config.bounds import below, refuse


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Responses of several turns, between which an environment answers."""

    environment: str
    """`module:function`, called after each turn with the messages so far and the record's answer;
    see [agents](../rollouts/README.md#agents)."""
    tool_calls: Literal["text", "hermes"] = "text"
    """How the model's calls of tools reach the environment: in the text, as the model wrote them,
    or read from it into the message's `tool_calls`. `hermes` reads
    `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, which the chat templates of Hermes'
    and Qwen's models ask for."""
    max_turns: int = 8
    """Turns of the model in a response at most."""
    max_seconds: float = 600.0
    """Seconds after which responses take no further turn."""
    turn_timeout_s: float = 30.0
    """Seconds of a call of the environment at most; a longer call is ended, with its process."""
    processes: int = 4
    """Processes that calls of the environment run in, at most."""
    on_failure: float | None = None
    """Reward of a response whose environment raised, crashed or took too long, in place of its
    others; null: the response is left out, as one that the server did not give
    (`server.partial_groups`)."""
    turn_rewards: bool = False
    """Rewards that the environment gives are those of turns (`objective.turn_advantage`); false:
    their sum is the reward of the response."""

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        module, colon, function = self.environment.partition(":")
        if not (module and colon and function):
            yield f"environment: {self.environment} is not of the form module:function"
        yield from below(self, 1, "max_turns", "processes")
        for name in ("max_seconds", "turn_timeout_s"):
            if not getattr(self, name) > 0:
                yield f"{name}: {getattr(self, name)} must be above 0"

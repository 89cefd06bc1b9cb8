"""The environment of the agent example: shelves that a tool looks into.

A task names two shelves, such as "3 7 ?". The model says which one to open, and sees what lies in
it, two digits. It is rewarded if it opened the second shelf and then says the second digit.
"""

from __future__ import annotations

from typing import Any


def lookup(messages: list[dict[str, Any]], answer: dict[str, Any]) -> dict[str, Any]:
    """Answer the model's turn; see `rollouts.agent.environment`."""
    said = [message["content"].strip() for message in messages if message["role"] == "assistant"]
    if len(said) == 1:
        found = answer["shelves"].get(said[0])
        # A shelf that is not there ends the dialogue.
        return {"messages": [{"role": "tool", "content": found}] if found else []}
    return {"reward": float(said == [answer["shelf"], answer["digit"]])}

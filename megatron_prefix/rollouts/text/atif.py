"""Steps of the Agent Trajectory Interchange Format (ATIF) as messages of a chat.

https://harborframework.com/docs/trajectory-format describes the format. A step of an agent is a
message of the assistant; the results that it observed follow as messages of tools.
"""

from __future__ import annotations

import json
import reprlib
from typing import Any

from megatron_prefix.rollouts.text.messages import Message, checked_messages, without_nulls

_ROLES = {"system": "system", "user": "user", "agent": "assistant"}


def messages_of_steps(steps: Any, where: str) -> list[Message]:
    """The messages of a trajectory's steps.

    Args:
        steps: of the record.
        where: the record's source and the field, as errors begin with it.

    Raises:
        ValueError: no list of steps, or a step that is wrong, naming it.
    """
    if not isinstance(steps, list) or not steps:
        raise ValueError(f"{where}: {reprlib.repr(steps)} is not a list of steps")
    messages = []
    for i, step in enumerate(steps):
        if not isinstance(step, dict) or step.get("source") not in _ROLES:
            raise ValueError(
                f"{where}[{i}]: {reprlib.repr(step)} is no step; its source must be one of "
                f"{', '.join(_ROLES)}"
            )
        messages += _messages_of(without_nulls(step), f"{where}[{i}]")
    return checked_messages(messages, where)


def _messages_of(step: dict[str, Any], where: str) -> list[Message]:
    message: Message = {"role": _ROLES[step["source"]], "content": step.get("message", "")}
    if step["source"] == "agent":
        message |= _sampled(step.get("metrics", {}))
        if step.get("reasoning_content"):
            message["reasoning_content"] = step["reasoning_content"]
        if step.get("tool_calls"):
            message["tool_calls"] = [
                _tool_call(call, f"{where}.tool_calls[{i}]")
                for i, call in enumerate(step["tool_calls"])
            ]
    results = step.get("observation", {}).get("results", [])
    return [message, *(_observed(result) for result in results)]


def _sampled(metrics: dict[str, Any]) -> Message:
    """The ids that were sampled, and their log-probabilities where there are ids."""
    if "completion_token_ids" not in metrics:
        return {}
    found = {"token_ids": metrics["completion_token_ids"]}
    return {**found, "logprobs": metrics["logprobs"]} if "logprobs" in metrics else found


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("function_name"), str):
        raise ValueError(f"{where}: {reprlib.repr(call)} is no tool call with a function_name")
    function = {"name": call["function_name"], "arguments": call.get("arguments", {})}
    return {"id": call.get("tool_call_id", ""), "type": "function", "function": function}


def _observed(result: dict[str, Any]) -> Message:
    content = result.get("content", "")
    if not isinstance(content, (str, list)):
        content = json.dumps(content)
    message: Message = {"role": "tool", "content": content}
    if "source_call_id" in result:
        message["tool_call_id"] = result["source_call_id"]
    return message

"""Calls of tools in the text of a model's turn."""

from __future__ import annotations

import json
import re
from typing import Any

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def split_tool_calls(text: str, *, turn: int) -> tuple[str, list[dict[str, Any]]]:
    """What a turn says, and the tools that it calls, in the form of OpenAI's messages.

    A call is `<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>`, as the templates of
    Hermes' and Qwen's models ask for. Arguments are an object, not its JSON text. A turn with a
    call that is not of this form stays text as a whole, and has no calls.

    Args:
        text: of the turn.
        turn: index of the turn in its response, which makes the ids of calls different.
    """
    calls = []
    for i, written in enumerate(_CALL.findall(text)):
        try:
            call = json.loads(written)
        except (ValueError, RecursionError):
            return text, []
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return text, []
        arguments = call.get("arguments", {})
        if not isinstance(arguments, dict):
            return text, []
        function = {"name": call["name"], "arguments": arguments}
        calls.append({"id": f"call_{turn}_{i}", "type": "function", "function": function})
    return (_CALL.sub("", text).strip(), calls) if calls else (text, [])

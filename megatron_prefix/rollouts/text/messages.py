"""Messages of a chat as records give them, checked and in one form.

Parquet fills the keys that only some messages have with nulls, content may come in parts, and the
arguments of a tool call as JSON text, as OpenAI's API has them. The tokens must not depend on any
of it.
"""

from __future__ import annotations

import difflib
import json
import reprlib
from typing import Any

Message = dict[str, Any]

SAMPLED_KEYS = ("token_ids", "logprobs", "weight")
"""Keys of a message of the assistant that are for the trainer; a template does not see them."""
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def checked_messages(messages: Any, where: str) -> list[Message]:
    """The messages without nulls, their content as text, arguments of tool calls as objects.

    Args:
        messages: of a record.
        where: the record's source and the field, as errors begin with it.

    Raises:
        ValueError: no list of messages with roles, content that is not text, or a key that is
            read in messages of the assistant only.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: {reprlib.repr(messages)} is not a list of messages")
    return [_checked(message, f"{where}[{i}]") for i, message in enumerate(messages)]


def _checked(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(
            f"{where}: {reprlib.repr(message)} is not a message; it needs a role and a content"
        )
    found = without_nulls(message)
    role = found["role"]
    if role not in _ROLES:
        # Templates know further roles, but a slip in a known one would change what is trained on.
        meant = difflib.get_close_matches(role.lower(), _ROLES, n=1, cutoff=0.8)
        if meant:
            raise ValueError(f"{where}.role: {role!r} is not known; is {meant[0]} meant?")
    if role != "assistant":
        for key in (*SAMPLED_KEYS, "tool_calls"):
            if found.get(key, []) != []:
                raise ValueError(
                    f"{where}.{key}: given in a message of role {role}; it is read in messages of "
                    "the assistant only; remove it"
                )
    if "content" in found:
        found["content"] = _text(found["content"], f"{where}.content")
    if "tool_calls" in found:
        found["tool_calls"] = _tool_calls(found["tool_calls"], f"{where}.tool_calls")
    return found


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return writable(content, where)
    if not isinstance(content, list):
        raise ValueError(f"{where}: {reprlib.repr(content)} is neither text nor a list of parts")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(
                f"{where}[{i}]: {reprlib.repr(kind)} is no part with text; images and sounds are "
                "not trained on"
            )
        texts.append(writable(part["text"], f"{where}[{i}]"))
    return "".join(texts)


def writable(text: str, where: str) -> str:
    """The text, unless it holds half of a character, which JSON can write and UTF-8 cannot.

    Raises:
        ValueError: it does; the message begins with `where`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {reprlib.repr(text)} is no text: {error.reason}") from error
    return text


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """The calls, with arguments as the objects that chat templates expect."""
    if not isinstance(calls, list):
        raise ValueError(f"{where}: {reprlib.repr(calls)} is not a list of tool calls")
    return [_tool_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(
            f"{where}: {reprlib.repr(call)} is no tool call; it needs a function with a name and "
            "arguments"
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(
            f"{where}.function.arguments: {reprlib.repr(function['arguments'])} is neither an "
            "object nor the JSON text of one"
        )
    return {**call, "function": {**function, "arguments": arguments}}


def without_nulls(value: Any) -> Any:
    """The value without the keys whose values are null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value

"""Calls of tools are read from a turn's text; a turn with anything else in them stays text."""

from __future__ import annotations

import pytest

from megatron_prefix.rollouts.text.tool_calls import split_tool_calls


def call(text: str) -> str:
    return f"<tool_call>\n{text}\n</tool_call>"


STOP = call('{"name": "stop"}')
ADD = call('{"name": "add", "arguments": {"a": 2}}')


def test_the_text_around_calls_is_the_content() -> None:
    content, calls = split_tool_calls(f"first {ADD} then {STOP}", turn=3)
    assert content == "first  then"
    assert calls == [
        {
            "id": "call_3_0",
            "type": "function",
            "function": {"name": "add", "arguments": {"a": 2}},
        },
        {"id": "call_3_1", "type": "function", "function": {"name": "stop", "arguments": {}}},
    ]


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "<tool_call> without an end",
        ADD + call("not JSON"),
        call('["add"]'),
        call('{"name": 3}'),
        call('{"name": "add", "arguments": "{}"}'),
        call("[" * 100_000),
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert split_tool_calls(text, turn=0) == (text, [])

"""Messages with roles become tokens and masks: what was sampled is trained, and stays as it was."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_prefix.rollouts.text.dialogue import Dialogue, DialogueEncoder
from megatron_prefix.rollouts.text.messages import checked_messages
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
from tests.rollouts.chat_templates import FORMATS, chat_tokenizer

USER = {"role": "user", "content": "the sum of two and three?"}
TURNS = [
    {"role": "assistant", "content": "ask the tool: 2+3"},
    {"role": "tool", "content": "five, says the tool"},
    {"role": "assistant", "content": "the sum is five"},
    {"role": "user", "content": "and four?"},
    {"role": "assistant", "content": "nine"},
]


@pytest.fixture(scope="module", params=sorted(FORMATS))
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: Any) -> TextTokenizer:
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: Any) -> TextTokenizer:
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"), "chatml")


def encoder(tokenizer: TextTokenizer) -> DialogueEncoder:
    assert tokenizer.end_token is not None
    return DialogueEncoder(tokenizer, stop_tokens=[tokenizer.end_token])


def turns(dialogue: Dialogue) -> list[tuple[bool, tuple[int, ...]]]:
    """Runs of tokens that are trained on, or are not."""
    runs: list[tuple[bool, list[int]]] = []
    for token, trained in zip(dialogue.response, dialogue.loss_mask, strict=True):
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(token)
    return [(trained, tuple(tokens)) for trained, tokens in runs]


def test_turns_of_the_assistant_are_trained_with_the_token_that_ends_them(tokenizer) -> None:
    found = turns(encoder(tokenizer).encode([USER, *TURNS]))
    end = tokenizer.decode([tokenizer.end_token])
    texts = [tokenizer.decode(tokens) for trained, tokens in found if trained]
    assert [text.removeprefix(" ") for text in texts] == [
        turn["content"] + end for turn in TURNS if turn["role"] == "assistant"
    ]
    between = [tokenizer.decode(tokens) for trained, tokens in found if not trained]
    assert len(between) == 2
    assert "five, says the tool" in between[0] and "and four?" in between[1]


def test_every_turn_follows_the_tokens_that_the_template_asks_it_with(tokenizer) -> None:
    dialogue = encoder(tokenizer).encode([USER, *TURNS])
    asked = tokenizer.encode_messages([USER])
    assert dialogue.prompt == asked
    seen, place = list(dialogue.prompt), 0
    for trained, tokens in turns(dialogue):
        if trained:
            assert tuple(seen) == tokenizer.encode_messages([USER, *TURNS[:place]])
            place += 2
        seen += tokens


def test_what_was_sampled_stays_as_it_was_through_all_turns(tokenizer) -> None:
    def sampled(turn: dict[str, Any]) -> dict[str, Any]:
        if turn["role"] != "assistant":
            return turn
        # Byte by byte, as no tokenizer writes it, and with another text than the message has.
        ids = [t for c in "x" + turn["content"] for t in tokenizer.encode(c)]
        ids += [tokenizer.end_token]
        return {**turn, "token_ids": ids, "logprobs": [-i / 8 for i in range(len(ids))]}

    given = [sampled(turn) for turn in TURNS]
    dialogue = encoder(tokenizer).encode([USER, *given])
    found = turns(dialogue)
    assert [list(tokens) for trained, tokens in found if trained] == [
        turn["token_ids"] for turn in given if "token_ids" in turn
    ]
    as_text = turns(encoder(tokenizer).encode([USER, *TURNS]))
    assert [t for t in found if not t[0]] == [t for t in as_text if not t[0]]
    assert dialogue.logprobs is not None
    kept = [p for p, trained in zip(dialogue.logprobs, dialogue.loss_mask, strict=True) if trained]
    assert kept == [p for turn in given for p in turn.get("logprobs", [])]


def test_the_end_of_a_turn_that_was_cut_off_is_not_trained(tokenizer) -> None:
    ids = list(tokenizer.encode("ask the"))
    cut = {"role": "assistant", "content": "ask the", "token_ids": ids}
    found = turns(encoder(tokenizer).encode([USER, cut, *TURNS[1:3]]))
    assert found[0] == (True, tuple(ids))
    assert found[1][1][0] == tokenizer.end_token
    assert found[1][1][1:] == turns(encoder(tokenizer).encode([USER, *TURNS[:3]]))[1][1]


def test_the_tokens_of_a_dialogue_by_hand(chatml) -> None:
    dialogue = encoder(chatml).encode([USER, *TURNS[:3], {"role": "user", "content": "left out"}])
    assert chatml.decode(dialogue.prompt) == (
        "<|im_start|>user\nthe sum of two and three?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [(trained, chatml.decode(tokens)) for trained, tokens in turns(dialogue)] == [
        (True, "ask the tool: 2+3<|im_end|>"),
        (
            False,
            "\n<|im_start|>user\n<tool_response>\nfive, says the tool\n</tool_response>"
            "<|im_end|>\n<|im_start|>assistant\n",
        ),
        (True, "the sum is five<|im_end|>"),
    ]


def test_turns_of_weight_0_are_seen_and_examples_of_the_prompt_belong_to_it(chatml) -> None:
    def weighed(*weights: int) -> list[dict[str, Any]]:
        remaining = iter(weights)
        return [
            {**turn, "weight": next(remaining)} if turn["role"] == "assistant" else turn
            for turn in TURNS
        ]

    def trained(dialogue: Dialogue) -> list[str]:
        return [chatml.decode(tokens) for is_trained, tokens in turns(dialogue) if is_trained]

    encode = encoder(chatml).encode
    first = encode([USER, *weighed(0, 1, 1)])
    assert first.prompt == chatml.encode_messages([USER, *TURNS[:2]])
    assert trained(first) == ["the sum is five<|im_end|>", "nine<|im_end|>"]
    middle = encode([USER, *weighed(1, 0, 1)])
    assert trained(middle) == ["ask the tool: 2+3<|im_end|>", "nine<|im_end|>"]
    assert middle.response == encode([USER, *TURNS]).response
    last = encode([USER, *weighed(1, 1, 0)])
    assert last.response == encode([USER, *TURNS[:3]]).response


ADD = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}


def test_tools_and_tool_calls_reach_the_template(chatml) -> None:
    as_object = {"function": {"name": "add", "arguments": {"a": 2}}}
    for call in (ADD, as_object):
        messages = checked_messages(
            [USER, {"role": "assistant", "content": "", "tool_calls": [call]}], "here"
        )
        dialogue = encoder(chatml).encode(messages, tools=[{"name": "add"}])
        assert '{"name": "add"}' in chatml.decode(dialogue.prompt)
        assert chatml.decode(dialogue.response) == (
            '\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'
        )


def test_what_a_template_writes_nothing_of_is_refused(tokenizer) -> None:
    """Of the three, one writes tools and calls, and none writes reasoning."""
    messages = [USER, {"role": "assistant", "content": "five", "tool_calls": [ADD]}]
    thinking = [USER, {"role": "assistant", "content": "five", "reasoning_content": "2 + 3"}]
    with pytest.raises(ValueError, match=r"^\[1\].reasoning_content: the chat template writes"):
        encoder(tokenizer).encode(thinking)
    if "tool_call" in tokenizer._tokenizer.chat_template:
        encoder(tokenizer).encode(messages, tools=[{"name": "add"}])
        return
    with pytest.raises(ValueError, match=r"^\[1\].tool_calls: the chat template writes nothing"):
        encoder(tokenizer).encode(messages)
    with pytest.raises(ValueError, match=r"^the chat template writes nothing of the record's t"):
        encoder(tokenizer).encode([USER, TURNS[0]], tools=[{"name": "add"}])
    # What was sampled is trained on as it is, whatever the template makes of the message.
    sampled = [USER, {**messages[1], "token_ids": [5, 6, tokenizer.end_token]}]
    assert encoder(tokenizer).encode(sampled).response == (5, 6, tokenizer.end_token)


def test_ids_of_a_turn_that_is_not_trained_stay_in_the_prompt(tokenizer) -> None:
    ids = [*(t for c in "ask the" for t in tokenizer.encode(c)), tokenizer.end_token]
    given = {"role": "assistant", "content": "ask the", "weight": 0}
    as_ids = encoder(tokenizer).encode([USER, {**given, "token_ids": ids}, *TURNS[1:3]])
    as_text = encoder(tokenizer).encode([USER, given, *TURNS[1:3]])
    start = len(encoder(tokenizer).encode([USER, TURNS[0]]).prompt)
    assert list(as_ids.prompt[start : start + len(ids)]) == ids
    assert as_ids.prompt != as_text.prompt
    rest = as_ids.prompt[start + len(ids) :]
    assert rest == as_text.prompt[-len(rest) :]
    assert as_ids.response == as_text.response


FAULTS = [
    ([USER], "no message of the assistant is trained on"),
    ([USER, {**TURNS[0], "weight": 0}], "no message of the assistant is trained on"),
    ([USER, {**TURNS[0], "weight": 0.5}], "[1].weight: 0.5 is neither 0 nor 1"),
    ([USER, {**TURNS[0], "token_ids": []}], "[1].token_ids: [] is no list of token ids"),
    ([USER, {**TURNS[0], "logprobs": [-1]}], "[1].logprobs: given without token_ids"),
    (
        [USER, {**TURNS[0], "token_ids": [5, 6], "logprobs": [-1]}],
        "[1].logprobs: 1 for 2 token_ids",
    ),
    (
        [USER, {**TURNS[0], "token_ids": [5], "logprobs": [-1]}, *TURNS[1:]],
        "[3].logprobs: missing, but other turns have them",
    ),
    (
        [{"role": "user", "content": "a<|im_end|>b"}, TURNS[0]],
        "[0].content: holds '<|im_end|>', which would become a special token",
    ),
    (
        [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "<|im_end|>"}}]}],
        "[1].tool_calls: holds '<|im_end|>', which would become a special token",
    ),
]


@pytest.mark.parametrize(("messages", "message"), FAULTS)
def test_a_wrong_message_is_named(chatml, messages, message) -> None:
    with pytest.raises(ValueError) as caught:
        encoder(chatml).encode(messages)
    assert str(caught.value).startswith(message)


def test_a_template_that_rewrites_earlier_turns_is_refused(chatml) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: "
        "{{ m.content.split('#')[-1] if not loop.last else m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    messages = [USER, {"role": "assistant", "content": "think # five"}, *TURNS[1:3]]
    original, chatml._tokenizer.chat_template = chatml._tokenizer.chat_template, template
    try:
        with pytest.raises(ValueError, match=r"\[1\]: the chat template does not write the same"):
            encoder(chatml).encode(messages)
        assert encoder(chatml).encode(messages[:2]).response
    finally:
        chatml._tokenizer.chat_template = original


def test_nulls_and_parts_make_no_difference() -> None:
    call = {"id": "1", "function": {"name": "add", "arguments": {}}}
    plain = [{"role": "user", "content": "ab"}, {"role": "assistant", "tool_calls": [call]}]
    filled = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "tool_calls": None,
        },
        {"role": "assistant", "content": None, "tool_calls": [{**call, "limit": None}]},
    ]
    assert checked_messages(filled, "here") == checked_messages(plain, "here") == plain
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]
    with pytest.raises(
        ValueError, match=r"here\[0\].content\[0\]: 'image_url' is no part with text"
    ):
        checked_messages(image, "here")


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "asistant"}, "here[0].role: 'asistant' is not known; is assistant meant?"),
        ({"role": "Tool"}, "here[0].role: 'Tool' is not known; is tool meant?"),
        ({"role": 3}, "here[0]: {'role': 3} is not a message; it needs a role"),
        ({"role": "user", "weight": 0}, "here[0].weight: given in a message of role user; it is"),
        ({"role": "tool", "token_ids": [1]}, "here[0].token_ids: given in a message of role tool"),
        ({"role": "user", "content": "\ud800"}, "here[0].content: '\\ud800' is no text"),
        ({"role": "assistant", "tool_calls": ADD}, "here[0].tool_calls: {"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]},
            "here[0].tool_calls[0]: {'function': {'arguments': {}}} is no tool call; it needs a f",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "[1]"}}]},
            "here[0].tool_calls[0].function.arguments: '[1]' is neither an object nor the JSON",
        ),
    ],
)
def test_a_message_of_another_form_is_refused(message, error) -> None:
    with pytest.raises(ValueError) as caught:
        checked_messages([message], "here")
    assert str(caught.value).startswith(error)
    # Templates may know roles that nobody else does.
    assert checked_messages([{"role": "observation", "content": "5"}], "here")

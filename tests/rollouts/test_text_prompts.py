"""Prompts of text: records, templates, chats, their order, and where a run goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_prefix.config import TextConfig
from megatron_prefix.rollouts.engine import EndOfRollouts
from megatron_prefix.rollouts.text.prompts import TextPrompts
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
from tests.rollouts.files import FORMATS, write
from tests.rollouts.servers import save_word_tokenizer

WORDS = [*"0123456789", "<s>", "user:", "system:", "assistant:", "what", "is", "+", "</s>", "?"]
START, USER, SYSTEM, ASSISTANT = (WORDS.index(w) for w in WORDS[10:14])
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = save_word_tokenizer(tmp_path_factory.mktemp("tokenizer"), WORDS, "</s>")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> TextTokenizer:
    return TextTokenizer(folder, vocab_size=len(WORDS))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def prompts(path: Path, tokenizer: TextTokenizer, **options: Any) -> TextPrompts:
    text = {
        name: options.pop(name)
        for name in ("prompt_template", "chat", "system", "answer_field")
        if name in options
    }
    return TextPrompts(
        [path],
        tokenizer,
        TextConfig(tokenizer=tokenizer.path, **text),
        vocab_size=len(WORDS),
        max_prompt_length=10,
        **{"shuffle": False, "seed": 5, "epochs": 1, **options},
    )


@pytest.mark.parametrize("suffix", FORMATS)
def test_text_messages_and_token_ids_become_prompts(tmp_path, tokenizer, suffix):
    records = [
        {"prompt": "what is 2 + 3", "answer": "5"},
        {"prompt": "4", "answer": "4"},
    ]
    path = write(tmp_path / f"prompts{suffix}", records)
    found = prompts(path, tokenizer).take(2)
    assert [p.tokens for p in found] == [(14, 15, 2, 16, 3), (4,)]
    assert [p.answer for p in found] == ["5", "4"]
    assert found[1].source.startswith(str(path))

    mixed = write(
        tmp_path / "mixed.jsonl",
        [
            {"messages": [{"role": "user", "content": "2 + 3"}], "answer": 5},
            {"prompt": [2, 16, 3], "answer": [5]},
        ],
    )
    found = prompts(mixed, tokenizer).take(2)
    assert [p.tokens for p in found] == [(USER, 2, 16, 3, ASSISTANT), (2, 16, 3)]
    assert [p.answer for p in found] == [5, [5]]


def test_templates_fill_in_fields_and_chats_put_them_into_a_message(tmp_path, tokenizer):
    path = write(tmp_path / "sums.jsonl", [{"a": 2, "b": "3", "sum": 5}])
    options = {"prompt_template": "what is {a} + {b}", "answer_field": "sum"}
    [prompt] = prompts(path, tokenizer, **options).take(1)
    assert (prompt.tokens, prompt.answer) == ((14, 15, 2, 16, 3), 5)
    options |= {"prompt_template": "{a} + {b}", "chat": True, "system": "7"}
    [prompt] = prompts(path, tokenizer, **options).take(1)
    assert prompt.tokens == (SYSTEM, 7, USER, 2, 16, 3, ASSISTANT)


def numbers(path: Path, count: int) -> Path:
    return write(path, [{"prompt": str(n), "answer": n} for n in range(count)])


def test_each_epoch_has_an_order_of_its_own_that_the_seed_decides(tmp_path, tokenizer):
    path = numbers(tmp_path / "numbers.jsonl", 10)

    def answers(**options: Any) -> list[int]:
        source = prompts(path, tokenizer, shuffle=True, epochs=2, **options)
        return [p.answer for p in source.take(20)]

    first = answers()
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(10))
    assert first[:10] != first[10:]
    assert answers() == first
    assert answers(seed=6) != first
    assert [p.answer for p in prompts(path, tokenizer).take(10)] == list(range(10))


def test_a_position_is_continued_over_the_end_of_an_epoch(tmp_path, tokenizer):
    path = numbers(tmp_path / "numbers.jsonl", 5)
    source = prompts(path, tokenizer, shuffle=True, epochs=2)
    source.take(4)
    state = json.loads(json.dumps(source.state_dict()))
    expected = source.take(3)
    source.close()
    moved = tmp_path / "elsewhere" / "numbers.jsonl"
    moved.parent.mkdir()
    shutil.copy(path, moved)
    other = prompts(moved, tokenizer, shuffle=True, epochs=2)
    other.load_state_dict(state)
    assert [p.tokens for p in other.take(3)] == [p.tokens for p in expected]
    with pytest.raises(EndOfRollouts, match="3 are left, 4 were asked for"):
        other.take(4)
    assert len(other.take(3)) == 3
    with pytest.raises(
        ValueError, match=r"the order of the prompts has changed: .* seed 5, but is 6"
    ):
        prompts(path, tokenizer, shuffle=True, seed=6).load_state_dict(state)
    with pytest.raises(ValueError, match="the files of prompts have changed"):
        prompts(numbers(path, 6), tokenizer, shuffle=True).load_state_dict(state)


def test_a_file_that_has_changed_is_read_anew(tmp_path, tokenizer):
    path = numbers(tmp_path / "numbers.jsonl", 3)
    assert len(prompts(path, tokenizer).take(3)) == 3
    numbers(path, 4)
    assert len(prompts(path, tokenizer).take(4)) == 4


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        ({"answer": 1}, {}, ":2: prompt: missing, and so is messages"),
        ({"prompt": 3}, {}, ":2: prompt: 3 is neither text nor a list of token ids"),
        ({"prompt": ""}, {}, ":2: prompt: is empty"),
        ({"prompt": "1 " * 11}, {}, ":2: prompt: its 11 tokens leave .* at most 10"),
        ({"prompt": [99]}, {}, r":2: prompt\[0\]: token 99 is outside the vocabulary"),
        ({"promt": "1"}, {}, ":2: promt: not a known field; is prompt meant"),
        ({"messages": []}, {}, r":2: messages: \[\] is not a list of messages"),
        ({"messages": [{"content": "1"}]}, {}, r":2: messages\[0\]: .* needs a role"),
        (
            {"messages": [{"role": "user", "content": "1"}], "tools": [{"name": "add"}]},
            {},
            ":2: messages: the chat template writes nothing of the record's tools",
        ),
        (
            {"prompt": "1", "tools": [{"name": "add"}]},
            {"chat": True},
            ":2: prompt: the chat template writes nothing of the record's tools",
        ),
        ({"prompt": "1", "tools": [{"name": "add"}]}, {}, ":2: tools: read by a chat template, w"),
        ({"prompt": [1], "tools": [{"name": "add"}]}, {"chat": True}, ":2: tools: read by a chat"),
        (
            {"messages": [{"role": "assistant", "content": "1", "weight": 0}, {"role": "user"}]},
            {},
            r":2: messages\[0\].weight: not read in a prompt",
        ),
        ({"messages": [{"role": "user"}]}, {}, ":2: messages: the chat template of .* refuses it"),
        ({"b": 1}, {"prompt_template": "{a}"}, ":2: a: missing, but .*prompt_template names it"),
        ({"prompt": [1], "prompt_keys": [0]}, {}, ":2: prompt_keys: no engine that samples looks"),
        ('{"prompt": ', {}, ":2: not a JSON object"),
    ],
)
def test_a_wrong_record_is_named_by_file_line_and_field(
    tmp_path, tokenizer, record, options, message
):
    lines = [json.dumps({"prompt": "1", "a": 1}), record if isinstance(record, str) else None]
    lines[1] = lines[1] or json.dumps(record)
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    source = prompts(path, tokenizer, **options)
    with pytest.raises(ValueError, match=message) as caught:
        source.take(2)
    assert str(caught.value).startswith(str(path))


def test_an_empty_file_and_a_tokenizer_that_does_not_fit_are_refused(tmp_path, folder, tokenizer):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"no record in .*empty.jsonl"):
        prompts(tmp_path / "empty.jsonl", tokenizer).take(1)
    with pytest.raises(ValueError, match=r"has 19 tokens, but model.vocab_size is 18"):
        TextTokenizer(folder, vocab_size=18)
    with pytest.raises(ValueError, match="not loaded as a Hugging Face tokenizer"):
        TextTokenizer(tmp_path, vocab_size=18)
    with pytest.raises(ValueError, match=rf"there is no folder {tmp_path}/nowhere, and: "):
        TextTokenizer(tmp_path / "nowhere", vocab_size=18)


def test_text_for_a_server_is_one_that_gives_exactly_the_tokens(tokenizer):
    assert tokenizer.as_text((14, 15, 2)) == "what is 2"
    # A stop token within a prompt is a word of its own.
    assert tokenizer.encode_prompt(tokenizer.as_text((2, 17, 3))) == (2, 17, 3)

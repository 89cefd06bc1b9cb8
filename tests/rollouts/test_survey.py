"""Records of other programs become prompts, and all are looked at before the first step."""

from __future__ import annotations

import datetime
import decimal
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_prefix.config import RolloutsConfig, TextConfig
from megatron_prefix.rollouts.mixed_prompts import MixedPrompts
from megatron_prefix.rollouts.names import fault_of_path
from megatron_prefix.rollouts.prompts import Prompt, prompt_stream
from megatron_prefix.rollouts.rewards import exact_match, load_reward
from megatron_prefix.rollouts.survey import survey_groups, survey_prompts
from megatron_prefix.rollouts.text.prompts import TextPrompts
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
from megatron_prefix.rollouts.usable import Usable
from tests.rollouts.chat_templates import chat_tokenizer
from tests.rollouts.files import FORMATS, engine, write

ASKED = [{"role": "user", "content": "the sum of two and three"}]
VERL = {
    "data_source": "math",
    "prompt": ASKED,
    "ability": "math",
    "reward_model": {"ground_truth": "5", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": 7, "split": "train"},
}
BESIDE = {
    "thumbnail": b"\x89PNG",
    "added": datetime.date(2025, 1, 2),
    "level": decimal.Decimal("2.5"),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"), "chatml")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def source(path: Path, tokenizer: TextTokenizer, **options: Any) -> TextPrompts:
    text = {"answer_field": options.pop("answer_field", "answer"), **options.pop("text", {})}
    return TextPrompts(
        [path],
        tokenizer,
        TextConfig(tokenizer=tokenizer.path, **text),
        vocab_size=400,
        **{"max_prompt_length": 60, "shuffle": False, "seed": 5, "epochs": 1, **options},
    )


def test_rows_of_verl_are_prompts_as_they_are_and_of_the_same_tokens_in_either_format(
    tmp_path, tokenizer
):
    found: list[Prompt] = []
    for path in (
        write(tmp_path / "train.parquet", [{**VERL, **BESIDE}]),
        write(tmp_path / "train.jsonl", [VERL]),
        write(tmp_path / "openai.jsonl", [{"messages": ASKED, "answer": "5"}]),
        write(tmp_path / "trl.jsonl", [{"prompt": ASKED, "answer": "5", "solution": "2 + 3 = 5"}]),
    ):
        field = "reward_model.ground_truth" if path.name.startswith("train") else "answer"
        found += source(path, tokenizer, answer_field=field).take(1)
    assert {prompt.tokens for prompt in found} == {tokenizer.encode_messages(ASKED)}
    assert {prompt.answer for prompt in found} == {"5"}
    assert found[0].record["extra_info"] == found[1].record["extra_info"] == VERL["extra_info"]
    assert (found[0].record["level"], found[0].record["added"]) == (2.5, "2025-01-02")


def test_nulls_that_parquet_fills_in_change_no_token(tmp_path, tokenizer):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    other = {"type": "function", "function": {"name": "find", "arguments": {"limit": 3}}}
    chat = [
        *ASKED,
        {"role": "assistant", "content": "add", "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "find", "tool_calls": [other]},
        {"role": "user", "content": "and one?"},
    ]
    records = [{"messages": chat, "answer": "5"}]
    tokens = [
        source(write(tmp_path / f"chat{suffix}", records), tokenizer, max_prompt_length=300)
        .take(1)[0]
        .tokens
        for suffix in FORMATS
    ]
    assert len(set(tokens)) == 1
    assert "null" not in tokenizer.decode(tokens[0])


def test_data_sets_are_mixed_by_ratios_and_a_position_is_continued(tmp_path):
    files = [
        write(tmp_path / name, [{"prompt": [first, n], "answer": [1]} for n in range(count)])
        for name, first, count in (("a.jsonl", 1, 3), ("b.jsonl", 2, 5))
    ]

    def mixed(*ratios: float) -> MixedPrompts:
        streams = [prompt_stream([path], vocab_size=9, max_prompt_length=5) for path in files]
        return MixedPrompts(streams, ratios)

    prompts = mixed(3, 1)
    taken = [prompt.tokens for prompt in prompts.take(3)]
    state = json.loads(json.dumps(prompts.state_dict()))
    taken += [prompt.tokens for prompt in prompts.take(5)]
    for count in range(1, 9):
        assert abs(sum(tokens[0] == 1 for tokens in taken[:count]) - 0.75 * count) < 1
    # Each goes through its own epochs.
    assert [n for first, n in taken if first == 1] == [0, 1, 2, 0, 1, 2]
    other = mixed(3, 1)
    other.load_state_dict(state)
    assert [prompt.tokens for prompt in other.take(5)] == taken[3:]
    changed = mixed(1, 1)
    changed.load_state_dict(state)
    assert sum(prompt.tokens[0] == 2 for prompt in changed.take(4)) == 2
    write(files[1], [{"prompt": [99], "answer": [1]}])
    broken = mixed(1, 1)
    before = broken.state_dict()
    with pytest.raises(ValueError, match=r"b.jsonl:1: prompt"):
        broken.take(2)
    assert broken.state_dict() == before
    with pytest.raises(ValueError, match="not one in 2 data sets"):
        broken.load_state_dict({"epoch": 0})


def test_a_pattern_is_all_files_of_such_a_name_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        write(tmp_path / name, [{"prompt": [1]}])
    config = RolloutsConfig(paths=(tmp_path / "*.jsonl", tmp_path / "c.txt"))
    assert [path.name for path in config.files] == ["a.jsonl", "b.jsonl", "c.txt"]
    assert [len(files) for files in config.data_sets] == [2, 1]
    missing = RolloutsConfig(paths=(tmp_path / "*.parquet",))
    assert fault_of_path(missing.files[0]) == f"{tmp_path}/*.parquet: no file matches"
    with pytest.raises(ValueError, match=r"ratios: \[1.0\] must be a number above 0 for each of"):
        sampling = {"group_size": 2, "max_response_length": 2, "reward": "numeric"}
        RolloutsConfig(engine="embedded", paths=config.paths, ratios=(1.0,), **sampling)
    with pytest.raises(ValueError, match="ratios: not with engine: file"):
        RolloutsConfig(paths=config.paths, ratios=(1.0, 2.0))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "hello \ud83d world"}, r":1: prompt: 'hello .* is no text: surrogates not all"),
        ({**VERL, "answer": 5}, ":1: reward_model.truth: missing, but .*answer_field names it"),
        ({**VERL, "images": [{"path": "a.png"}]}, ":1: images: images and sounds are not trained"),
    ],
)
def test_what_is_no_text_is_named_by_line_and_field(tmp_path, tokenizer, record, message):
    path = write(tmp_path / "a.jsonl", [record])
    field = "reward_model.truth" if "truth" in message else "answer"
    with pytest.raises(ValueError, match=f"{path}{message}"):
        source(path, tokenizer, answer_field=field).take(1)


def test_a_template_that_writes_todays_date_is_warned_of_once(tmp_path, caplog):
    tokenizer = chat_tokenizer(tmp_path / "dated", "chatml")
    template = tokenizer._tokenizer.chat_template
    tokenizer._tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + template
    for _ in range(2):
        tokenizer.encode_messages(ASKED)
    assert [r.message for r in caplog.records if "writes today's date" in r.message] == [
        f"the chat template of {tokenizer.path} writes today's date (strftime_now): the same "
        "records give other tokens on another day; set a template with a fixed date, or without one"
    ]


def test_one_prompt_too_long_is_said_before_the_first_step_or_left_out_and_counted(
    tmp_path, tokenizer, caplog
):
    caplog.set_level(logging.INFO)
    words = ["two", "two " * 100, "three", "five"]
    path = write(tmp_path / "a.jsonl", [{"prompt": w, "answer": "5", "note": 1} for w in words])
    reward = load_reward("numeric", tokenizer=tokenizer)
    refusing = source(path, tokenizer)
    with pytest.raises(ValueError, match=r"a.jsonl:2: prompt: its 1\d\d tokens .*unusable: leave_"):
        survey_prompts(refusing.each(), reward, Usable(), at_most=100)
    usable = Usable(leave_out=True)
    leaving = source(path, tokenizer, usable=usable, shuffle=True, epochs=2)
    survey_prompts(leaving.each(), reward, usable, at_most=100, read_fields=leaving.read_fields)
    assert "records: 3 prompts" in caplog.text
    assert "left out: 1 too long for the model" in caplog.text
    assert "a reward function of your own may read: note" in caplog.text
    # The survey leaves the position, and a position in the middle is continued.
    first = [prompt.source for prompt in leaving.take(2)]
    state = leaving.state_dict()
    rest = [prompt.source for prompt in leaving.take(4)]
    assert sorted(first + rest) == sorted(2 * [f"{path}:{line}" for line in (1, 3, 4)])
    again = source(path, tokenizer, usable=usable, shuffle=True, epochs=2)
    again.load_state_dict(state)
    assert [prompt.source for prompt in again.take(4)] == rest


def test_prompts_of_token_ids_that_are_too_long_are_left_out_too(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": [1] * n, "answer": [1]} for n in (2, 9, 3)])
    usable = Usable(leave_out=True)
    stream = prompt_stream([path], vocab_size=4, max_prompt_length=5, epochs=1, usable=usable)
    survey_prompts(stream.each(), exact_match, usable, at_most=100)
    assert usable.left_out == {"too long for the model": 1}
    assert [len(prompt.tokens) for prompt in stream.take(2)] == [2, 3]
    every = write(tmp_path / "b.jsonl", [{"prompt": [1] * 9, "answer": [1]}])
    stream = prompt_stream([every], vocab_size=4, max_prompt_length=5, usable=usable)
    with pytest.raises(ValueError, match="leave_out leaves no record: 1 too long for the model"):
        survey_prompts(stream.each(), exact_match, usable, at_most=100)


@pytest.mark.parametrize(
    ("reward", "answer", "message"),
    [
        ("numeric", "five", "reward numeric: ValueError: it compares with a number; answer is 'f"),
        ("numeric", None, "reward numeric: ValueError: it compares with a number; answer is None"),
        ("ends_with_answer", "5", "reward ends_with_answer: ValueError: .* the answer's token ids"),
    ],
)
def test_a_reward_that_does_not_fit_an_answer_is_refused_before_anything_is_sampled(
    tmp_path, tokenizer, reward, answer, message
):
    records = [{"prompt": "two", "answer": "5" if reward == "numeric" else [5]}]
    path = write(tmp_path / "a.jsonl", [*records, {"prompt": "three", "answer": answer}])
    prompts = source(path, tokenizer).each()
    with pytest.raises(ValueError, match=f"a.jsonl:2: answer: {message}"):
        survey_prompts(prompts, load_reward(reward, tokenizer=tokenizer), Usable(), at_most=9)


GROUP = {"prompt": [1], "responses": [[2, 3], [4, 5]], "rewards": [1.0, 0.0]}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("fill", [-9999.0, -100.0])
def test_log_probabilities_that_are_none_are_named_before_the_step_or_left_out(
    tmp_path, suffix, fill
):
    records = [
        {**GROUP, "old_logprobs": [[-0.5, -1.0], [-0.5, fill]]},
        {**GROUP, "old_logprobs": [[-0.5, -1.0], [-0.5, -2.0]]},
        # What is not trained on needs none.
        {
            **GROUP,
            "old_logprobs": [[-0.5, -1.0], [-0.5, fill]],
            "loss_mask": [[True, True], [True, False]],
        },
    ]
    path = write(tmp_path / f"a{suffix}", records)
    with pytest.raises(ValueError, match=rf"old_logprobs\[1\]\[1\]: {fill:g} is no log-prob"):
        survey_groups(engine(path).each(), None, Usable(), at_most=9)
    usable = Usable(leave_out=True)
    reader = engine(path, usable=usable, epochs=1)
    survey_groups(reader.each(), None, usable, at_most=9)
    assert usable.left_out == {"log-probabilities that are none": 1}
    assert reader.next_rollouts(2, step=0).num_groups == 2


def test_a_file_exchanged_for_another_of_the_same_size_is_noticed(tmp_path, tokenizer, caplog):
    path = write(tmp_path / "a.jsonl", [{"prompt": "two", "answer": n} for n in range(4)])
    prompts = source(path, tokenizer)
    prompts.take(1)
    state = prompts.state_dict()
    write(path, [{"prompt": "ten", "answer": n} for n in range(4)])
    with pytest.raises(ValueError, match="the files of prompts have changed"):
        source(path, tokenizer).load_state_dict(state)
    groups = write(tmp_path / "b.jsonl", [GROUP] * 3)
    reader = engine(groups)
    reader.next_rollouts(1, step=0)
    state = reader.state_dict()
    write(groups, [{**GROUP, "rewards": [0.0, 1.0]}] * 3)
    engine(groups).load_state_dict(state)
    assert "the files of rollouts have changed since" in caplog.text

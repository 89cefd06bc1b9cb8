"""Records of other programs are read as they are, and what is wrong with one is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_prefix.rollouts.record_forms import RecordForms
from megatron_prefix.rollouts.text.dialogue import DialogueEncoder
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
from tests.rollouts.chat_templates import chat_tokenizer
from tests.rollouts.files import engine, plain, write
from tests.rollouts.test_dialogues import TURNS, USER

AREAL = {
    "group": 3,
    "input_ids": [5, 6, 7, 8, 9, 10, 11, 0, 0],
    "attention_mask": [1, 1, 1, 1, 1, 1, 1, 0, 0],
    "loss_mask": [0, 0, 1, 1, 0, 1, 0, 0, 0],
    "logprobs": [0.0, 0.0, -0.5, -1.5, 0.25, -2.0, 0.0, 0.0, 0.0],
    "versions": [-1, -1, 4, 4, -1, 4, -1, -1, -1],
    "rewards": 1.0,
}
VERL = {
    "uid": "a",
    "prompts": [0, 0, 5, 6],
    "responses": [7, 8, 9, 10, 0],
    "attention_mask": [0, 0, 1, 1, 1, 1, 1, 1, 0],
    "response_mask": [1, 1, 0, 1, 0],
    "rollout_log_probs": [-0.5, -1.5, 0.0, -2.0, 0.0],
    "token_level_scores": [0.0, 0.0, 0.0, 1.0, 0.0],
}


def assert_is_the_trajectory(group: Any) -> None:
    assert group.prompt == (5, 6)
    assert group.responses == ((7, 8, 9, 10),)
    assert group.loss_mask == ((True, True, False, True),)
    assert group.old_logprobs == ((-0.5, -1.5, 0.0, -2.0),)
    assert group.rewards == (1.0,)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("record", [AREAL, VERL], ids=["areal", "verl"])
def test_a_padded_sequence_is_its_prompt_and_what_follows(tmp_path, suffix, record) -> None:
    path = write(tmp_path / f"a{suffix}", [record])
    (group,) = plain(engine(path).next_rollouts(1, step=0))
    assert_is_the_trajectory(group)


def test_flags_may_be_true_and_false_and_rewards_a_list_of_one(tmp_path) -> None:
    record = {**AREAL, "loss_mask": [bool(m) for m in AREAL["loss_mask"]], "rewards": [1.0]}
    del record["attention_mask"]
    path = write(tmp_path / "a.jsonl", [record])
    (group,) = plain(engine(path).next_rollouts(1, step=0))
    # Without the last trained token nothing is trained: what follows it is left out.
    assert_is_the_trajectory(group)


def test_advantages_come_with_a_sequence(tmp_path) -> None:
    record = {**AREAL, "advantages": [9, 9, 1.5, -2, 9, 3, 9, 9, 9]}
    path = write(tmp_path / "a.jsonl", [record])
    (group,) = plain(engine(path).next_rollouts(1, step=0))
    assert group.advantages == ((1.5, -2.0, 0.0, 3.0),)


def test_fields_may_stand_under_other_names(tmp_path) -> None:
    record = {"group": "a", "prompt": [1], "ids": [2, 3], "reward_model": {"score": 0.5}}
    path = write(tmp_path / "a.jsonl", [record])
    forms = RecordForms({"response": "ids", "reward": "reward_model.score"})
    (group,) = plain(engine(path, forms=forms).next_rollouts(1, step=0))
    assert (group.responses, group.rewards) == (((2, 3),), (0.5,))
    both = write(tmp_path / "b.jsonl", [{**record, "reward": 1.0}])
    with pytest.raises(ValueError, match=r"b.jsonl:1: reward: the record has it, and rollouts.fie"):
        engine(both, forms=forms).next_rollouts(1, step=0)
    with pytest.raises(ValueError, match=r"rollouts.fields: rewrad: no field that is read; choose"):
        RecordForms({"rewrad": "score"})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: Any) -> TextTokenizer:
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"), "chatml")


@pytest.fixture(scope="module")
def forms(tokenizer: TextTokenizer) -> RecordForms:
    return RecordForms(dialogues=DialogueEncoder(tokenizer, stop_tokens=[tokenizer.end_token]))


def _read(path: Path, forms: RecordForms) -> Any:
    found = engine(path, forms=forms, vocab_size=400, max_positions=400).next_rollouts(1, step=0)
    (group,) = plain(found)
    return group


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_messages_of_a_group_are_its_responses(tmp_path, tokenizer, forms, suffix) -> None:
    records = [
        {"group": "a", "messages": [USER, *TURNS], "turn_rewards": [0.0, 1.0, 0.5]},
        {"group": "a", "messages": [USER, TURNS[0]], "turn_rewards": [0.25]},
    ]
    group = _read(write(tmp_path / f"a{suffix}", records), forms)
    dialogue = DialogueEncoder(tokenizer, stop_tokens=[tokenizer.end_token]).encode([USER, *TURNS])
    assert group.prompt == dialogue.prompt
    assert group.responses[0] == dialogue.response
    assert group.loss_mask[0] == dialogue.loss_mask
    assert group.turn_rewards == ((0.0, 1.0, 0.5), (0.25,))
    assert group.rewards == (1.5, 0.25)


TAUGHT = [
    {"prompt": [USER], "completion": [TURNS[0]]},
    {"messages": [USER, TURNS[0]], "tools": None},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("record", TAUGHT, ids=["trl", "openai"])
def test_dialogues_to_learn_from_need_no_group_and_no_reward(tmp_path, tokenizer, suffix, record):
    encoder = DialogueEncoder(tokenizer, stop_tokens=[tokenizer.end_token])
    forms = RecordForms(dialogues=encoder, need_rewards=False)
    path = write(tmp_path / f"a{suffix}", [{**record, "source": "web"}] * 2)
    groups = engine(path, forms=forms, vocab_size=400, max_positions=400).next_rollouts(2, step=0)
    dialogue = encoder.encode([USER, TURNS[0]])
    for group in plain(groups):
        assert (group.prompt, group.responses) == (dialogue.prompt, (dialogue.response,))
        assert group.loss_mask == (dialogue.loss_mask,)
        assert group.rewards == (0.0,)
    grpo = RecordForms(dialogues=encoder)
    with pytest.raises(ValueError, match=r"a.*: group: missing; a record of one response names"):
        _read(path, grpo)


def test_a_prompt_and_its_completion_may_be_text(tmp_path, tokenizer) -> None:
    encoder = DialogueEncoder(tokenizer, stop_tokens=[tokenizer.end_token])
    forms = RecordForms(dialogues=encoder, need_rewards=False)
    path = write(tmp_path / "a.jsonl", [{"prompt": "two and", "completion": " three"}])
    group = _read(path, forms)
    assert group.prompt == tokenizer.encode("two and")
    assert group.responses == ((*tokenizer.encode(" three"), tokenizer.end_token),)
    without = write(tmp_path / "b.jsonl", [{"prompt": "two", "completion": "three"}])
    with pytest.raises(ValueError, match=r"b.jsonl:1: completion: messages become tokens by"):
        _read(without, RecordForms(need_rewards=False))


def test_what_the_assistant_says_in_a_prompt_is_not_learnt(tmp_path, tokenizer) -> None:
    encoder = DialogueEncoder(tokenizer, stop_tokens=[tokenizer.end_token])
    forms = RecordForms(dialogues=encoder, need_rewards=False)
    last = {"role": "assistant", "content": "six"}
    record = {"prompt": [USER, TURNS[0], USER], "completion": [last]}
    group = _read(write(tmp_path / "a.jsonl", [record]), forms)
    assert group.prompt == tokenizer.encode_messages([USER, TURNS[0], USER])
    assert tokenizer.decode(group.responses[0]) == "six<|im_end|>"


def test_steps_of_agents_are_messages(tmp_path, tokenizer, forms) -> None:
    sampled = [*tokenizer.encode("ask"), tokenizer.end_token]
    steps = [
        {"step_id": 1, "source": "user", "message": USER["content"]},
        {
            "step_id": 2,
            "source": "agent",
            "message": "ask",
            "tool_calls": [
                {"tool_call_id": "c", "function_name": "add", "arguments": {"a": 2, "b": 3}}
            ],
            "observation": {"results": [{"source_call_id": "c", "content": "five"}]},
            "metrics": {"completion_token_ids": sampled, "logprobs": [-0.5] * len(sampled)},
        },
        {
            "step_id": 3,
            "source": "agent",
            "message": "five",
            "metrics": {"completion_token_ids": [4, 5], "logprobs": [-1.0, -2.0]},
        },
    ]
    record = {"group": 1, "schema_version": "ATIF-v1.4", "steps": steps, "reward": 1.0}
    group = _read(write(tmp_path / "a.jsonl", [record]), forms)
    (response,), (mask,), (logprobs,) = group.responses, group.loss_mask, group.old_logprobs
    trained = [t for t, is_trained in zip(response, mask, strict=True) if is_trained]
    assert trained == [*sampled, 4, 5]
    kept = [p for p, is_trained in zip(logprobs, mask, strict=True) if is_trained]
    assert kept == [-0.5] * len(sampled) + [-1.0, -2.0]
    seen = [t for t, is_trained in zip(response, mask, strict=True) if not is_trained]
    assert tokenizer.decode(seen) == (
        "\n<|im_start|>user\n<tool_response>\nfive\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


FAULTS = [
    ({**AREAL, "loss_mask": [0] * 9}, "loss_mask: no token is trained on; leave it out"),
    ({**AREAL, "loss_mask": [1] * 9}, "loss_mask: the first token is trained on, but nothing"),
    ({**AREAL, "loss_mask": [0, 1]}, "loss_mask: 2 values for 9 tokens"),
    ({**AREAL, "loss_mask": [0, 2] + [0] * 7}, "loss_mask[1]: 2 is neither 0 nor 1"),
    ({**AREAL, "logprobs": [0.0]}, "logprobs: 1 values for 9 tokens"),
    ({**AREAL, "logprobs": ["a"] * 9}, "logprobs[0]: 'a' is not a number"),
    ({**AREAL, "rewards": [1.0, 2.0]}, "rewards: [1.0, 2.0] is not the reward of one response"),
    ({k: v for k, v in AREAL.items() if k != "rewards"}, "reward: missing, and so is answer"),
    ({k: v for k, v in AREAL.items() if k != "group"}, "group: missing; a record of one response"),
    ({k: v for k, v in VERL.items() if k != "attention_mask"}, "attention_mask: None is not a li"),
    ({**VERL, "response_mask": [1, 1]}, "response_mask: 2 values for 5 tokens"),
    (
        {"group": 1, "messages": [USER, TURNS[0]], "reward": 1},
        "messages: messages become tokens by",
    ),
    ({**AREAL, "reward": 1.0}, "rewards: given beside reward; remove one of them"),
    # What one form has and another has not is not passed over.
    ({**AREAL, "keys": [1] * 9}, "keys: not read in a record with input_ids; remove it"),
    ({**AREAL, "response_mask": [1]}, "response_mask: not read in a record with input_ids; remove"),
    ({**VERL, "loss_mask": [1]}, "loss_mask: not read in a record with prompts and response_mask"),
    (
        {"prompt": [1], "responses": [[2]], "rewards": [1], "response_mask": [[0]]},
        "response_mask: not read in a record with responses; remove it",
    ),
    (
        {"group": 1, "prompt": [1], "response": [2], "reward": 1, "logprobs": [-1.0]},
        "logprobs: not read in a record with response; remove it",
    ),
    (
        {"group": 1, "prompt": [1], "response": [2], "reward": 1, "messages": [USER]},
        "messages: not read in a record with response; remove it",
    ),
    (
        {"group": 1, "messages": [USER, TURNS[0]], "loss_mask": [1], "reward": 1},
        "loss_mask: not read in a record with messages; remove it",
    ),
    (
        {"group": 1, "steps": [], "advantages": [1.0], "reward": 1},
        "advantages: not read in a record with steps; remove it",
    ),
]


@pytest.mark.parametrize(("record", "message"), FAULTS)
def test_a_wrong_record_is_named_by_line_and_field(tmp_path, record, message) -> None:
    path = write(tmp_path / "a.jsonl", [record])
    with pytest.raises(ValueError, match=re.escape(f"{path}:1: {message}")):
        engine(path).next_rollouts(1, step=0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [USER, {"role": "assistant", "weight": 2}]}, "messages[1].weight: 2 is nei"),
        ({"messages": [USER]}, "messages: no message of the assistant is trained on"),
        ({"messages": ["a"]}, "messages[0]: 'a' is not a message"),
        ({"messages": [USER, TURNS[0]], "turn_rewards": [1, 2]}, "turn_rewards: 2 for 1 trained t"),
        ({"messages": [{"role": "usr"}]}, "messages[0].role: 'usr' is not known; is user meant?"),
        ({"steps": [{"source": "robot"}]}, "steps[0]: {'source': 'robot'} is no step"),
        ({"steps": [{"source": "agent", "tool_calls": [3]}]}, "steps[0].tool_calls[0]: 3 is no"),
    ],
)
def test_a_wrong_message_is_named_by_line_and_place(tmp_path, forms, record, message) -> None:
    path = write(tmp_path / "a.jsonl", [{"group": 1, "reward": 1.0, **record}])
    with pytest.raises(ValueError, match=re.escape(f"{path}:1: {message}")):
        _read(path, forms)

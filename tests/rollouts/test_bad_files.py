"""Whatever is wrong with a file is a ValueError that names file, line or row, and field."""

from __future__ import annotations

import gzip
import json
import math
import re
import sys

import pytest

from megatron_prefix.rollouts.rewards import exact_match

from .files import FORMATS, contents, engine, numbered_groups, whole_record, write

GOOD = {"prompt": [1, 2], "responses": [[3], [4, 5]], "rewards": [1.0, 0.0]}
FLAT = {"group": "a", "prompt": [1, 2], "response": [3], "reward": 1.0}
ABSENT = object()
TURNS = {"rewards": ABSENT}
MASKS = [[True], [True, False, False, True]]


def changed(record, **changes):
    return {k: v for k, v in {**record, **changes}.items() if v is not ABSENT}


WHOLE_CASES = [
    ({"prompt": ABSENT}, "prompt: missing"),
    ({"prompt": []}, "prompt: is empty"),
    ({"prompt": "text"}, "prompt: 'text' is not a list of token ids"),
    ({"prompt": 3}, "prompt: 3 is not a list of token ids"),
    ({"prompt": [[1]]}, "prompt[0]: [1] is not a token id"),
    ({"prompt": [1, 2.0]}, "prompt[1]: 2.0 is not a token id"),
    ({"prompt": [True]}, "prompt[0]: True is not a token id"),
    ({"prompt": [1, None]}, "prompt[1]: None is not a token id"),
    ({"prompt": [1, 32]}, "prompt[1]: token 32 is outside the vocabulary of 32"),
    ({"prompt": [10**30]}, "prompt[0]: token 1000000000000"),
    ({"prompt": [1] * 17}, "prompt: its 17 tokens exceed the model's 16 positions"),
    (
        {"prompt": [1] * 16},
        "responses[1]: its 2 tokens after a prompt of 16 need 17 positions, the model has 16",
    ),
    ({"responses": []}, "responses: there are none"),
    ({"responses": 3}, "responses: 3 is not a list"),
    ({"responses": [[3], []]}, "responses[1]: is empty"),
    ({"responses": [[3], 4]}, "responses[1]: 4 is not a list of token ids"),
    ({"responses": [[3], None]}, "responses[1]: None is not a list of token ids"),
    ({"responses": [[3], [4, -1]]}, "responses[1][1]: token -1 is outside"),
    ({"responses": [[3], [4, "5"]]}, "responses[1][1]: '5' is not a token id"),
    ({"responses": ABSENT}, "responses: missing; a record needs them (or response)"),
    ({"response": [3]}, "response: a record has either responses (a whole group) or response"),
    ({"rewards": [1.0]}, "rewards: 1 for 2 responses"),
    ({"rewards": 1.0}, "rewards: 1.0 is not a list"),
    ({"rewards": [1.0, math.nan]}, "rewards[1]: nan is not a finite number"),
    ({"rewards": [-math.inf, 0]}, "rewards[0]: -inf is not a finite number"),
    ({"rewards": [1.0, "0"]}, "rewards[1]: '0' is not a number"),
    ({"rewards": [1.0, None]}, "rewards[1]: None is not a number"),
    ({"rewards": [True, 0]}, "rewards[0]: True is not a number"),
    ({"rewards": [0, 10**400]}, "rewards[1]: 1000000"),
    ({"rewards": ABSENT}, "rewards: missing, and so is answer"),
    ({"rewards": ABSENT, "answer": [3]}, "rewards: missing; give it, or set a reward function"),
    ({"old_logprobs": [[-1.0]]}, "old_logprobs: 1 for 2 responses"),
    ({"old_logprobs": [[-1.0], [-1.0]]}, "old_logprobs[1]: 1 log-probabilities for a response of"),
    ({"old_logprobs": [[math.nan], [-1, -1]]}, "old_logprobs[0][0]: nan is not a finite number"),
    ({"old_logprobs": [0, -1.0]}, "old_logprobs[0]: 0.0 is not a list"),
    ({"old_logprobs": [-1.0, -1.0]}, "old_logprobs[0]: -1.0 is not a list"),
    ({"old_logprobs": [["a"], [-1, -1]]}, "old_logprobs[0][0]: 'a' is not a number"),
    ({"old_logprobs": [[-1e300], [-1, -1]]}, "old_logprobs[0][0]: -1e+300 is beyond the numbers"),
    ({"loss_mask": [[True]]}, "loss_mask: 1 for 2 responses"),
    ({"loss_mask": [[True], [True]]}, "loss_mask[1]: 1 values for a response of 2 tokens"),
    ({"loss_mask": [[True], [False, False]]}, "loss_mask[1]: no token of the response is trained"),
    ({"loss_mask": [[True], [True, 0]]}, "loss_mask[1][1]: 0 is not true or false"),
    ({"loss_mask": [[None], [True, True]]}, "loss_mask[0][0]: None is not true or false"),
    ({"loss_mask": [True, True]}, "loss_mask[0]: True is not a list"),
    ({"loss_masks": [[True], [True, True]]}, "loss_masks: not a known field; is loss_mask meant?"),
    ({"turn_rewards": [[1], [1]]}, "rewards: given beside turn_rewards, from which rewards are"),
    ({**TURNS, "turn_rewards": [[1]]}, "turn_rewards: 1 for 2 responses"),
    ({**TURNS, "turn_rewards": [[1], [1, 2]]}, "turn_rewards[1]: 2 for 1 trained turns (runs of"),
    ({**TURNS, "turn_rewards": [[1], []]}, "turn_rewards[1]: 0 for 1 trained turns"),
    (
        {**TURNS, "turn_rewards": [[1], [1]], "responses": [[7], [8] * 4], "loss_mask": MASKS},
        "turn_rewards[1]: 1 for 2 trained turns",
    ),
    ({**TURNS, "turn_rewards": [[1], [1e999]]}, "turn_rewards[1][0]: inf is not a finite number"),
    ({**TURNS, "turn_rewards": [[1], ["a"]]}, "turn_rewards[1][0]: 'a' is not a number"),
    (
        {**TURNS, "turn_rewards": [[1], [1]], "advantages": [[1], [1, 1]]},
        "advantages: given beside turn_rewards, from which advantages are computed",
    ),
    ({"advantages": [[1]]}, "advantages: 1 for 2 responses"),
    ({"advantages": [[1], [1]]}, "advantages[1]: 1 for a response of 2 tokens"),
    ({"advantages": [[1], [1, 1e999]]}, "advantages[1][1]: inf is not a finite number"),
    ({"advantages": [[1], [1, None]]}, "advantages[1][1]: None is not a number"),
    ({"advantage": [[1], [1, 1]]}, "advantage: not a known field; is advantages meant?"),
    ({"finished": [True]}, "finished: 1 for 2 responses"),
    ({"finished": [True, 0]}, "finished[1]: 0 is not true or false"),
    ({"finished": True}, "finished: True is not a list"),
    ({"old_logprob": [[-1.0], [-1.0]]}, "old_logprob: not a known field; is old_logprobs meant?"),
    ({"Rewards": [1, 2], "rewards": ABSENT}, "Rewards: not a known field; is rewards meant?"),
]

FLAT_CASES = [
    ({"group": ABSENT}, "group: missing; a record of one response names its group"),
    ({"group": 1.5}, "group: 1.5 is not text or a whole number"),
    ({"group": True}, "group: True is not text or a whole number"),
    ({"group": ["a"]}, "group: ['a'] is not text or a whole number"),
    ({"prompt": ABSENT}, "prompt: missing"),
    ({"response": []}, "response: is empty"),
    ({"response": [3, 32]}, "response[1]: token 32 is outside the vocabulary"),
    ({"response": [[3]]}, "response[0]: [3] is not a token id"),
    ({"reward": math.nan}, "reward: nan is not a finite number"),
    ({"reward": [1.0]}, "reward: [1.0] is not a number"),
    ({"reward": ABSENT}, "reward: missing, and so is answer"),
    ({"reward": ABSENT, "answer": [3]}, "reward: missing; give it, or set a reward function"),
    ({"old_logprobs": [-1.0, -1.0]}, "old_logprobs: 2 log-probabilities for a response of 1"),
    ({"old_logprobs": [0.7]}, "old_logprobs[0]: 0.7 is not a log-probability"),
    ({"loss_mask": [True, True]}, "loss_mask: 2 values for a response of 1 tokens"),
    ({"loss_mask": [False]}, "loss_mask: no token of the response is trained on"),
    ({"loss_mask": [1]}, "loss_mask[0]: 1 is not true or false"),
    ({"loss_mask": True}, "loss_mask: True is not a list"),
    ({"prompt_keys": 3}, "prompt_keys: 3 is not a list"),
    (
        {"prompt_keys": [1, 2**63]},
        "prompt_keys[1]: 9223372036854775808 is not a whole number of 64",
    ),
    ({"keys": [0.5]}, "keys[0]: 0.5 is not a whole number of 64 bits"),
    ({"keys": [True]}, "keys[0]: True is not a whole number of 64 bits"),
    ({"keys": [1, 2]}, "keys: 2 for 1 tokens; there must be one for each"),
    ({"keys": [1]}, "keys: of group 'a', some records have it and some do not"),
    ({"finished": [True]}, "finished: [True] is not true or false"),
    (
        {"prompt": [1, 9]},
        "prompt: group 'a' of different prompts; {first} begins it with 2 tokens, these are 2, and "
        "they differ first at position 1",
    ),
    ({"prompt": [1]}, "prompt: group 'a' of different prompts; {first} begins it with 2 tokens, "),
    (
        {"prompt": [1, 2, 3]},
        "prompt: group 'a' of different prompts; {first} begins it with 2 tokens, these are 3, and "
        "they differ first at position 2",
    ),
    ({"answer": "b"}, "answer: group 'a' of different answers; {first} begins it with another"),
    ({"finished": True}, "finished: of group 'a', some records have it and some do not"),
    ({"old_logprobs": [-1.0]}, "old_logprobs: of group 'a', some records have it and some do not"),
    ({"loss_mask": [True]}, "loss_mask: of group 'a', some records have it and some do not"),
    ({"advantages": [1]}, "advantages: of group 'a', some records have it and some do not"),
    ({"turn_rewards": [1]}, "reward: given beside turn_rewards"),
    ({"turn_rewards": [1, 2], "reward": ABSENT}, "turn_rewards: 2 for 1 trained turns"),
]


def failure(*paths, **options) -> str:
    reader = engine(*paths, epochs=1, **options)
    with pytest.raises(ValueError) as caught:
        reader.next_rollouts(3, step=0)
    return str(caught.value)


@pytest.mark.parametrize(("changes", "message"), WHOLE_CASES)
def test_a_bad_record_of_a_group_is_named_by_line_and_field(tmp_path, changes, message):
    path = write(tmp_path / "a.jsonl", [GOOD, GOOD, changed(GOOD, **changes)])
    assert failure(path).startswith(f"{path}:3: {message}")


def test_a_group_of_prompts_with_other_keys_is_named(tmp_path):
    records = [{**FLAT, "prompt_keys": keys} for keys in ([0, 4], [0, 5])]
    path = write(tmp_path / "a.jsonl", records)
    assert failure(path) == (
        f"{path}:2: prompt_keys: group 'a' of different prompts; their keys differ from those of "
        f"{path}:1 first at position 1"
    )


@pytest.mark.parametrize(("changes", "message"), FLAT_CASES)
def test_a_bad_record_of_a_response_is_named_by_line_and_field(tmp_path, changes, message):
    path = write(tmp_path / "a.jsonl", [GOOD, FLAT, changed(FLAT, **changes)])
    assert failure(path).startswith(f"{path}:3: {message.format(first=f'{path}:2')}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not a JSON object: Expecting property name"),
        (b'{"prompt": [1, 2], "respon', "not a JSON object: Unterminated string"),
        (b"prompt", "not a JSON object: Expecting value"),
        (b"[1, 2]", "not a JSON object: [1, 2]"),
        (b"null", "not a JSON object: None"),
        (b'{"prompt": [1]} {}', "not a JSON object: Extra data"),
        (b'{"answer": "\xff"}', "not a JSON object: 'utf-8' codec can't decode"),
        (b"\x00\x01", "not a JSON object: Expecting value"),
        (b'{"prompt": [1], "prompt": [2]}', "not a JSON object: the field 'prompt' is there twice"),
        (b'{"prompt": [1' + b"0" * 5000 + b"]}", "not a JSON object: Exceeds the limit"),
        (b"[" * 200_000, "not a JSON object: maximum recursion"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_malformed_line_is_named(tmp_path, suffix, line, message):
    path = tmp_path / f"a{suffix}"
    text = json.dumps(GOOD).encode() + b"\n\n" + line + b"\n" + json.dumps(GOOD).encode()
    path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    assert failure(path).startswith(f"{path}:3: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": [1.0, 2.5]}, "prompt[0]: 1.0 is not a token id"),
        ({"prompt": [1, None]}, "prompt[1]: None is not a token id"),
        ({"prompt": None}, "prompt: missing"),
        ({"responses": [[3], [40]]}, "responses[1][0]: token 40 is outside"),
        ({"responses": [[3], None]}, "responses[1]: None is not a list of token ids"),
        ({"rewards": [1.0, math.nan]}, "rewards[1]: nan is not a finite number"),
        ({"rewards": None}, "rewards: missing, and so is answer"),
        ({"rewards": None, "answer": "x"}, "rewards: missing; give it, or set a reward function"),
        ({"old_logprobs": [[-1.0], [-1.0]]}, "old_logprobs[1]: 1 log-probabilities"),
    ],
)
def test_a_bad_row_is_named(tmp_path, changes, message):
    bad = changed(GOOD, **changes)
    # A column has one type in Parquet: where the bad prompt is of floats, all of them are.
    good = GOOD if changes.get("prompt") != [1.0, 2.5] else changed(GOOD, prompt=[1.0, 2.5])
    path = write(tmp_path / "a.parquet", [good, good, bad], row_group_size=2)
    assert re.match(rf"{re.escape(str(path))}: row [02]: {re.escape(message)}", failure(path))


@pytest.mark.parametrize("suffix", FORMATS)
def test_after_an_error_the_engine_stands_where_it_stood(tmp_path, suffix):
    groups = numbered_groups(4)
    records = [whole_record(g) for g in groups]
    records[3]["prompt"] = [99]
    reader = engine(write(tmp_path / f"a{suffix}", records), epochs=1)
    reader.next_rollouts(1, step=0)
    state = reader.state_dict()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"prompt\[0\]: token 99"):
            reader.next_rollouts(3, step=1)
        assert reader.state_dict() == state
    assert contents(reader.next_rollouts(2, step=1)) == contents(groups[1:3])


def test_after_a_reward_that_failed_the_engine_stands_where_it_stood(tmp_path):
    groups = numbered_groups(4)
    records = [whole_record(g) for g in groups]
    records[2] = {**records[2], "rewards": None, "answer": "text"}
    path = write(tmp_path / "a.jsonl", records)
    reader = engine(path, reward=exact_match, epochs=1)
    reader.next_rollouts(1, step=0)
    state = reader.state_dict()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:3: .*exact_match failed"):
            reader.next_rollouts(3, step=1)
        assert reader.state_dict() == state
    assert contents(reader.next_rollouts(1, step=1)) == contents(groups[1:2])


def test_a_group_of_another_size_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [GOOD, FLAT, FLAT])
    assert engine(path, group_size=2, epochs=1).next_rollouts(2, step=0)
    assert failure(path, group_size=3) == f"{path}:1: responses: 2 of them, but group_size=3"
    path = write(tmp_path / "b.jsonl", [FLAT])
    assert failure(path, group_size=2) == f"{path}:1: responses: 1 of them, but group_size=2"
    path = write(tmp_path / "c.jsonl", [FLAT] * 1000)
    assert failure(path, group_size=2) == (
        f"{path}:3: group: 'a' has more responses than group_size=2"
    )


def test_a_reward_that_fails_is_named_with_the_line_and_the_response(tmp_path):
    # Rewards are computed of a whole batch.
    path = write(tmp_path / "a.jsonl", [GOOD, changed(GOOD, rewards=ABSENT, answer="text"), GOOD])
    assert failure(path, reward=exact_match) == (
        f"{path}:2: responses[0]: reward exact_match failed: ValueError: it compares with the "
        "answer's token ids; answer is 'text'"
    )


def test_rewards_are_computed_of_responses_in_order_only(tmp_path):
    def never(prompt, response, answer):
        raise AssertionError

    bad = changed(GOOD, rewards=ABSENT, answer=1, responses=[[3], []])
    path = write(tmp_path / "a.jsonl", [bad])
    assert failure(path, reward=never).startswith(f"{path}:1: responses[1]: is empty")


@pytest.mark.parametrize("suffix", FORMATS)
def test_files_without_records_are_refused_rather_than_read_for_ever(tmp_path, suffix):
    empty = tmp_path / f"empty{suffix}"
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"prompt": pa.array([], pa.list_(pa.int64()))}), empty)
    else:
        empty.write_bytes(gzip.compress(b"\n") if suffix.endswith("gz") else b"\n \n")
    with pytest.raises(ValueError, match=re.escape(f"no record in {empty}, {empty}")):
        engine(empty, empty).next_rollouts(1, step=0)
    full = write(tmp_path / "full.jsonl", [GOOD])
    assert engine(empty, full, empty).next_rollouts(3, step=0).num_groups == 3


def test_broken_compression_is_named_by_line(tmp_path):
    whole = gzip.compress(b"".join(json.dumps(GOOD).encode() + b"\n" for _ in range(5)))
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(whole[:-12])
    assert re.match(rf"{cut}:\d+: not readable as gzip: Compressed file ended", failure(cut))
    plain = tmp_path / "plain.jsonl.gz"
    plain.write_text(json.dumps(GOOD))
    assert failure(plain).startswith(f"{plain}:1: not readable as gzip: Not a gzipped file")


def test_a_broken_parquet_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"not parquet")
    assert failure(path).startswith(f"{path}: row 0: not readable as Parquet: ")
    write(path, [GOOD] * 50)
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    assert failure(path).startswith(f"{path}: row 0: not readable as Parquet: ")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [GOOD])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"reading Parquet needs pyarrow") as caught:
        engine(path)
    assert str(caught.value) == (
        f"{path}: reading Parquet needs pyarrow, which is not installed; "
        "pip install 'megatron-prefix[train]'"
    )


def test_wrong_paths_and_options_are_refused_before_anything_is_read(tmp_path):
    path = write(tmp_path / "a.jsonl", [GOOD])
    missing = tmp_path / "b.jsonl"
    with pytest.raises(ValueError, match=re.escape(f"{missing}: there is no such file")):
        engine(path, missing)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}: is a directory; name the"):
        engine(tmp_path)
    text = tmp_path / "a.txt"
    text.touch()
    with pytest.raises(ValueError, match=r"a.txt: unknown format; its name must end in .jsonl, "):
        engine(text)
    with pytest.raises(ValueError, match="paths: there are none"):
        engine()
    with pytest.raises(ValueError, match="epochs=0: set at least 1"):
        engine(path, epochs=0)
    with pytest.raises(ValueError, match="0 groups were asked for"):
        engine(path).next_rollouts(0, step=0)

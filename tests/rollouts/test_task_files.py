"""Tasks of reasoning-gym: the same in every process, unlike those of evaluation, and scored."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_prefix.config import RunConfig, TextConfig
from megatron_prefix.config.loader import load_dataclass
from megatron_prefix.rollouts.names import LIBRARY_REWARDS
from megatron_prefix.rollouts.record import START, FilePosition, Record
from megatron_prefix.rollouts.record_files import open_record_file
from megatron_prefix.rollouts.text.prompts import TextPrompts
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
from megatron_prefix.rollouts.user_process import CallFailed, UserFunction
from megatron_prefix.training.requirements import missing_packages
from megatron_prefix.training.surroundings import faults_of_surroundings
from tests.rollouts.servers import save_word_tokenizer
from tests.training.runs import run_values

SUMS = {
    "task": "chain_sum",
    "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}
SENTENCE = ["State", "the", "final", "answer", "to", "following", "arithmetic", "problem:"]
WORDS = [*SENTENCE, "=", "+", "-", ";", *map(str, range(10)), "?"]


def task_file(path: Path, **values: Any) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def records(path: Path, start: FilePosition = START) -> list[Record]:
    return list(open_record_file(path).records(start))


def test_tasks_are_the_same_whatever_order_python_gives_sets(tmp_path, monkeypatch):
    # This data set goes through sets of text.
    path = task_file(tmp_path / "a.gym.yaml", task="isomorphic_strings", seed=3, size=4)
    found = []
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        found.append(records(path))
    assert found[0] == found[1] and len(found[0]) == 4
    first = found[0][0]
    assert first.source == f"{path}:0" and first.values["prompt"].startswith("Two strings are")
    assert first.values["answer"]["entry"]["question"] == first.values["prompt"]


def test_no_question_of_the_unlike_file_is_asked_and_a_reader_goes_on_anywhere(tmp_path):
    unseen = task_file(tmp_path / "unseen.gym.yaml", **SUMS, seed=10**6, size=60)
    path = task_file(tmp_path / "a.gym.yaml", **SUMS, size=300, unlike=["unseen.gym.yaml"])
    asked = {record.values["prompt"] for record in records(unseen)}
    found = records(path)
    assert len(asked) > 40  # of 200 sums of two digits, so that 300 tasks would meet them
    assert len(found) == 300 == open_record_file(path).count()
    assert not asked & {record.values["prompt"] for record in found}
    assert records(path, found[7].end) == found[8:]
    assert open_record_file(path).can_continue_at(found[299].end)
    assert not open_record_file(path).can_continue_at(FilePosition(offset=301, number=301))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "chain_sums"}, r"task: chain_sums: reasoning-gym has no such .* chain_sum,"),
        ({"task": "chain_sum", "config": {"terms": 2}}, r"refuses it: TypeError: .*'terms'"),
        ({"task": "rearc"}, r"task: rearc: its tasks are not the same after they were written"),
        ({"task": "chain_sum", "size": 0}, r"a.gym.yaml: size: 0 must be at least 1"),
        ({"task": "chain_sum", "sede": 1}, r"a.gym.yaml: sede: unknown key; .*seed"),
        ({"task": "chain_sum", "config": {"seed": 1}}, r"config.seed: give it as seed"),
        (
            {**SUMS, "size": 10, "unlike": ["all.gym.yaml"]},
            r"a.gym.yaml: size: 10: of 100 tasks only 0 ask what the files of unlike do not",
        ),
    ],
)
def test_what_is_wrong_with_a_file_of_tasks_is_said(tmp_path, values, message):
    task_file(tmp_path / "all.gym.yaml", **SUMS, size=10000)
    path = task_file(tmp_path / "a.gym.yaml", **values)
    with pytest.raises(ValueError, match=message) as caught:
        records(path)
    assert str(path) in str(caught.value)


@pytest.fixture
def tokenizer(tmp_path) -> TextTokenizer:
    folder = save_word_tokenizer(tmp_path / "tokenizer", WORDS, ";")
    return TextTokenizer(folder, vocab_size=len(WORDS))


def test_prompts_of_tasks_go_on_where_they_stood(tmp_path, tokenizer, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = task_file(tmp_path / "a.gym.yaml", **SUMS, size=5)

    def prompts() -> TextPrompts:
        return TextPrompts(
            [path],
            tokenizer,
            TextConfig(tokenizer=tokenizer.path),
            vocab_size=len(WORDS),
            max_prompt_length=20,
            shuffle=True,
            seed=1,
        )

    source, again = prompts(), prompts()
    first = source.take(3)
    again.load_state_dict(source.state_dict())
    following = source.take(7)
    assert again.take(7) == following
    epochs = [*first, *following]
    assert sorted(p.source for p in epochs[:5]) == sorted(p.source for p in epochs[5:])
    assert {tokenizer.read(p.tokens) for p in epochs} == {
        p.answer["entry"]["question"] for p in epochs
    }


def _entry(task: str, question: str, answer: str, **metadata: Any) -> dict[str, Any]:
    entry = {"question": question, "answer": answer, "metadata": metadata}
    return {"task": task, "config": {}, "entry": entry}


@pytest.fixture(scope="module")
def score() -> Iterator[UserFunction]:
    function = UserFunction(LIBRARY_REWARDS["reasoning_gym"].function, processes=1, timeout_s=60)
    yield function
    function.close()


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("12", 1.0),
        (" 12\n", 1.0),
        ("I think <answer>7</answer>, no, <answer> 12 </answer>.", 1.0),
        ("12 apples", 2 / 9),  # the library's own part of a reward
        ("13", 0.0),
        ("", 0.0),
    ],
)
def test_a_response_gets_the_score_of_the_library(score, response, reward):
    assert score("", response, _entry("chain_sum", "5 + 7 =", "12")) == {"value": reward}


RIGHT = "2 \N{MULTIPLICATION SIGN} 3"


def test_what_a_scorer_cannot_read_is_wrong_and_what_it_cannot_score_is_an_error(score):
    factors = _entry("prime_factorization", "Factors of 6?", RIGHT, number=6, factors=[2, 3])
    assert score("", "two by three", factors)["value"] == 0.0
    assert score("", RIGHT, factors)["value"] == 1.0
    with pytest.raises(CallFailed, match=r"it scores tasks of a .gym.yaml file"):
        score("", "12", "12")
    broken = _entry("prime_factorization", "Factors of 6?", "none")
    with pytest.raises(CallFailed):
        score("", RIGHT, broken)


def _config(folder: Path, path: Path, unseen: Path, **rollouts: Any) -> RunConfig:
    values = run_values(folder, records=path)
    values["rollouts"] |= {
        "engine": "embedded",
        "group_size": 2,
        "max_response_length": 4,
        "reward": "reasoning_gym",
        "text": {"tokenizer": "tokenizer"},
        **rollouts,
    }
    values["evaluation"] = {"paths": [str(unseen)], "num_prompts": 2}
    return load_dataclass(RunConfig, values)


def test_evaluation_on_tasks_that_are_trained_on_is_refused(tmp_path):
    path = task_file(tmp_path / "a.gym.yaml", **SUMS, seed=100, size=50)
    near = task_file(tmp_path / "near.gym.yaml", **SUMS, seed=149, size=10)
    after = task_file(tmp_path / "after.gym.yaml", **SUMS, seed=150, size=10)
    (fault,) = faults_of_surroundings(_config(tmp_path, path, near), rank=1)
    assert fault.startswith(f"evaluation.paths: {near}: has tasks that {path} trains on")
    assert "set its seed to 150 or more" in fault
    assert faults_of_surroundings(_config(tmp_path, path, after), rank=1) == []
    path = task_file(path, **SUMS, seed=100, size=50, unlike=["near.gym.yaml"])
    assert faults_of_surroundings(_config(tmp_path, path, near), rank=1) == []


def test_what_tasks_need_is_said_before_a_run_starts(tmp_path, monkeypatch):
    path = task_file(tmp_path / "a.gym.yaml", **SUMS)
    unseen = task_file(tmp_path / "unseen.gym.yaml", **SUMS, seed=10**6, sice=3)
    config = _config(tmp_path, path, unseen)
    rollouts = dataclasses.replace(config.rollouts, text=None, engine="file")
    faults = faults_of_surroundings(dataclasses.replace(config, rollouts=rollouts), rank=1)
    said = [fault.partition(": ")[2].removeprefix(str(tmp_path)) for fault in faults]
    beginnings = (
        "/a.gym.yaml: tasks are text; set rollouts.text.tokenizer",
        "/a.gym.yaml: tasks have no responses; set rollouts.engine",
        "/unseen.gym.yaml: tasks are text; set rollouts.text.tokenizer",
        "/unseen.gym.yaml: sice: unknown key",
        "it reads text; set rollouts.text.tokenizer",
    )
    for text, beginning in itertools.zip_longest(said, beginnings):
        assert beginning in text
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    line = (
        "needs reasoning-gym, which is not installed; pip install 'megatron-prefix[reasoning-gym]'"
    )
    assert [text for text in missing_packages(config) if "reasoning" in text] == [
        f"rollouts.reward: reasoning_gym {line}",
        f"rollouts.paths: {path} {line}",
        f"evaluation.paths: {unseen} {line}",
    ]
    with pytest.raises(ValueError, match=r"a.gym.yaml needs reasoning-gym, which is not installed"):
        records(path)

"""Data sets of verl, TRL and OpenAI train as they are, the same from either format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.rollouts.chat_templates import save_chat_tokenizer
from tests.rollouts.files import write
from tests.training.runs import run_values, trainer

QUESTIONS = ["two and three", "three and three", "the sum of two and two", "five"]
REWARD = """
def index_and_length(prompt, response, answer, record):
    assert answer == "5"
    return record["extra_info"]["index"] + len(response)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def trained(path: Path, tokenizer: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Metrics of the last of two steps."""
    values = run_values(path.with_suffix(path.suffix + ".run"), records=path)
    values["model"] |= {"vocab_size": 400, "max_sequence_length": 96}
    values["training"] |= {"token_budget": 256}
    values["rollouts"] |= {"text": {"tokenizer": str(tokenizer)}}
    for name, changes in sections.items():
        for key, change in changes.items():
            known = values[name].get(key)
            values[name][key] = {**known, **change} if isinstance(known, dict) else change
    with trainer(values) as run:
        return run.run()


def test_rows_of_verl_train_by_grpo_with_the_records_fields_in_the_reward(tmp_path, monkeypatch):
    tokenizer = save_chat_tokenizer(tmp_path / "tokenizer", "chatml")
    (tmp_path / "reward_of_verls_rows.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": question}],
            "reward_model": {"ground_truth": "5", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": index, "split": "train"},
        }
        for index, question in enumerate(QUESTIONS)
    ]
    sampling = {
        "engine": "embedded",
        "group_size": 3,
        "max_response_length": 5,
        "reward": "reward_of_verls_rows:index_and_length",
        "text": {"answer_field": "reward_model.ground_truth"},
    }
    found = []
    for path, beside in ((tmp_path / "a.parquet", {"image": b"\x89"}), (tmp_path / "b.jsonl", {})):
        write(path, [{**row, **beside} for row in rows])
        found.append(trained(path, tokenizer, rollouts=sampling))
    first, second = ({name: run[name] for name in ("reward", "grad_norm")} for run in found)
    assert first == second
    assert first["grad_norm"] > 0


def test_dialogues_of_openai_and_trl_train_supervised_to_the_same_loss(tmp_path):
    tokenizer = save_chat_tokenizer(tmp_path / "tokenizer", "chatml")
    pairs = [
        ([{"role": "user", "content": q}], [{"role": "assistant", "content": f"{q} is five"}])
        for q in QUESTIONS
    ]
    forms = {
        "openai": [{"messages": [*asked, *said]} for asked, said in pairs],
        "trl": [{"prompt": asked, "completion": said} for asked, said in pairs],
    }
    losses = {
        trained(
            write(tmp_path / f"{name}{suffix}", records),
            tokenizer,
            objective={"name": "supervised"},
        )["grad_norm"]
        for name, records in forms.items()
        for suffix in (".jsonl", ".parquet")
    }
    assert len(losses) == 1
    assert losses.pop() > 0

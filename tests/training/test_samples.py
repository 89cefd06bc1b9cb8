"""What a run shows of the responses: which, where and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup
from megatron_prefix.training.samples import markdown, printable, samples_of, table
from tests.distributed import run_distributed
from tests.training.runs import (
    good_records,
    run_command,
    run_values,
    write_config,
    write_records,
)


def _text(tokens: Any) -> str:
    return " ".join(map(str, tokens))


def _batch(*rewards: list[float], **fields: Any) -> RolloutBatch:
    return RolloutBatch.from_groups(
        RolloutGroup(
            prompt=[group, 7],
            responses=[[group, i, 3] for i in range(len(of_group))],
            rewards=of_group,
            answer={"is": group},
            source=f"file.jsonl:{group + 1}",
            **fields,
        )
        for group, of_group in enumerate(rewards)
    )


def test_samples_go_from_the_highest_reward_to_the_lowest() -> None:
    batch = _batch([0.5, 0.0], [1.0, 0.25, 0.75])
    found = samples_of(batch, 3, _text)
    assert [sample.reward for sample in found] == [1.0, 0.5, 0.0]
    assert [(s.source, s.prompt, s.response) for s in found] == [
        ("file.jsonl:2", "1 7", "1 0 3"),
        ("file.jsonl:1", "0 7", "0 0 3"),
        ("file.jsonl:1", "0 7", "0 1 3"),
    ]
    assert [sample.reward for sample in samples_of(batch, 1, _text)] == [1.0]
    assert [sample.reward for sample in samples_of(batch, 9, _text)] == [1, 0.75, 0.5, 0.25, 0]
    assert samples_of(batch, 0, _text) == []


def test_a_sample_is_written_with_all_that_belongs_to_it() -> None:
    batch = _batch(
        [1.0, 0.0],
        finished=[True, False],
        named_rewards={"right": [1.0, float("nan")], "short": [0.5, 0.5]},
    )
    rows = [sample.as_row(4, "training") for sample in samples_of(batch, 2, _text)]
    assert rows[1] == {
        "step": 4,
        "kind": "training",
        "source": "file.jsonl:1",
        "prompt": "0 7",
        "response": "0 1 3",
        "reward": 0.0,
        "rewards": {"right": None, "short": 0.5},
        "answer": {"is": 0},
        "tokens": 3,
        "finished": False,
    }
    assert rows[0]["finished"] is True
    assert "**reward 1** (right 1, short 0.5), file.jsonl:1" in markdown(
        samples_of(batch, 1, _text)
    )


def test_the_table_has_a_line_a_sample_and_both_ends_of_a_long_response() -> None:
    texts = {2: f"{'a' * 60} what is 6+2?\n", 3: f"Eight.\x1b[31m\n{'b' * 90} #### 8"}
    batch = _batch([1.0], finished=[False])
    text = table(samples_of(batch, 1, lambda tokens: texts[len(tokens)]), "title")
    title, header, line = text.split("\n")
    assert title == "title" and header.split() == ["reward", "tokens", "prompt", "response"]
    assert "...aaa" in line and r"what is 6+2?\n  Eight.\x1b[31m\nbb" in line
    assert line.endswith("b #### 8  (cut off)") and " ... b" in line
    assert len(line) < 125
    assert printable("é\u2028\x07") == r"é\u2028\x07"


def _runs(rank: int, world_size: int, configs: list[Path]) -> list[tuple[int, str]]:
    return [run_command(config) for config in configs]


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    records = good_records(12)
    for record in records:
        record["answer"] = record["responses"][0]
    return run_values(
        tmp_path / "out",
        records=write_records(tmp_path / "rollouts.jsonl", records),
        training={"steps": 5},
        rollouts={"reward": "exact_match", "max_response_length": 4},
        output={"samples": 2, "samples_every": 2, "tensorboard": True},
    ) | {"evaluation": {"paths": [str(tmp_path / "rollouts.jsonl")], "num_prompts": 3, "every": 3}}


def test_a_run_shows_and_keeps_samples_of_training_and_of_evaluations(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    found = run_distributed(_runs, 2, [write_config(tmp_path / "run.yaml", values)])
    (status, text), (other_status, other_text) = found[0][0], found[1][0]
    assert (status, other_status) == (0, 0), text
    assert "samples of" not in other_text
    rows = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").open(encoding="utf-8")]
    turns = [(0, "evaluation"), (1, "training"), (2, "training"), (3, "evaluation")]
    turns += [(4, "training"), (5, "evaluation")]
    assert [(row["step"], row["kind"]) for row in rows] == [t for t in turns for _ in range(2)]
    for row in (row for row in rows if row["kind"] == "training"):
        assert row["reward"] in (0.0, 0.25, 0.5, 1.0) and row["source"].startswith(str(tmp_path))
        assert len(row["response"].split()) == row["tokens"]
    assert rows[2]["reward"] == 1.0 and rows[3]["reward"] == 0.0
    for step, kind in turns:
        assert f"samples of {kind}, step {step} (2 of " in text
    lines = text.splitlines()
    at = lines.index(
        f"samples of training, step 2 (2 of 8 responses; {tmp_path}/out/samples.jsonl)"
    )
    assert [lines[at + 2].split()[0], lines[at + 3].split()[0]] == ["1", "0"]
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    tags = events.Tags()["tensors"]
    assert sorted(tags) == ["samples/evaluation/text_summary", "samples/training/text_summary"]
    assert [e.step for e in events.Tensors("samples/training/text_summary")] == [1, 2, 4]


def test_a_run_that_goes_on_drops_samples_of_steps_that_it_repeats_and_can_show_none(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    del values["evaluation"]
    values["output"] |= {"tensorboard": False}
    values["training"]["steps"] = 2
    quiet = values | {
        "output": {**values["output"], "samples": 0, "directory": str(tmp_path / "quiet")}
    }
    longer = values | {"training": {**values["training"], "steps": 4}}
    samples = tmp_path / "out" / "samples.jsonl"
    first = write_config(tmp_path / "run.yaml", values)
    ((quiet_status, quiet_text), _) = run_distributed(
        _runs, 1, [write_config(tmp_path / "quiet.yaml", quiet), first]
    )[0]
    assert quiet_status == 0 and "samples of" not in quiet_text
    before = samples.read_text(encoding="utf-8")
    # As a run leaves it that was killed behind its last checkpoint, within a line.
    samples.write_text(f'{before}{{"step": 4, "response": "\u2028"}}\n{{"step": 4, "resp')
    run_distributed(_runs, 1, [write_config(tmp_path / "longer.yaml", longer)])
    rows = [json.loads(line) for line in samples.open(encoding="utf-8")]
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 4, 4]
    assert samples.read_text(encoding="utf-8").startswith(before)
    assert all("kind" in row for row in rows)

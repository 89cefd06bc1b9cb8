"""What is in the files comes out of the engine, whatever the format, the batches and restarts."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix import rollouts
from megatron_prefix.rollouts import rewards
from megatron_prefix.rollouts.engine import EndOfRollouts, RolloutEngine
from megatron_prefix.rollouts.record_files import open_record_file

from .files import (
    FORMATS,
    MAX_POSITIONS,
    VOCAB_SIZE,
    contents,
    engine,
    flat_records,
    groups_strategy,
    mixed_records,
    numbered_groups,
    plain,
    whole_record,
    write,
)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(FORMATS))
def test_groups_come_out_as_they_were_written(data, suffix):
    groups = data.draw(groups_strategy())
    # Parquet wants one type in a column, and old_logprobs are lists of lists in whole groups only.
    flat = [data.draw(st.booleans()) for _ in groups]
    flat = [flat[0]] * len(groups) if suffix == ".parquet" else flat
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / f"rollouts{suffix}", mixed_records(groups, flat))
        assert contents(engine(path, epochs=1).next_rollouts(len(groups), step=0)) == contents(
            groups
        )


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("flat", [False, True])
def test_a_run_continued_anywhere_equals_one_that_was_not_interrupted(tmp_path, suffix, flat):
    groups = numbered_groups(11)
    paths = [
        write(tmp_path / f"{i}{suffix}", mixed_records(part, [flat] * len(part)))
        for i, part in enumerate([groups[:7], groups[7:]])
    ]
    uninterrupted = engine(*paths, epochs=2)
    batches = [plain(uninterrupted.next_rollouts(2, step=i)) for i in range(11)]
    assert contents([g for batch in batches for g in batch]) == contents(groups * 2)
    for stop in range(12):
        first = engine(*paths, epochs=2)
        for i in range(stop):
            first.next_rollouts(2, step=i)
        # A checkpoint may store the state as text.
        state = json.loads(json.dumps(first.state_dict()))
        first.close()
        second = engine(*paths, epochs=2)
        second.load_state_dict(state)
        rest = [plain(second.next_rollouts(2, step=i)) for i in range(stop, 11)]
        assert rest == batches[stop:]
        with pytest.raises(EndOfRollouts):
            second.next_rollouts(1, step=11)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_state_can_be_loaded_into_an_engine_that_has_read_on(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", [whole_record(g) for g in numbered_groups(5)])
    reader = engine(path)
    reader.next_rollouts(1, step=0)
    state = reader.state_dict()
    expected = plain(reader.next_rollouts(3, step=1))
    reader.load_state_dict(state)
    assert plain(reader.next_rollouts(3, step=1)) == expected


def test_files_are_read_in_their_order_epoch_after_epoch(tmp_path):
    groups = numbered_groups(4)
    first = write(tmp_path / "first.jsonl", [whole_record(g) for g in groups[:3]])
    second = write(tmp_path / "second.parquet", [whole_record(g) for g in groups[3:]])
    reader = engine(first, second)
    assert contents(reader.next_rollouts(10, step=0)) == contents((groups * 3)[:10])
    assert reader.epoch == 2


def test_the_data_ends_after_its_epochs_without_using_up_a_part_of_a_batch(tmp_path):
    path = write(tmp_path / "a.jsonl", [whole_record(g) for g in numbered_groups(3)])
    reader = engine(path, epochs=2)
    reader.next_rollouts(4, step=0)
    message = r"gone through \(epochs=2\): 2 groups are left, 3 were asked for"
    for _ in range(2):
        with pytest.raises(EndOfRollouts, match=message):
            reader.next_rollouts(3, step=1)
    assert contents(reader.next_rollouts(2, step=1)) == contents(numbered_groups(3)[1:])
    assert not issubclass(EndOfRollouts, (StopIteration, ValueError))


def test_sources_name_lines_from_1_and_rows_from_0(tmp_path):
    whole, flat = numbered_groups(2)[0], numbered_groups(3)[2]
    records = [whole_record(whole), *flat_records(flat, "a"), whole_record(whole)]
    lines = write(tmp_path / "a.jsonl", records)
    rows = write(tmp_path / "a.parquet", records)
    assert list(engine(lines).next_rollouts(3, step=0).sources) == [
        f"{lines}:1",
        f"{lines}:2-4",
        f"{lines}:5",
    ]
    assert list(engine(rows).next_rollouts(3, step=0).sources) == [
        f"{rows}: row 0",
        f"{rows}: row 1-3",
        f"{rows}: row 4",
    ]


def test_blank_lines_a_byte_order_mark_and_a_missing_last_newline_do_no_harm(tmp_path):
    groups = numbered_groups(3)
    lines = [json.dumps(record) for record in mixed_records(groups, [True, False, True])]
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + "\n  \n\r\n".join(lines), encoding="utf-8")
    read = engine(path, epochs=1).next_rollouts(3, step=0)
    assert contents(read) == contents(groups)
    # Three lines apart: blank ones count, and stand within groups too.
    assert list(read.sources) == [f"{path}:1", f"{path}:4", f"{path}:7-13"]


def test_null_is_absent_and_unknown_fields_are_passed_over(tmp_path):
    record = {
        "prompt": [1],
        "responses": [[2]],
        "rewards": [1],
        "old_logprobs": None,
        "response": None,
        "answer": None,
        "group": "of the writer's own",
        "difficulty": {"level": 3},
    }
    for suffix in FORMATS:
        (group,) = plain(engine(write(tmp_path / f"a{suffix}", [record])).next_rollouts(1, step=0))
        assert contents([group]) == [((1,), ((2,),), (1.0,), *[None] * 8)]
        assert type(group.rewards[0]) is float


def test_neighbouring_groups_are_told_apart_by_id_and_type_of_id(tmp_path):
    group = numbered_groups(3)[2]
    records = [r for name in (1, "1", "b", 1) for r in flat_records(group, name)]
    read = engine(write(tmp_path / "a.jsonl", records), epochs=1).next_rollouts(4, step=0)
    assert contents(read) == contents([group] * 4)


def test_a_group_ends_with_its_file(tmp_path):
    group = numbered_groups(3)[2]
    paths = [write(tmp_path / f"{i}.jsonl", flat_records(group, "same")) for i in range(2)]
    read = engine(*paths, epochs=1).next_rollouts(2, step=0)
    assert contents(read) == contents([group] * 2)


def test_missing_rewards_are_computed_from_responses_and_answer(tmp_path):
    records = [
        {"prompt": [1], "responses": [[2, 3], [2, 4], [2]], "answer": [2, 3]},
        {"prompt": [1], "responses": [[2, 3]], "answer": [2, 3], "rewards": [0.25]},
        {"group": 1, "prompt": [1], "response": [7], "answer": [7]},
        {"group": 1, "prompt": [1], "response": [8], "answer": [7]},
        {"group": 1, "prompt": [1], "response": [8], "answer": [7], "reward": 0.5},
    ]
    for suffix in FORMATS:
        path = write(tmp_path / f"a{suffix}", records)
        read = plain(engine(path, reward=rewards.exact_match, epochs=1).next_rollouts(3, step=0))
        assert [g.rewards for g in read] == [(1.0, 0.0, 0.0), (0.25,), (1.0, 0.0, 0.5)]
        assert [g.answer for g in read] == [[2, 3], [2, 3], [7]]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("flat", [False, True])
def test_a_loss_mask_says_which_tokens_are_trained_on(tmp_path, suffix, flat):
    masked = dataclasses.replace(
        numbered_groups(3)[2],
        loss_mask=((False, True, False), (True,) * 4, (True,)),
        responses=((1, 2, 3), (1, 2, 3, 4), (1,)),
    )
    groups = [numbered_groups(1)[0], masked]
    path = write(tmp_path / f"a{suffix}", mixed_records(groups, [flat] * 2))
    batch = engine(path).next_rollouts(2, step=0)
    # All tokens of a group without a mask are trained on.
    assert batch.loss_mask.tolist() == [True, False, True, *[False], *[True] * 5]
    assert batch.summary().trained_lengths.tolist() == [1, 1, 4, 1]
    assert engine(path).next_rollouts(1, step=0).loss_mask is None


def test_old_log_probabilities_are_of_all_groups_of_a_batch_or_of_none(tmp_path):
    without, with_them = whole_record(numbered_groups(1)[0]), whole_record(numbered_groups(1)[0])
    with_them["old_logprobs"] = [[-1.0]]
    path = write(tmp_path / "a.jsonl", [with_them, without])
    reader = engine(path, epochs=1)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a.jsonl:2: old_logprobs: missing, but .*:1, of the"):
            reader.next_rollouts(2, step=0)
    # Nothing is used up, and each of them is a batch by itself.
    assert reader.next_rollouts(1, step=0).old_logprobs.tolist() == [-1.0]
    assert reader.next_rollouts(1, step=0).old_logprobs is None


def test_a_large_file_is_not_loaded_whole(tmp_path):
    record = json.dumps({"prompt": [7] * 1000, "responses": [[8] * 10], "rewards": [1.0]}) + "\n"
    path = tmp_path / "a.jsonl"
    path.write_text(record * 4000)
    zipped = tmp_path / "b.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes(), compresslevel=1))
    assert path.stat().st_size > 12_000_000
    for file in (path, zipped):
        reader = engine(file, max_positions=2000)
        tracemalloc.start()
        for step in range(10):
            reader.next_rollouts(10, step=step)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        reader.close()
        # Ten groups of a thousand references of 8 bytes each, and what parsing one more takes.
        assert peak < 2_000_000


def test_a_large_parquet_file_is_not_loaded_whole(tmp_path):
    rows, length = 4000, 1000
    rng = np.random.default_rng(0)
    lists = pa.ListArray.from_arrays(
        np.arange(0, rows * length + 1, length, dtype=np.int32),
        rng.integers(0, 2**31, rows * length),
    )
    columns = {"prompt": lists, "responses": [[[8]]] * rows, "rewards": [[1.0]] * rows}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    del lists, columns
    assert path.stat().st_size > 20_000_000
    reader = engine(path, vocab_size=2**31, max_positions=2000)
    before = pa.total_allocated_bytes()
    for step in range(20):
        reader.next_rollouts(10, step=step)
        # A buffer of 1 MiB and a page of about as much for each column, and 16 rows.
        assert pa.total_allocated_bytes() - before < 6_000_000
    reader.close()


def test_a_closed_engine_has_no_file_open_and_can_read_on(tmp_path):
    folder = Path(f"/proc/{os.getpid()}/fd")
    path = write(tmp_path / "a.jsonl", [whole_record(g) for g in numbered_groups(3)])
    reader = engine(path)

    def is_open() -> bool:
        return any(os.path.realpath(fd) == str(path) for fd in folder.iterdir())

    reader.next_rollouts(1, step=0)
    if folder.exists():
        assert is_open()
    reader.close()
    reader.close()
    if folder.exists():
        assert not is_open()
    assert contents(reader.next_rollouts(1, step=0)) == contents(numbered_groups(2)[1:])


def _after_two_groups(path):
    reader = engine(path)
    reader.next_rollouts(2, step=0)
    state = reader.state_dict()
    reader.close()
    return state


def test_the_data_may_move_between_runs(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    groups = numbered_groups(3)
    path = write(tmp_path / "a.jsonl", [whole_record(g) for g in groups])
    state = _after_two_groups(path)

    moved = Path(shutil.copy(path, tmp_path / "elsewhere"))
    other = engine(moved)
    other.load_state_dict(state)
    assert contents(other.next_rollouts(1, step=0)) == contents(groups[2:])
    with pytest.raises(ValueError, match="the files of rollouts have changed"):
        engine(moved, moved).load_state_dict(state)


def test_what_comes_after_the_position_may_change_between_runs(tmp_path):
    groups = numbered_groups(4)
    path = write(tmp_path / "a.jsonl", [whole_record(g) for g in groups[:3]])
    state = _after_two_groups(path)

    write(path, [whole_record(g) for g in groups])
    other = engine(path)
    other.load_state_dict(state)
    assert contents(other.next_rollouts(2, step=0)) == contents(groups[2:])


def test_what_came_before_the_position_may_not_change_its_length(tmp_path):
    path = write(tmp_path / "a.jsonl", [whole_record(g) for g in numbered_groups(3)])
    state = _after_two_groups(path)

    size = path.stat().st_size
    path.write_text(" " + path.read_text())
    with pytest.raises(
        ValueError,
        match=rf"changed: .* in a.jsonl \({size} bytes\), but there are a.jsonl \({size + 1} bytes",
    ):
        engine(path).load_state_dict(state)


def test_the_engine_is_a_rollout_engine(tmp_path):
    def accepts(_: RolloutEngine) -> None: ...

    accepts(engine(write(tmp_path / "a.jsonl", [whole_record(numbered_groups(1)[0])])))
    methods = [name for name in vars(RolloutEngine) if not name.startswith("_")]
    assert methods == ["next_rollouts", "metrics", "state_dict", "load_state_dict", "close"]


PACKAGES = ["torch", "megatron", "pyarrow", "transformers", "datasets", "httpx", "yaml"]


def test_reading_rollouts_needs_numpy_only(tmp_path):
    groups = numbered_groups(3)
    path = write(tmp_path / "a.jsonl.gz", [whole_record(g) for g in groups])
    root = Path(rollouts.__file__).parents[2]
    modules = sorted(path.stem for path in Path(rollouts.__file__).parent.glob("*.py"))
    for of_a_run in ("build", "parts"):
        modules.remove(of_a_run)
    program = f"""
import sys
from importlib import import_module
for name in {modules}:
    import_module("megatron_prefix.rollouts." + name)
from megatron_prefix.rollouts.file_engine import FileEngine
from megatron_prefix.rollouts.group_reader import GroupReader
from megatron_prefix.rollouts.validation import Limits
reader = GroupReader(limits=Limits(vocab_size={VOCAB_SIZE}, max_positions={MAX_POSITIONS}))
engine = FileEngine([{str(path)!r}], reader)
print(engine.next_rollouts(3, step=0).response_tokens.tolist())
print([name for name in {PACKAGES} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    tokens = [token for group in groups for response in group.responses for token in response]
    assert done.stdout == f"{tokens}\n[]\n", done.stderr


@pytest.mark.parametrize("suffix", FORMATS)
def test_records_are_counted_without_reading_them(tmp_path, suffix):
    path = write(tmp_path / f"rollouts{suffix}", [whole_record(g) for g in numbered_groups(7)])
    assert open_record_file(path).count() == 7

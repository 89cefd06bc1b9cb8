"""What is read into arrays is what the parsers of plain values read, or refuse, word for word."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simdjson  # noqa: F401  the package that reads lines into arrays, which is tested here
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.rollouts import json_arrays, json_lines, kinds
from megatron_prefix.rollouts.json_arrays import array_reader
from megatron_prefix.rollouts.json_object import parse_object
from megatron_prefix.rollouts.kinds import TOKENS, plain_value
from megatron_prefix.rollouts.record import ARRAY_FIELDS, START
from megatron_prefix.rollouts.record_files import open_record_file
from megatron_prefix.rollouts.records import RolloutBatch

from .files import (
    FORMATS,
    contents,
    engine,
    groups_strategy,
    mixed_records,
    numbered_groups,
    whole_record,
    write,
)
from .test_batches import assert_equal


def read(path: Path, *, as_arrays: bool, step: int = 2) -> list[RolloutBatch | str]:
    """All groups of a file in batches of `step`, or the error that ends it."""
    reader = engine(path, epochs=1)
    reader._stream._as_arrays = as_arrays
    found: list[RolloutBatch | str] = []
    for _ in range(20):
        try:
            found.append(reader.next_rollouts(step, step=0))
        except ValueError as error:
            return [*found, str(error)]
        except Exception as end:
            return [*found, type(end).__name__]
    raise AssertionError


def assert_same(path: Path) -> list[RolloutBatch | str]:
    """Both ways of reading a file give the same batches and errors."""
    fast, plain = read(path, as_arrays=True), read(path, as_arrays=False)
    assert len(fast) == len(plain)
    for ours, theirs in zip(fast, plain, strict=True):
        if isinstance(theirs, str):
            assert ours == theirs
        else:
            assert_equal(ours, theirs)
    return fast


NUMBERS = st.one_of(
    st.integers(-2, 40),
    st.floats(-3, 1, width=32),
    st.floats(),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 1e300, 1e-310, -0.0, 10**30]),
    st.booleans(),
    st.none(),
    st.text("ab[]\\\u005b\ud7ff", max_size=3),
)
JUNK = st.recursive(
    NUMBERS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner)
)


@st.composite
def odd_records(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Records of which some have a value that does not belong there."""
    groups = draw(groups_strategy(max_size=3))
    flat = [draw(st.booleans()) for _ in groups]
    records = [{**record} for record in mixed_records(groups, flat)]
    for _ in range(draw(st.integers(0, 2))):
        record = records[draw(st.integers(0, len(records) - 1))]
        name = draw(st.sampled_from([*record, "answer", "other"]))
        value = record.get(name)
        if isinstance(value, list) and value and draw(st.booleans()):
            i = draw(st.integers(0, len(value) - 1))
            if isinstance(value[i], list) and value[i] and draw(st.booleans()):
                j = draw(st.integers(0, len(value[i]) - 1))
                inner = [*value[i][:j], draw(JUNK), *value[i][j + 1 :]]
                record[name] = [*value[:i], inner, *value[i + 1 :]]
            else:
                record[name] = [*value[:i], draw(JUNK), *value[i + 1 :]]
        else:
            record[name] = draw(JUNK)
    return records


@settings(max_examples=300, deadline=None)
@given(odd_records(), st.booleans())
def test_any_lines_are_read_as_by_the_standard_parser(records, as_ascii):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        lines = [json.dumps(record, ensure_ascii=as_ascii) + "\n" for record in records]
        path.write_text("".join(lines), encoding="utf-8")
        assert_same(path)


@settings(max_examples=100, deadline=None)
@given(groups_strategy(), st.booleans(), st.sampled_from(FORMATS))
def test_good_files_of_every_format_are_read_the_same_both_ways(groups, flat, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        write(path, mixed_records(groups, [flat] * len(groups)))
        assert isinstance(assert_same(path)[-1], str)


def test_good_groups_need_no_parser_of_plain_values(tmp_path, monkeypatch):
    def never(*args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(kinds, "_converted", never)
    monkeypatch.setattr(json_lines, "parse_object", never)
    groups = numbered_groups(5)
    for suffix in FORMATS:
        path = write(tmp_path / f"a{suffix}", [whole_record(group) for group in groups])
        assert contents(engine(path).next_rollouts(5, step=0)) == contents(groups)


LINES = [
    b'{"prompt": [1, 2], "other": [[1], [[2]]], "answer": {"a": ["[", 1.5, 1e22, -0.0]}}',
    b'{"prompt": [1, [2]]}',
    b'{"prompt": [[1], [2, [3]]]}',
    b'{"responses": [[1], [[2]]], "answer": "\\u005b"}',
    b'{"responses": [[1], 2], "a": "[]"}',
    b'{"prompt": [1, 2.0]}',
    b'{"prompt": [], "responses": [[]], "rewards": []}',
    b'{"prompt": [9223372036854775808], "rewards": [9223372036854775808, 1]}',
    b'{"rewards": [1, 2.5, -0.0, 1e-400]}',
    b'{"finished": [true, false], "loss_mask": [[true], [false, true]]}',
    b'{"finished": [true, 1], "loss_mask": [[true], [[false]]]}',
    b'{"prompt": [1], "prompt": [2]}',
    b'{"answer": {"a": 1, "a": 2}}',
    b'{"a": 12345678901234567890, "b": 0.1, "c": null, "d": "\\u0000", "\\u0061b": 1}',
    b'\xef\xbb\xbf{"prompt": [1]}\r\n',
    b' {"prompt": [1]}\t\n',
    b'{"a": "\\ud800"}',
    b'{"a": NaN, "rewards": [NaN]}',
    b'{"answer": ' + b"[" * 990 + b"]" * 990 + b"}",
    b'{"a": 1} x',
    b"[1]",
    b"3",
    b'{"prompt": [1',
]


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_read_as_the_standard_parser_reads_it_or_given_up(line):
    found = array_reader()(line)
    if found is None:
        return
    assert {name: plain_value(value) for name, value in found.items()} == parse_object(line, "f:1")
    for name, value in found.items():
        if ARRAY_FIELDS.get(name) is TOKENS and isinstance(value, np.ndarray):
            assert all(type(token) is int for token in parse_object(line, "f:1")[name])


def test_lines_that_are_odd_but_right_are_still_read_fast():
    fast = [line for line in LINES if array_reader()(line) is not None]
    assert LINES[0] in fast and LINES[9] in fast and LINES[14] in fast
    assert not {LINES[1], LINES[2], LINES[3], LINES[11], LINES[12]} & set(fast)


def test_without_its_package_the_standard_parser_reads_and_says_so_once(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "simdjson", None)
    json_arrays._simdjson.cache_clear()
    groups = numbered_groups(4)
    path = write(tmp_path / "a.jsonl", [whole_record(group) for group in groups])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert contents(engine(path).next_rollouts(4, step=0)) == contents(groups)
    json_arrays._simdjson.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "pysimdjson is not installed: JSON Lines are read several times as slowly; "
        "pip install 'megatron-prefix[train]'"
    ]


GROUPS = {
    "prompt": [[1], [2, 3], [4], [5, 6, 7]],
    "responses": [[[1, 2], [3]], [[4]], [[5], [6], [7, 8]], [[9]]],
    "rewards": [[1, 0], [0.5], [0, 0, 1], [2]],
    "old_logprobs": [[[-1, -2], [-3]], [[-0.5]], [[-1], [-1], [-1, 0]], [[-4]]],
    "loss_mask": [[[True, False], [True]], [[True]], [[True], [True], [False, True]], [[True]]],
    "finished": [[True, False], [True], [False, False, True], [True]],
    "answer": ["a", "b", "a", "b"],
}


def _types(token: pa.DataType, number: pa.DataType, listed: Any) -> dict[str, pa.DataType]:
    return {
        "prompt": listed(token),
        "responses": listed(listed(token)),
        "rewards": listed(number),
        "old_logprobs": listed(listed(number)),
        "loss_mask": listed(listed(pa.bool_())),
        "finished": listed(pa.bool_()),
        "answer": pa.dictionary(pa.int8(), pa.string()),
    }


@pytest.mark.parametrize("token", [pa.int8(), pa.uint16(), pa.int32(), pa.int64(), pa.uint64()])
@pytest.mark.parametrize("number", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("listed", [pa.list_, pa.large_list])
def test_columns_of_every_type_of_number_become_arrays(tmp_path, token, number, listed):
    types = _types(token, number, listed)
    arrays = {name: pa.array(values, types[name]) for name, values in GROUPS.items()}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(arrays), path, row_group_size=3)
    whole = assert_same(path)
    assert [batch.num_groups for batch in whole[:-1]] == [2, 2]
    records = list(open_record_file(path).records(START, as_arrays=True))
    for row, record in enumerate(records):
        plain = {name: plain_value(value) for name, value in record.values.items()}
        assert plain == {name: values[row] for name, values in GROUPS.items()}
        assert isinstance(record.values["prompt"], np.ndarray)
        assert not any(
            isinstance(record.values[name], list) for name in ARRAY_FIELDS.keys() & types
        )


def test_a_part_of_a_table_with_nulls_is_read_the_same_both_ways(tmp_path):
    columns = {**GROUPS, "prompt": [[1], [2, 3], None, [5, None]]}
    columns["old_logprobs"] = [None, [[-0.5]], [[-1], None, [-1, 0]], [[-4]]]
    types = _types(pa.int32(), pa.float32(), pa.list_)
    table = pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})
    for start in range(4):
        path = tmp_path / f"{start}.parquet"
        pq.write_table(table.slice(start), path)
        for number in (1, 4):
            pq.write_table(table.slice(start, number), path)
            assert_same(path)
    chunks = pa.concat_tables([table.slice(1, 1), table.slice(3), table.slice(0, 2)])
    pq.write_table(chunks, path)
    assert "prompt[1]: None is not a token id" in str(assert_same(path)[-1])


def test_columns_of_other_types_go_through_plain_values(tmp_path):
    fixed = pa.FixedSizeListArray.from_arrays(pa.array([1, 2, 3, 4], pa.int32()), 2)
    decimals = pa.array([[1, 0], [0, 1]], pa.list_(pa.decimal128(5, 2)))
    columns = {"prompt": fixed, "responses": [[[1], [2]], [[3], [4]]], "rewards": [[1, 0], [0, 1]]}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    assert assert_same(path)[0].prompt_tokens.tolist() == [1, 2, 3, 4]
    pq.write_table(pa.table({**columns, "rewards": decimals}), path)
    assert "row 0: rewards[0]: Decimal('1.00') is not a number" in assert_same(path)[0]

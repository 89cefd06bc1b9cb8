"""Files of records for the tests: written in every format, and drawn at random."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from megatron_prefix.rollouts.file_engine import FileEngine
from megatron_prefix.rollouts.group_reader import GroupReader
from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup
from megatron_prefix.rollouts.turns import num_turns
from megatron_prefix.rollouts.validation import Limits

VOCAB_SIZE = 32
MAX_POSITIONS = 16
LIMITS = Limits(vocab_size=VOCAB_SIZE, max_positions=MAX_POSITIONS)
FORMATS = [".jsonl", ".jsonl.gz", ".parquet"]


def write(path: Path, records: Sequence[dict[str, Any]], *, row_group_size: int = 3) -> Path:
    """Write records in the format that the path's name says."""
    if path.suffix == ".parquet":
        names = dict.fromkeys(name for record in records for name in record)
        columns = {name: [record.get(name) for record in records] for name in names}
        pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    else:
        text = "".join(json.dumps(record) + "\n" for record in records).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def engine(*paths: Path, **options: Any) -> FileEngine:
    names = ("epochs", "reads", "run_alone")
    running = {name: options.pop(name) for name in names if name in options}
    limits = vars(LIMITS) | {name: options.pop(name) for name in vars(LIMITS) if name in options}
    return FileEngine(paths, GroupReader(limits=Limits(**limits), **options), **running)


def whole_record(group: RolloutGroup) -> dict[str, Any]:
    """The record of a whole group, without its source and what it has not."""
    record = {
        "prompt": list(group.prompt),
        "responses": [list(response) for response in group.responses],
        "rewards": list(group.rewards),
        "answer": group.answer,
    }
    if group.old_logprobs is not None:
        record["old_logprobs"] = [list(values) for values in group.old_logprobs]
    if group.loss_mask is not None:
        record["loss_mask"] = [list(mask) for mask in group.loss_mask]
    for name in ("turn_rewards", "advantages", "keys"):
        if getattr(group, name) is not None:
            record[name] = [list(values) for values in getattr(group, name)]
    if group.turn_rewards is not None:
        del record["rewards"]
    if group.finished is not None:
        record["finished"] = list(group.finished)
    if group.prompt_keys is not None:
        record["prompt_keys"] = list(group.prompt_keys)
    return record


def flat_records(group: RolloutGroup, name: str | int) -> list[dict[str, Any]]:
    """The records of one response each of a group."""
    whole = whole_record(group)
    columns = {
        "response": whole["responses"],
        "reward": whole.get("rewards"),
        "turn_rewards": whole.get("turn_rewards"),
        "advantages": whole.get("advantages"),
        "old_logprobs": whole.get("old_logprobs"),
        "loss_mask": whole.get("loss_mask"),
        "finished": whole.get("finished"),
        "keys": whole.get("keys"),
    }
    return [
        {"group": name, "prompt": whole["prompt"], "answer": group.answer}
        | {field: whole[field] for field in ("prompt_keys",) if field in whole}
        | {field: values[r] for field, values in columns.items() if values is not None}
        for r in range(len(group.responses))
    ]


def numbered_groups(count: int) -> list[RolloutGroup]:
    """Groups that differ, with one to three responses of unequal lengths."""
    return [
        RolloutGroup(
            prompt=(n % VOCAB_SIZE, n // VOCAB_SIZE),
            responses=tuple(tuple(range(1, 2 + (n + r) % 4)) for r in range(1 + n % 3)),
            rewards=tuple(n + r / 4 for r in range(1 + n % 3)),
            answer=[n],
            source="",
        )
        for n in range(count)
    ]


def plain(batch: RolloutBatch | None) -> list[RolloutGroup]:
    """The groups of rank 0's batch, of plain numbers."""
    assert batch is not None
    return [_plain_group(group) for group in batch.groups()]


def _plain_group(group: RolloutGroup) -> RolloutGroup:
    values = {f.name: getattr(group, f.name) for f in dataclasses.fields(group)}
    listed = {n: v for n, v in values.items() if n not in ("answer", "policy_version", "source")}
    return dataclasses.replace(group, **{name: _tuples(value) for name, value in listed.items()})


def _tuples(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def contents(groups: Sequence[RolloutGroup] | RolloutBatch | None) -> list[tuple[Any, ...]]:
    """All fields but the source, log-probabilities in 32 bits."""
    if groups is None or isinstance(groups, RolloutBatch):
        groups = plain(groups)
    return [
        (
            g.prompt,
            g.responses,
            g.rewards,
            g.old_logprobs and tuple(tuple(map(np.float32, values)) for values in g.old_logprobs),
            g.loss_mask,
            g.turn_rewards,
            g.advantages,
            g.finished,
            g.prompt_keys,
            g.keys,
            g.answer,
        )
        for g in groups
    ]


@st.composite
def group_strategy(
    draw: st.DrawFn, *, has_old_logprobs: bool, has_loss_mask: bool, has_keys: bool
) -> RolloutGroup:
    tokens = st.integers(0, VOCAB_SIZE - 1)
    responses = draw(st.lists(st.lists(tokens, min_size=1, max_size=6), min_size=1, max_size=4))
    count = len(responses)
    finite = st.floats(allow_nan=False, allow_infinity=False)
    old_logprobs = loss_mask = finished = None
    if has_old_logprobs:
        old_logprobs = tuple(
            tuple(draw(st.floats(-99.0, 0.0)) for _ in response) for response in responses
        )
    if has_loss_mask:
        loss_mask = tuple(
            (True, *(draw(st.booleans()) for _ in response[1:])) for response in responses
        )
    rewards = tuple(draw(st.lists(finite, min_size=count, max_size=count)))
    turn_rewards = advantages = None
    given = draw(st.sampled_from(["rewards", "turn_rewards", "advantages"]))
    if given == "turn_rewards":
        few = st.floats(-1e6, 1e6)
        masks = loss_mask or [None] * count
        # Quarters: their sum is the same in any order.
        quarters = few.map(lambda value: round(4 * value) / 4)
        turn_rewards = tuple(
            tuple(draw(quarters) for _ in range(num_turns(mask))) for mask in masks
        )
        rewards = tuple(map(float, map(sum, turn_rewards)))
    elif given == "advantages":
        advantages = tuple(tuple(draw(finite) for _ in response) for response in responses)
    if draw(st.booleans()):
        finished = tuple(draw(st.booleans()) for _ in responses)
    prompt = tuple(draw(st.lists(tokens, min_size=1, max_size=10)))
    prompt_keys = keys = None
    if has_keys:
        key = st.integers(-(2**63), 2**63 - 1)
        prompt_keys = tuple(draw(key) for _ in prompt)
        keys = tuple(tuple(draw(key) for _ in response) for response in responses)
    return RolloutGroup(
        prompt=prompt,
        prompt_keys=prompt_keys,
        keys=keys,
        responses=tuple(map(tuple, responses)),
        rewards=rewards,
        turn_rewards=turn_rewards,
        advantages=advantages,
        old_logprobs=old_logprobs,
        loss_mask=loss_mask,
        finished=finished,
        answer=draw(st.none() | st.text(max_size=4)),
        source="",
    )


@st.composite
def groups_strategy(draw: st.DrawFn, *, max_size: int = 5) -> list[RolloutGroup]:
    """Groups of one batch: it has old log-probabilities, masks and keys of all or of none."""
    names = ("has_old_logprobs", "has_loss_mask", "has_keys")
    options = {name: draw(st.booleans()) for name in names}
    return draw(st.lists(group_strategy(**options), min_size=1, max_size=max_size))


def mixed_records(groups: Sequence[RolloutGroup], flat: Sequence[bool]) -> list[dict[str, Any]]:
    """Records of the groups, some whole and some one response at a time."""
    return list(
        itertools.chain.from_iterable(
            flat_records(group, n) if is_flat else [whole_record(group)]
            for n, (group, is_flat) in enumerate(zip(groups, flat, strict=True))
        )
    )

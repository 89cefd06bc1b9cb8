"""Positions in records, of models with mRoPE: as shifts from a token's place in its sequence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prefix.rollouts.records import RolloutBatch
from tests.rollouts.files import engine, write

# A word, an image of 2 x 2 patches, and a word.
IMAGE = [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]
OWN = [[[4, 5], [4, 5], [4, 5]], [[9], [8], [7]]]
RECORD = {"prompt": [1, 9, 9, 9, 9, 2], "responses": [[3, 4], [5]], "rewards": [1.0, 0.0]}
FLAT = [
    {"group": "a", "prompt": RECORD["prompt"], "response": response, "reward": 0.0}
    for response in RECORD["responses"]
]


def _read(path: Path, count: int) -> RolloutBatch:
    batch = engine(path, has_mrope=True).next_rollouts(count, step=0)
    assert batch is not None
    return batch


def _positions(batch: RolloutBatch, index: int) -> list[list[list[int]]]:
    """[responses][3][tokens] of whole sequences."""
    group = batch.group(index)
    assert group.position_shifts is not None
    found = []
    for shifts in group.position_shifts:
        whole = np.concatenate([group.prompt_position_shifts, shifts])
        found.append((whole + np.arange(len(whole))[:, None]).T.tolist())
    return found


def _whole(after: list[list[list[int]]]) -> list[list[list[int]]]:
    return [[a + b for a, b in zip(IMAGE, own, strict=True)] for own in after]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_positions_are_those_of_the_record_or_go_on_from_its_prompt(
    tmp_path: Path, suffix: str
) -> None:
    image = {**RECORD, "prompt_positions": IMAGE}
    path = write(tmp_path / f"a{suffix}", [RECORD, image, {**image, "positions": OWN}, RECORD])
    batch = _read(path, 4)
    assert _positions(batch, 0) == _positions(batch, 3) == [[[*range(n)]] * 3 for n in (8, 7)]
    assert _positions(batch, 1) == _whole([[[4, 5]] * 3, [[4]] * 3])
    assert _positions(batch, 2) == _whole(OWN)
    again = RolloutBatch.from_groups(batch.groups())
    assert np.array_equal(again.position_shifts, batch.position_shifts)
    assert np.array_equal(again.prompt_position_shifts, batch.prompt_position_shifts)
    parts = [
        {**record, "prompt_positions": IMAGE, "positions": own}
        for record, own in zip(FLAT, OWN, strict=True)
    ]
    assert _positions(_read(write(tmp_path / f"b{suffix}", parts), 1), 0) == _whole(OWN)
    assert _read(write(tmp_path / f"c{suffix}", [RECORD]), 1).position_shifts is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_positions": IMAGE[:2]}, "prompt_positions: [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2,"),
        (
            {"prompt_positions": [[0, 1]] * 3},
            "prompt_positions: [[0, 1], [0, 1], [0, 1]] is not",
        ),
        ({"prompt_positions": 3}, "prompt_positions: 3 is not three lists"),
        ({"prompt_positions": [[-1] * 6] * 3}, "prompt_positions: positions are whole numbers fro"),
        ({"prompt_positions": [[0.5] * 6] * 3}, "prompt_positions: positions are whole numbers"),
        ({"positions": OWN[:1]}, "positions: 1 for 2 responses; there must be one for each"),
        ({"positions": OWN[::-1]}, "positions[0]: [[9], [8], [7]] is not three lists (time, hei"),
    ],
)
def test_what_is_wrong_with_positions_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "a.jsonl", [{**RECORD, **changes}])
    with pytest.raises(ValueError, match=re.escape(f"{path}:1: {message}")):
        _read(path, 1)


def test_prompts_of_a_group_and_models_without_mrope(tmp_path: Path) -> None:
    other = [[0, 1, 1, 1, 1, 4], *IMAGE[1:]]
    parts = [{**r, "prompt_positions": p} for r, p in zip(FLAT, (IMAGE, other), strict=True)]
    path = write(tmp_path / "a.jsonl", parts)
    with pytest.raises(ValueError, match=r"a.jsonl:2: prompt_positions: group 'a' of different pr"):
        _read(path, 1)
    with pytest.raises(ValueError, match=r"a.jsonl:1: prompt_positions: only a model with mRoPE"):
        engine(path).next_rollouts(1, step=0)
    # What a record says of itself under such a name is no slip.
    path = write(tmp_path / "b.jsonl", [{**RECORD, "position": 4}])
    assert engine(path).next_rollouts(1, step=0) is not None

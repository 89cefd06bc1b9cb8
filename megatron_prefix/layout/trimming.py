"""The stages of a layer that computes only some of its row's queries.

After the last layer only the positions whose labels are scored go on, so it needs all keys and
values but only these queries. A causal square takes the queries from the first needed one to its
end, which are again a causal square, and before it a full rectangle:

    keys      0 ........ a ... n
    queries   - rectangle |\\          queries a .. n of a segment of n
    a .. n    ------------| \\ square

Invariants of `trim_stages`:

- the queries are those of the kept rows, renumbered 0 .. N - 1 in their order;
- over all stages, each of them sees the keys that it saw before, exactly once;
- where there was a self stage over the whole row, the first stage is again one: causal squares with
  all N queries, in order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from megatron_prefix.layout.rows import RowStages
from megatron_prefix.layout.stages import AttentionStage, attention_stage, stage_rows

Stages = tuple[AttentionStage[np.ndarray], ...]


def trim_row(
    stages: RowStages[np.ndarray], needed: np.ndarray, *, multiple: int
) -> RowStages[np.ndarray] | None:
    """The stages of a layer that computes the needed tokens, and others only where it must.

    Args:
        stages: of all tokens of a rank's row.
        needed: [C] bool.
        multiple: see `rows_to_keep`.

    Returns:
        None where all tokens are computed.
    """
    kept = rows_to_keep(stages.local[0], needed, multiple=multiple)
    if kept.all():
        return None
    queries = np.flatnonzero(kept)
    gathered, ring, root = stages.gathered, stages.ring, stages.root
    if root is not None:
        (root,) = trim_stages([root], kept) or (None,)
    if gathered is not None:
        gathered = dataclasses.replace(gathered, stages=trim_stages(gathered.stages, kept))
    if ring is not None:
        ring = tuple(trim_stages(of_shard, kept) for of_shard in ring)
    return dataclasses.replace(
        stages,
        queries=queries,
        cu_seqlens_q=np.array([0, len(queries)], dtype=np.int32),
        local=trim_stages(stages.local, kept),
        gathered=gathered,
        root=root,
        ring=ring,  # heads are exchanged for all tokens of the row
    )


def rows_to_keep(
    self_stage: AttentionStage[np.ndarray], needed: np.ndarray, *, multiple: int
) -> np.ndarray:
    """[T] bool: the rows whose queries are computed, so that the needed ones are.

    Args:
        self_stage: causal squares over the whole row.
        needed: [T] bool.
        multiple: the number of kept rows becomes a multiple of this, at least one time; T must be
            one.
    """
    bounds = self_stage.on.cu_q.astype(np.int64)
    num_tokens = int(bounds[-1])
    assert num_tokens % multiple == 0 and needed.shape == (num_tokens,)
    ends = bounds[1:]
    first = ends.copy()  # of each square: its first needed row, its end where there is none
    rows = np.flatnonzero(needed)
    np.minimum.at(first, np.searchsorted(ends, rows, side="right"), rows)
    kept = np.arange(num_tokens) >= np.repeat(first, np.diff(bounds))
    missing = multiple if not kept.any() else -int(kept.sum()) % multiple
    # The last unkept rows lie right before what their squares keep.
    kept[np.flatnonzero(~kept)[::-1][:missing]] = True
    return kept


def trim_stages(stages: Iterable[AttentionStage[np.ndarray]], kept: np.ndarray) -> Stages:
    """The same stages for the queries of the kept rows only; stages without any are left out.

    Args:
        stages: with queries in a row of T tokens.
        kept: [T] bool; in a causal square, all rows from the first kept one.
    """
    number = np.cumsum(kept) - 1
    trimmed: list[AttentionStage[np.ndarray]] = []
    for stage in stages:
        trim = _trim_squares if stage.on.causal else _trim_rectangles
        trimmed += trim(stage, kept, number)
    return tuple(trimmed)


def _trim_squares(
    stage: AttentionStage[np.ndarray], kept: np.ndarray, number: np.ndarray
) -> Stages:
    """Smaller squares, and the rectangles between their queries and the keys before them."""
    assert isinstance(stage.queries, slice) and isinstance(stage.keys, slice)
    lengths = np.diff(stage.on.cu_q)
    square = np.repeat(np.arange(len(lengths)), lengths)
    rows, keys = stage_rows(stage.queries), stage_rows(stage.keys)
    is_kept = kept[rows]
    kept_lengths = np.bincount(square[is_kept], minlength=len(lengths))
    stages = [
        _stage(
            number[rows[is_kept]],
            keys[is_kept],
            kept_lengths[kept_lengths > 0],
            kept_lengths[kept_lengths > 0],
            causal=True,
        )
    ]
    divided = (kept_lengths > 0) & (kept_lengths < lengths)
    if divided.any():
        of_divided = divided[square]
        stages.append(
            _stage(
                number[rows[is_kept & of_divided]],
                keys[~is_kept & of_divided],
                kept_lengths[divided],
                (lengths - kept_lengths)[divided],
                causal=False,
            )
        )
    return tuple(stages)


def _trim_rectangles(
    stage: AttentionStage[np.ndarray], kept: np.ndarray, number: np.ndarray
) -> Stages:
    assert isinstance(stage.keys, slice)
    rows = stage_rows(stage.queries)
    q_lengths, k_lengths = np.diff(stage.on.cu_q), np.diff(stage.on.cu_k)
    rectangle = np.repeat(np.arange(len(q_lengths)), q_lengths)
    kept_lengths = np.bincount(rectangle[kept[rows]], minlength=len(q_lengths))
    if not kept_lengths.any():
        return ()
    # Keys without queries are only kept in between.
    used = np.flatnonzero(kept_lengths)
    first, last = int(used[0]), int(used[-1])
    keys = np.arange(stage.on.cu_k[first], stage.on.cu_k[last + 1]) + stage.keys.start
    used_range = slice(first, last + 1)
    return (
        _stage(
            number[rows[kept[rows]]],
            keys,
            kept_lengths[used_range],
            k_lengths[used_range],
            causal=False,
        ),
    )


def _stage(
    queries: np.ndarray,
    keys: np.ndarray,
    q_lengths: np.ndarray,
    k_lengths: np.ndarray,
    *,
    causal: bool,
) -> AttentionStage[np.ndarray]:
    """A stage of these rows: as slices where they are."""
    return attention_stage(_as_slice(queries), _as_slice(keys), q_lengths, k_lengths, causal=causal)


def _as_slice(rows: np.ndarray) -> slice | np.ndarray:
    """The same rows, ascending, as a slice where they are one."""
    first, stop = int(rows[0]), int(rows[-1]) + 1
    return slice(first, stop) if stop - first == len(rows) else rows

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

from collections.abc import Iterable

import numpy as np

from megatron_prefix.layout.packing import AttentionStage, attention_stage


def rows_to_keep(self_stage: AttentionStage, needed: np.ndarray, *, multiple: int) -> np.ndarray:
    """[T] bool: the rows whose queries are computed, so that the needed ones are.

    Args:
        self_stage: causal squares over the whole row.
        needed: [T] bool.
        multiple: the number of kept rows becomes a multiple of this, at least one time; T must be
            one.
    """
    bounds = self_stage.cu_q.astype(np.int64)
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


def trim_stages(stages: Iterable[AttentionStage], kept: np.ndarray) -> tuple[AttentionStage, ...]:
    """The same stages for the queries of the kept rows only; stages without any are left out.

    Args:
        stages: with queries in a row of T tokens.
        kept: [T] bool; in a causal square, all rows from the first kept one.
    """
    number = np.cumsum(kept) - 1
    trimmed: list[AttentionStage] = []
    for stage in stages:
        trim = _trim_squares if stage.causal else _trim_rectangles
        trimmed += trim(stage, kept, number)
    return tuple(trimmed)


def _trim_squares(
    stage: AttentionStage, kept: np.ndarray, number: np.ndarray
) -> list[AttentionStage]:
    """Smaller squares, and the rectangles between their queries and the keys before them."""
    assert stage.query_rows is None and stage.key_rows is None
    lengths = np.diff(stage.cu_q)
    square = np.repeat(np.arange(len(lengths)), lengths)
    rows = np.arange(stage.q_start, stage.q_stop)
    is_kept = kept[rows]
    keys = rows - stage.q_start + stage.k_start
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
    return stages


def _trim_rectangles(
    stage: AttentionStage, kept: np.ndarray, number: np.ndarray
) -> list[AttentionStage]:
    assert stage.key_rows is None
    rows = stage.query_rows
    if rows is None:
        rows = np.arange(stage.q_start, stage.q_stop)
    q_lengths, k_lengths = np.diff(stage.cu_q), np.diff(stage.cu_k)
    rectangle = np.repeat(np.arange(len(q_lengths)), q_lengths)
    kept_lengths = np.bincount(rectangle[kept[rows]], minlength=len(q_lengths))
    if not kept_lengths.any():
        return []
    # Keys without queries are only kept in between.
    used = np.flatnonzero(kept_lengths)
    first, last = int(used[0]), int(used[-1])
    keys = np.arange(stage.cu_k[first], stage.cu_k[last + 1]) + stage.k_start
    used_range = slice(first, last + 1)
    return [
        _stage(
            number[rows[kept[rows]]],
            keys,
            kept_lengths[used_range],
            k_lengths[used_range],
            causal=False,
        )
    ]


def _stage(
    queries: np.ndarray,
    keys: np.ndarray,
    q_lengths: np.ndarray,
    k_lengths: np.ndarray,
    *,
    causal: bool,
) -> AttentionStage:
    """A stage of these rows: as slices where they are."""
    q_bounds, k_bounds = (int(queries[0]), int(queries[-1]) + 1), (int(keys[0]), int(keys[-1]) + 1)
    return attention_stage(
        q_bounds,
        k_bounds,
        q_lengths,
        k_lengths,
        causal=causal,
        query_rows=None if q_bounds[1] - q_bounds[0] == len(queries) else queries,
        key_rows=None if k_bounds[1] - k_bounds[0] == len(keys) else keys,
    )

"""What has to hold for every packed layout and every microbatch plan.

Both helpers go back to the sequences: none of the numbers they compare with comes from the code
that built the layout, but for the nodes that sequences share.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from megatron_prefix.layout import (
    AttentionStage,
    ContextShards,
    MicrobatchPlan,
    ModelShape,
    PackedLayout,
    PrefixTree,
    RankStages,
    microbatch_tree,
    pack,
)
from megatron_prefix.layout.stages import stage_rows
from megatron_prefix.layout.tree_cost import tree_flops


def visible_keys(stages: Sequence[AttentionStage], num_tokens: int) -> np.ndarray:
    """[T, T]: how many times each query (row) sees each key (column), from the stages alone."""
    seen = np.zeros((num_tokens, num_tokens), dtype=np.int64)
    for stage in stages:
        for (q0, q1), (k0, k1) in zip(
            pairwise(stage.on.cu_q), pairwise(stage.on.cu_k), strict=True
        ):
            block = np.ones((q1 - q0, k1 - k0), dtype=np.int64)
            if stage.on.causal:
                assert q1 - q0 == k1 - k0, "a causal rectangle is a square"
                block = np.tril(block)
            queries, keys = stage_rows(stage.queries)[q0:q1], stage_rows(stage.keys)[k0:k1]
            seen[queries[:, None], keys] += block
    return seen


def assert_layout(layout: PackedLayout) -> None:
    """Check all invariants of a packed layout against its sequences."""
    _assert_positions(layout)
    _assert_padding(layout)
    _assert_level_order(layout)
    _assert_stages(layout)
    _assert_visibility(layout)


def assert_row_without_root(row: PackedLayout, whole: PackedLayout) -> None:
    """Check a row whose root is elsewhere, against the row of the same tree with the root in it."""
    _assert_padding(row)
    _assert_level_order(row)
    _assert_stages(row)
    _assert_visibility(row)
    root = whole.segments[0].length
    real = row.num_tokens - row.num_padding
    assert real == whole.num_tokens - whole.num_padding - root
    for name in ("input_ids", "labels", "position_ids", "multiplicity"):
        values, expected = getattr(row, name)[:real], getattr(whole, name)[root:]
        np.testing.assert_array_equal(values, expected[:real])
    assert row.max_seqlen == whole.max_seqlen
    for i in range(row.tree.num_sequences):
        np.testing.assert_array_equal(
            row.sequence_positions(i), whole.sequence_positions(i)[root:] - root
        )
    # A query sees all of the root, once, and beside it what it sees of its own row.
    seen = visible_with_root(row.stages, row.root_stage, num_tokens=row.num_tokens, num_root=root)
    assert not seen[real:, :root].any(), "padding sees only itself"
    expected = visible_keys(whole.stages, whole.num_tokens)[root : root + real, : root + real]
    np.testing.assert_array_equal(seen[:real, : root + real], expected)


def visible_with_root(
    stages: Sequence[AttentionStage],
    root_stage: AttentionStage | None,
    *,
    num_tokens: int,
    num_root: int,
) -> np.ndarray:
    """[T, R + T]: how often each query of a row sees each key of the root, and of the row."""
    size = max(num_tokens, num_root)
    of_root = visible_keys([root_stage] if root_stage is not None else [], size)
    own = visible_keys(stages, num_tokens)
    return np.concatenate([of_root[:num_tokens, :num_root], own], axis=1)


def _assert_positions(layout: PackedLayout) -> None:
    """Every labelled token once; inputs, labels and position ids along each sequence."""
    tree = layout.tree
    row_of_token: dict[tuple[int, int], int] = {}
    users = np.zeros(layout.num_tokens, dtype=np.int64)
    longest = 1
    for i, path in enumerate(tree.sequences):
        tokens = tree.sequence_tokens(i)
        positions = layout.sequence_positions(i)
        shift, count = layout.shift, max(len(tokens) - layout.shift, 0)
        assert positions.dtype == np.int64 and len(positions) == count
        np.testing.assert_array_equal(layout.input_ids[positions], tokens[shift - 1 : -1])
        np.testing.assert_array_equal(layout.labels[positions], tokens[shift:])
        np.testing.assert_array_equal(layout.position_ids[positions], np.arange(len(positions)))
        users[positions] += 1
        longest = max(longest, len(positions))
        labelled = [(node, j) for node in path for j in range(len(tree.tokens[node]))][shift:]
        for token, row in zip(labelled, positions.tolist(), strict=True):
            assert row_of_token.setdefault(token, row) == row
    rows = sorted(row_of_token.values())
    assert rows == list(range(layout.num_tokens - layout.num_padding))
    np.testing.assert_array_equal(layout.multiplicity, users)
    assert layout.max_seqlen == longest == layout.position_ids.max() + 1


def _assert_padding(layout: PackedLayout) -> None:
    assert layout.num_tokens >= 1
    for values in (layout.input_ids, layout.labels, layout.position_ids, layout.multiplicity):
        assert values.dtype == np.int64 and values.shape == (layout.num_tokens,)
        assert not values[layout.num_tokens - layout.num_padding :].any()


def _assert_level_order(layout: PackedLayout) -> None:
    segments = layout.segments
    start = 0
    for index, segment in enumerate(segments):
        assert segment.start == start and segment.length > 0
        start += segment.length
        row = slice(segment.start, start)
        assert (layout.multiplicity[row] == segment.multiplicity).all()
        assert layout.position_ids[segment.start] == segment.first_position
        level = slice(*layout.level_starts[segment.level : segment.level + 2])
        assert level.start <= row.start and row.stop <= level.stop
        if segment.parent < 0:
            assert segment.level == 0
        else:
            assert segment.parent < index
            assert segments[segment.parent].level == segment.level - 1
    assert layout.level_starts[-1] == start == layout.num_tokens - layout.num_padding
    # Siblings are adjacent and in their parents' order if parents never step back on a level.
    for before, after in pairwise(segments):
        assert before.level <= after.level <= before.level + 1
        assert before.level < after.level or before.parent <= after.parent


def _assert_stages(layout: PackedLayout) -> None:
    first, *cross = layout.stages
    assert first.on.causal and not any(stage.on.causal for stage in cross)
    assert first.queries == first.keys == slice(0, layout.num_tokens)
    num_levels = len(layout.level_starts) - 1
    assert len(cross) == num_levels * (num_levels - 1) // 2
    for stage in layout.stages:
        for cu, rows, longest in (
            (stage.on.cu_q, stage.queries, stage.on.max_q),
            (stage.on.cu_k, stage.keys, stage.on.max_k),
        ):
            assert cu.dtype == np.int32
            assert cu[0] == 0 and cu[-1] == rows.stop - rows.start > 0
            assert (np.diff(cu) >= 0).all()
            assert longest == np.diff(cu).max()
        assert (np.diff(stage.on.cu_k) > 0).all(), "a rectangle without keys"


def _assert_visibility(layout: PackedLayout) -> None:
    """A query sees its own sequence up to itself, each position once, whatever the sequence."""
    seen = visible_keys(layout.stages, layout.num_tokens)
    expected = np.zeros_like(seen)
    for i in range(layout.tree.num_sequences):
        positions = layout.sequence_positions(i)
        for t, query in enumerate(positions):
            expected[query, positions[: t + 1]] = 1
    padding = slice(layout.num_tokens - layout.num_padding, None)
    expected[padding, padding] = np.tril(np.ones((layout.num_padding,) * 2, dtype=np.int64))
    np.testing.assert_array_equal(seen, expected)


def assert_plan(
    plan: MicrobatchPlan,
    trees: Sequence[PrefixTree],
    *,
    token_budget: int,
    data_parallel_size: int,
    cost: ModelShape,
    allow_split: bool = True,
    pad_to_multiple: int = 1,
    microbatch_multiple: int = 1,
) -> None:
    """Check all invariants of a plan that was made with these arguments."""
    ranks = plan.microbatches
    assert len(ranks) == data_parallel_size
    assert {len(rank) for rank in ranks} == {plan.num_microbatches}
    assert plan.num_microbatches > 0 and plan.num_microbatches % microbatch_multiple == 0

    microbatches = [slices for rank in ranks for slices in rank]
    placed = [(s.group, i) for slices in microbatches for s in slices for i in s.sequences]
    assert sorted(placed) == [(g, i) for g, t in enumerate(trees) for i in range(t.num_sequences)]
    for slices in microbatches:
        groups = [s.group for s in slices]
        assert groups == sorted(set(groups)), "one slice of a group, in the order of the groups"
        assert all(s.sequences == tuple(sorted(s.sequences)) != () for s in slices)
        layout = pack(microbatch_tree(trees, slices), pad_to_multiple=pad_to_multiple)
        assert layout.num_tokens <= token_budget
        assert_layout(layout)
    assert plan.packed_tokens.tolist() == [
        [pack(microbatch_tree(trees, m), pad_to_multiple=pad_to_multiple).num_tokens for m in rank]
        for rank in ranks
    ]

    num_slices = [sum(s.group == g for m in microbatches for s in m) for g in range(len(trees))]
    fits = [_row_length(tree, pad_to_multiple) <= token_budget for tree in trees]
    if any(fit and n > 1 for fit, n in zip(fits, num_slices, strict=True)):
        assert allow_split
        # A group that fits was split: only to give each slot a slice, hence no slot has two.
        assert all(len(slices) <= 1 for slices in microbatches)
    if not all(microbatches):
        # A slot is empty: nothing is left that could be divided, or put elsewhere.
        assert all(len(slices) <= 1 for slices in microbatches)
        branches = [_num_branches(tree) for tree in trees]
        assert num_slices == (branches if allow_split else [1] * len(trees))

    _assert_balance(plan, trees, cost)


def _row_length(tree: PrefixTree, pad_to_multiple: int) -> int:
    return pack(tree, pad_to_multiple=pad_to_multiple).num_tokens


def _num_branches(tree: PrefixTree) -> int:
    """Sequences' paths that no other path continues."""
    paths = set(tree.sequences)
    return len({p for p in paths if not any(o[: len(p)] == p and o != p for o in paths)})


def _assert_balance(plan: MicrobatchPlan, trees: Sequence[PrefixTree], cost: ModelShape) -> None:
    """Rows run from costly to cheap, and ranks differ no more than the microbatches of a row do."""
    costs = [
        [sum(tree_flops(cost, trees[s.group].subset(s.sequences)) for s in m) for m in rank]
        for rank in plan.microbatches
    ]
    assert plan.flops.tolist() == costs
    rows = list(zip(*costs, strict=True))
    for before, after in pairwise(rows):
        assert min(before) >= max(after)
    work = [sum(rank) for rank in costs]
    assert max(work) - min(work) <= max(max(row) - min(row) for row in rows)


def assert_shards(shards: ContextShards) -> None:
    """Check all invariants of a distributed row, and of the stages of each kind, on every rank."""
    layout, cp = shards.layout, shards.num_ranks
    ranks = [RankStages(shards, rank) for rank in range(cp)]
    rows = [rank.rows() for rank in ranks]
    assert all(len(r) == shards.tokens_per_rank == layout.num_tokens // cp for r in rows)
    placed = np.concatenate(rows)
    assert sorted(placed[placed >= 0]) == list(range(layout.num_tokens - layout.num_padding))
    assert sorted(shards.order) == list(range(cp))
    for r in rows:
        end = int((r >= 0).sum())
        assert (r[end:] == -1).all(), "padding is at the end"
    assert (shards.early >= 0).all() and (shards.late >= 0).all()
    _assert_places(shards, rows)
    _assert_work(shards, rows)
    _assert_shard_visibility(shards, ranks, rows)


def _assert_places(shards: ContextShards, rows: Sequence[np.ndarray]) -> None:
    """Segments whole or in chunks as said; below a whole segment all are whole, on its rank."""
    segments = shards.layout.segments
    sharded = set(shards.sharded.tolist())
    for index, segment in enumerate(segments):
        rank = int(shards.rank_of_segment[index])
        assert (rank < 0) == (index in sharded)
        positions = np.arange(segment.start, segment.start + segment.length)
        if rank >= 0:
            assert np.isin(positions, rows[rank]).all()
        if segment.parent >= 0 and segment.parent not in sharded:
            assert rank == shards.rank_of_segment[segment.parent]
        if index in sharded:
            at = shards.sharded.tolist().index(index)
            by_place = np.argsort(shards.order)
            chunks = [(shards.early_starts[at, r], shards.early[at, r], r) for r in by_place]
            chunks += [(shards.late_starts[at, r], shards.late[at, r], r) for r in by_place[::-1]]
            start = 0
            for chunk_start, length, r in chunks:
                assert chunk_start == start
                start += length
                chunk = positions[chunk_start:start]
                # What travels is the beginning of the rank's row.
                assert np.isin(chunk, rows[r][: shards.shard_tokens[r]]).all()
            assert start == segment.length


def _assert_work(shards: ContextShards, rows: Sequence[np.ndarray]) -> None:
    """A query sees as many keys as its position says, and itself."""
    keys = shards.layout.position_ids + 1
    work = [int(keys[r[r >= 0]].sum()) for r in rows]
    assert shards.attention_pairs.tolist() == work


def _assert_shard_visibility(
    shards: ContextShards, ranks: Sequence[RankStages], rows: Sequence[np.ndarray]
) -> None:
    """With every kind of communication each query sees what it sees in the whole row, once."""
    layout = shards.layout
    expected = visible_keys(layout.stages, layout.num_tokens)
    all_shards = np.concatenate([r[:n] for r, n in zip(rows, shards.shard_tokens, strict=True)])
    padding = layout.num_tokens - layout.num_padding
    for rank, stages in enumerate(ranks):
        row = rows[rank]
        local = stages.local()
        assert local[0].on.causal and local[0].queries == slice(0, len(row))
        assert not any(stage.on.causal for stage in local[1:])
        gathered = stages.from_all_shards()
        assert len(set(gathered.source.tolist())) == len(gathered.source), "a key travels once"
        by_kind = {
            "all_gather": [(gathered.stages, all_shards[gathered.source])],
            "p2p": [
                (stages.from_shard(r), rows[r][: shards.shard_tokens[r]])
                for r in range(shards.num_ranks)
            ],
        }
        for remote in by_kind.values():
            seen = np.zeros_like(expected)
            for kind_stages, keys in [(local, row), *remote]:
                for stage in kind_stages:
                    _add_visible(seen, stage, row, keys)
            mine = row[row >= 0]
            np.testing.assert_array_equal(seen[mine, :padding], expected[mine, :padding])
            others = np.setdiff1d(np.arange(padding), mine)
            assert not seen[others].any()


def _add_visible(
    seen: np.ndarray, stage: AttentionStage, row: np.ndarray, keys: np.ndarray
) -> None:
    queries, stage_keys = row[stage.queries], keys[stage.keys]
    assert stage.on.cu_q[-1] == len(queries) and stage.on.cu_k[-1] == len(stage_keys)
    assert (np.diff(stage.on.cu_k) > 0).all(), "a rectangle without keys"
    for (q0, q1), (k0, k1) in zip(pairwise(stage.on.cu_q), pairwise(stage.on.cu_k), strict=True):
        block = np.ones((q1 - q0, k1 - k0), dtype=np.int64)
        if stage.on.causal:
            block = np.tril(block)
        q, k = queries[q0:q1], stage_keys[k0:k1]
        if (k < 0).any():
            assert stage.on.causal and (q < 0).all() and (k < 0).all(), "padding sees only itself"
            continue
        assert (q >= 0).all()
        np.add.at(seen, (q[:, None], k[None, :]), block)

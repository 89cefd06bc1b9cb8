"""Paths of recurrent layers: every chunk comes behind what its tokens' sequences have before it."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_prefix.layout import PackedLayout, PrefixTree, RankRow, Recurrence, pack, rank_row
from megatron_prefix.layout.recurrence import chunked_tokens, recurrence, widest_wave
from tests.layout.strategies import trees

WIDTH = 4


class Ranks:
    """The plans of all ranks, followed from one to another as the states are."""

    def __init__(self, layout: PackedLayout, num_ranks: int) -> None:
        self.rows: list[RankRow] = [
            rank_row(layout, rank=rank, num_ranks=num_ranks, recurrence_width=WIDTH)
            for rank in range(num_ranks)
        ]

    def plan(self, rank: int) -> Recurrence[np.ndarray]:
        return self.rows[rank].model.recurrence

    def path(self, rank: int, wave: int, index: int) -> list[int]:
        """Positions in the packed row of a chunk's tokens, and of all before them."""
        plan = self.plan(rank)
        chunk = plan.chunks[plan.waves[wave].chunks][index]
        own = self.rows[rank].rows[chunk[chunk < len(self.rows[rank].rows)]].tolist()
        before = plan.waves[wave].before
        if wave:
            return self.path(rank, wave - 1, before[index]) + own
        states = plan.states
        if not len(before) or before[index] == states.begins_of_ranks[rank]:
            return own
        return self._path_of_piece(states.begins[states.own_begins][before[index]]) + own

    def _path_of_piece(self, piece: int) -> list[int]:
        counts = self.plan(0).states.pieces_of_ranks
        place = int(self.plan(0).states.source[piece])
        owner = int(np.searchsorted(np.cumsum(counts), place, side="right"))
        own = place - sum(counts[:owner])
        assert self.plan(owner).states.own_pieces[own] == piece
        waves = self.plan(owner).waves
        last = max(number for number, wave in enumerate(waves) if own < wave.pieces)
        return self.path(owner, last, own)

    def inputs(self, rank: int) -> np.ndarray:
        """[C, WIDTH] positions of what the convolution reads, -1 for nothing."""
        halo = self.plan(rank).halo
        received = []
        for peer in range(len(self.rows)) if halo is not None else ():
            sent = self.plan(peer).halo
            of_peer = np.split(self.rows[peer].rows[sent.rows], np.cumsum(sent.sent)[:-1])[rank]
            assert len(of_peer) == halo.received[peer]
            received.append(of_peer)
        places = np.concatenate([self.rows[rank].rows, *received, [-1]])
        return places[self.plan(rank).inputs]


@settings(deadline=None, max_examples=80)
@given(tree=trees(max_nodes=14), num_ranks=st.integers(1, 4), stretch=st.sampled_from([1, 40]))
def test_states_and_inputs_come_along_the_sequences(
    tree: PrefixTree, num_ranks: int, stretch: int
) -> None:
    longer = [np.repeat(tree.sequence_tokens(i), stretch) for i in range(tree.num_sequences)]
    layout = pack(PrefixTree.from_sequences(longer), pad_to_multiple=num_ranks)
    before = {}
    for i in range(layout.tree.num_sequences):
        positions = layout.sequence_positions(i).tolist()
        before.update({position: positions[: n + 1] for n, position in enumerate(positions)})
    ranks, seen = Ranks(layout, num_ranks), []
    for rank, row in enumerate(ranks.rows):
        for number, wave in enumerate(ranks.plan(rank).waves):
            for index in range(wave.chunks.stop - wave.chunks.start):
                path = ranks.path(rank, number, index)
                assert path == before.get(path[-1] if path else -1, [])
        inputs = ranks.inputs(rank)
        for token in np.flatnonzero(ranks.plan(rank).real):
            read = before[row.rows[token]][-WIDTH:]
            assert inputs[token].tolist() == [-1] * (WIDTH - len(read)) + read
            chunk_place = ranks.plan(rank).chunks.reshape(-1)[ranks.plan(rank).place[token]]
            assert chunk_place == token
        seen += row.rows[ranks.plan(rank).real].tolist()
    assert sorted(seen) == sorted(before)


@settings(deadline=None, max_examples=25)
@given(below=trees(max_nodes=8), root=st.integers(2, 7), stretch=st.sampled_from([1, 40]))
def test_a_row_goes_on_from_a_root_that_an_earlier_row_has_run(
    below: PrefixTree, root: int, stretch: int
) -> None:
    first = np.arange(1000, 1000 + root)
    responses = [np.repeat(below.sequence_tokens(i), stretch) for i in range(below.num_sequences)]
    tree = PrefixTree.from_sequences([np.append(first, r) for r in ([2000, 2001], *responses)])
    layout = pack(tree.as_trie().with_root_of(root), root_elsewhere=True)
    plan = rank_row(layout, recurrence_width=WIDTH).model.recurrence
    kept = np.arange(-root, 0)[1:][1 - WIDTH :]
    places = np.concatenate([np.arange(layout.num_tokens), kept, [layout.num_tokens]])
    inputs = places[plan.inputs]
    for i in range(tree.num_sequences):
        path = [*range(1 - root, 0), *layout.sequence_positions(i).tolist()]
        for n, position in enumerate(path):
            if position >= 0:
                read = path[max(0, n + 1 - WIDTH) : n + 1]
                nothing = [layout.num_tokens] * (WIDTH - len(read))
                assert inputs[position].tolist() == nothing + read
    # Every path begins with the one state that the root leaves behind.
    assert plan.waves[0].before.tolist() == [0] * plan.waves[0].chunks.stop


@settings(deadline=None, max_examples=60)
@given(tree=trees(max_nodes=14), stretch=st.sampled_from([1, 40]))
def test_chunks_are_counted_without_planning_them(tree: PrefixTree, stretch: int) -> None:
    longer = [np.repeat(tree.sequence_tokens(i), stretch) for i in range(tree.num_sequences)]
    layout = pack(PrefixTree.from_sequences(longer))
    lengths = [segment.length for segment in layout.segments]
    assume(lengths)
    plan = recurrence(layout, width=WIDTH)
    assert chunked_tokens(lengths) == plan.chunks.size
    widest = max(wave.chunks.stop - wave.chunks.start for wave in plan.waves)
    assert widest_wave(lengths, [segment.parent for segment in layout.segments]) == widest

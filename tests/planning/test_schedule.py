from __future__ import annotations

import pytest

from megatron_prefix.planning.schedule import pipeline_passes


@pytest.mark.parametrize("num_chunks", [1, 2, 3])
@pytest.mark.parametrize("num_microbatches", [4, 8, 12])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_every_microbatch_goes_through_every_chunk_forward_then_back(
    rank, num_microbatches, num_chunks
):
    passes = list(
        pipeline_passes(rank, num_ranks=4, num_chunks=num_chunks, num_microbatches=num_microbatches)
    )
    forward = [(p.microbatch, p.chunk) for p in passes if p.forward]
    backward = [(p.microbatch, p.chunk) for p in passes if not p.forward]
    everything = {(m, c) for m in range(num_microbatches) for c in range(num_chunks)}
    assert len(forward) == len(backward) == len(everything)
    assert set(forward) == set(backward) == everything
    at = {(p.forward, p.microbatch, p.chunk): i for i, p in enumerate(passes)}
    assert all(at[True, m, c] < at[False, m, c] for m, c in everything)


def test_as_many_are_in_flight_as_stages_follow():
    def most_in_flight(rank: int, num_chunks: int) -> int:
        live = most = 0
        for p in pipeline_passes(rank, num_ranks=4, num_chunks=num_chunks, num_microbatches=16):
            live += 1 if p.forward else -1
            most = max(most, live)
        return most

    assert [most_in_flight(rank, 1) for rank in range(4)] == [4, 3, 2, 1]
    # Interleaved, in chunks: (ranks - rank - 1) * 2 + (chunks - 1) * ranks + 1.
    assert [most_in_flight(rank, 2) for rank in range(4)] == [11, 9, 7, 5]

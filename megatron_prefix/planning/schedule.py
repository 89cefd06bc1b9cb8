"""The order in which a pipeline rank runs its microbatches, as Megatron's schedules do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One microbatch's forward or backward through one model chunk of a rank."""

    chunk: int
    microbatch: int
    forward: bool


def pipeline_passes(
    rank: int, *, num_ranks: int, num_chunks: int, num_microbatches: int
) -> Iterator[Pass]:
    """The passes of a pipeline rank in a training step.

    Without interleaving 1F1B: as many forwards first as there are ranks after this one. With it,
    microbatches go through a chunk in groups of `num_ranks`; the warm-up grows by all but the last
    chunk's group, and by two for every rank after this one (Megatron's
    `get_pp_rank_microbatches`, `get_schedule_table`).

    Args:
        rank: 0 is the first stage.
        num_ranks: pipeline ranks.
        num_chunks: model chunks of a rank, 1 without interleaving.
        num_microbatches: with interleaving a multiple of `num_ranks`.
    """
    order = [
        (microbatch, chunk)
        for start in range(0, num_microbatches, num_ranks)
        for chunk in range(num_chunks)
        for microbatch in range(start, min(start + num_ranks, num_microbatches))
    ]
    if num_chunks == 1:
        warm_up = num_ranks - rank - 1
    else:
        warm_up = (num_ranks - rank - 1) * 2 + (num_chunks - 1) * num_ranks
    warm_up = min(warm_up, len(order))

    def forward(i: int) -> Pass:
        return Pass(microbatch=order[i][0], chunk=order[i][1], forward=True)

    def backward(i: int) -> Pass:
        chunk = num_chunks - 1 - order[i][1]
        return Pass(microbatch=order[i][0], chunk=chunk, forward=False)

    for i in range(warm_up):
        yield forward(i)
    for i in range(warm_up, len(order)):
        yield forward(i)
        yield backward(i - warm_up)
    for i in range(len(order) - warm_up, len(order)):
        yield backward(i)

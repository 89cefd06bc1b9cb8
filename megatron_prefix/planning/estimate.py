"""What a training step would compute, hold and send, from the lengths of its groups.

Microbatches come from `Packing.plan` and places on context-parallel ranks from `shard_layout`,
so the tokens are those of a run. FLOPs are those of `ModelShape`, forward and backward and what is
recomputed; bytes those of `MemoryModel`. Times follow from rates that the caller has measured, and
are a bound: matrix products at that rate, messages at theirs, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_prefix.layout.labels import trained_labels
from megatron_prefix.layout.tree import PrefixTree
from megatron_prefix.planning.activation_memory import (
    kept_at_borders,
    kept_by_layer,
    kept_by_outer,
    kept_of_ranks,
    kept_of_root,
)
from megatron_prefix.planning.backward_memory import largest_transient
from megatron_prefix.planning.parameter_memory import StaticBytes, static_bytes
from megatron_prefix.planning.rows import (
    MicrobatchEstimate,
    RowEstimate,
    StepSetup,
    estimate_microbatch,
    step_flops,
)
from megatron_prefix.planning.schedule import pipeline_passes


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """The peak of one pipeline rank."""

    pipeline_rank: int
    static: StaticBytes
    activations: int
    """Kept for backward, of all microbatches in flight, at the peak."""
    transient: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.static.total + self.activations + self.transient


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """One optimizer step."""

    microbatches: tuple[tuple[MicrobatchEstimate, ...], ...]
    """[data-parallel rank][microbatch]"""
    stages: tuple[RankMemory, ...]
    """[pipeline rank], of the data-parallel rank whose stage needs most."""
    setup: StepSetup

    @property
    def tokens(self) -> int:
        """Of all rows, padding included."""
        return sum(m.tokens for rank in self.microbatches for m in rank)

    @property
    def flops(self) -> int:
        """Of all ranks."""
        return sum(m.flops for rank in self.microbatches for m in rank)

    @property
    def worst(self) -> RankMemory:
        """The pipeline rank with the highest peak."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def context_parallel_bytes(self) -> int:
        """Received in a layer by the busiest rank, in its largest row.

        That is a layer without a sliding window, if there is one, that attends.
        """
        shape = self.setup.memory.shape
        attending = [n for n in range(shape.num_layers) if shape.attends(n)]
        if not attending:
            return 0
        if all(map(shape.is_windowed, attending)):
            return max((row.windows.received_per_layer for row in self._rows), default=0)
        return max((row.received_per_layer for row in self._rows), default=0)

    @property
    def recurrent_bytes(self) -> int:
        """The same in the recurrent layer that receives most; 0: there is none."""
        return max(
            (kind.received_per_layer for row in self._rows for kind in row.recurrent.values()),
            default=0,
        )

    @property
    def num_series(self) -> int:
        """Microbatches that are a series of rows."""
        return sum(m.is_series for rank in self.microbatches for m in rank)

    @property
    def _rows(self) -> Iterator[RowEstimate]:
        return (row for rank in self.microbatches for m in rank for row in m.rows)

    def seconds(self, *, flops_per_second: float, bytes_per_second: float | None) -> float:
        """A bound of the step's time, from a rank's rates.

        The slowest data-parallel rank: the sum over its microbatches of the slowest stage, and the
        pipeline's bubble of (stages - 1) / chunks of them. Messages are taken not to overlap.

        Args:
            flops_per_second: that a rank reaches in this model's matrix products.
            bytes_per_second: that a rank receives from context-parallel ranks; None: free.
        """
        slowest = 0.0
        sizes = self.setup.ranks
        for rank in self.microbatches:
            work = [
                sum(self._stage_seconds(row, flops_per_second, bytes_per_second) for row in m.rows)
                for m in rank
            ]
            bubble = (sizes.pipeline - 1) / sizes.chunks * sum(work) / max(len(work), 1)
            slowest = max(slowest, sum(work) + bubble)
        return slowest

    def _stage_seconds(
        self, m: RowEstimate, flops_per_second: float, bytes_per_second: float | None
    ) -> float:
        """Of the slowest stage: one in between, or the last one with the output layer."""
        setup = self.setup
        stages, tensor = setup.ranks.pipeline, setup.ranks.tensor
        layers = step_flops(
            setup.memory,
            tokens=m.tokens_per_rank,
            pairs=m.pairs_per_rank,
            windowed_pairs=m.windows.pairs_per_rank,
            labels=0,
        )
        last = layers / stages + m.outer_flops / setup.ranks.context
        slowest = max(last, layers / stages) if stages > 1 else last
        seconds = slowest / tensor / flops_per_second
        if bytes_per_second is not None:
            shape = setup.memory.shape
            numbers = range(shape.num_layers + shape.prediction_depths)
            num_windowed = sum(map(shape.is_windowed, numbers))
            others = sum(map(shape.attends, numbers)) - num_windowed
            received = m.received_per_layer * others
            received += m.windows.received_per_layer * num_windowed
            received += sum(
                m.recurrent[layer].received_per_layer
                for layer in shape.recurrent_layers
                if layer is not None
            )
            seconds += received / stages / bytes_per_second
        return seconds


def estimate_step(
    trees: Sequence[PrefixTree],
    setup: StepSetup,
    *,
    first_trained: Sequence[Sequence[int]],
    names: Sequence[str] | None = None,
) -> StepEstimate:
    """Plan the microbatches of one optimizer step and count what they cost.

    Args:
        trees: one for each group.
        setup: how the step is run.
        first_trained: for each group, for each sequence the index of its first trained token.
        names: of the groups, for errors.

    Raises:
        ValueError: a sequence or group over the token budget, naming it.
    """
    packing = setup.packing
    units, first_trained, owners = packing.units(trees, first_trained)
    plan = packing.plan(
        units,
        labels=[trained_labels(t, first) for t, first in zip(units, first_trained, strict=True)],
        names=None if names is None else [names[group] for group in owners],
    )
    microbatches = tuple(
        tuple(
            estimate_microbatch(units, slices, setup, first_trained=first_trained)
            for slices in rank
        )
        for rank in plan.microbatches
    )
    return StepEstimate(
        microbatches=microbatches,
        stages=tuple(
            max(
                (_stage_memory(setup, stage, rank) for rank in microbatches),
                key=lambda memory: memory.total,
            )
            for stage in range(setup.ranks.pipeline)
        ),
        setup=setup,
    )


def _stage_memory(
    setup: StepSetup, stage: int, microbatches: Sequence[MicrobatchEstimate]
) -> RankMemory:
    memory, ranks = setup.memory, setup.ranks
    chunks = [list(layers) for layers in setup.stages[stage]]
    last_stage = stage == ranks.pipeline - 1
    live = 0
    # (kept, transient) at every moment that may be the peak.
    moments: list[tuple[int, int]] = []

    def ends(chunk: int) -> dict[str, bool]:
        return {
            "first": stage == 0 and chunk == 0,
            "last": last_stage and chunk == len(chunks) - 1,
        }

    def kept(chunk: int, m: RowEstimate) -> int:
        layers = sum(
            kept_by_layer(memory, layer, m.tokens_per_rank, m.labels_per_rank, ranks)
            for layer in chunks[chunk]
        )
        return (
            layers
            + kept_by_outer(
                memory, m.tokens_per_rank, m.labels_per_rank, ranks=ranks, **ends(chunk)
            )
            + kept_at_borders(memory, m.tokens_per_rank, ranks, **ends(chunk))
            + kept_of_ranks(
                memory,
                chunks[chunk],
                m.recurrent,
                m.tokens_per_rank,
                m.labels_per_rank,
                ranks,
            )
        )

    def transient(chunk: int, m: RowEstimate, root_tokens: int = 0) -> int:
        return largest_transient(
            memory,
            chunks[chunk],
            m.tokens_per_rank,
            m.labels_per_rank,
            ranks,
            last=ends(chunk)["last"],
            travelling=m.travelling,
            root_tokens=root_tokens,
            halo_tokens=m.windows.travelling,
            window_copies=m.windows.copied,
            recurrent_rows=m.recurrent,
        )

    for step in pipeline_passes(
        stage,
        num_ranks=ranks.pipeline,
        num_chunks=ranks.chunks,
        num_microbatches=len(microbatches),
    ):
        first, *others = microbatches[step.microbatch].rows
        if step.forward:
            live += kept(step.chunk, first)
            continue
        # The root of a series waits while the other rows run, and its backward is the last.
        of_root = 0
        if others:
            of_root = kept_of_root(memory, chunks[step.chunk], first.tokens_per_rank, ranks)
        moments.append((live + of_root, transient(step.chunk, first)))
        for row in others:
            held = live + of_root + kept(step.chunk, row)
            moments.append((held, transient(step.chunk, row, first.tokens_per_rank)))
        live -= kept(step.chunk, first)
    assert live == 0
    layers = [layer for chunk in chunks for layer in chunk]
    activations, on_top = max(moments, key=sum, default=(0, 0))
    return RankMemory(
        pipeline_rank=stage,
        static=static_bytes(memory, layers, ranks, first=stage == 0, last=last_stage),
        activations=activations,
        transient=on_top,
    )

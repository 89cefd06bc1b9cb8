"""What a training step would compute, hold and send, from the lengths of its groups.

Microbatches come from `Packing.plan` and places on context-parallel ranks from `shard_layout`,
so the tokens are those of a run. FLOPs are those of `ModelShape`, forward and backward and what is
recomputed; bytes those of `MemoryModel`. Times follow from rates that the caller has measured, and
are a bound: matrix products at that rate, messages at theirs, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_prefix.layout.cost import attention_pairs, attention_pairs_of, trained_labels
from megatron_prefix.layout.dispatch import shard_layout
from megatron_prefix.layout.memory import MemoryModel, RankSizes, StaticBytes
from megatron_prefix.layout.packing import pack
from megatron_prefix.layout.schedule import pipeline_passes
from megatron_prefix.layout.shard_stages import RankStages
from megatron_prefix.layout.step_packing import Packing
from megatron_prefix.layout.tree import PrefixTree

CommType = Literal["all_gather", "p2p", "a2a"]


@dataclass(frozen=True, kw_only=True)
class StepSetup:
    """How a step is run."""

    memory: MemoryModel
    ranks: RankSizes
    stages: Sequence[Sequence[Sequence[int]]]
    """[pipeline rank][chunk] the layers."""
    packing: Packing
    """For the data-parallel size and the multiples of `ranks`."""
    comm_type: CommType = "all_gather"


@dataclass(frozen=True, kw_only=True)
class MicrobatchEstimate:
    """One packed row. Per-rank numbers are those of the context-parallel rank with most."""

    tokens: int
    """Of the whole row, padding included."""
    tokens_per_rank: int
    labels_per_rank: int
    pairs_per_rank: int
    travelling: int
    """Tokens whose keys and values a rank receives."""
    flops: int
    """Of the whole row, forward, backward and recompute."""
    outer_flops: int
    """Of the output layer, less what a trimmed last layer saves."""
    received_per_layer: int
    """Bytes that the busiest context-parallel rank receives in a layer, forward and backward."""


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
        """Received in a layer by the busiest rank, in its largest microbatch."""
        return max((m.received_per_layer for rank in self.microbatches for m in rank), default=0)

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
            work = [self._stage_seconds(m, flops_per_second, bytes_per_second) for m in rank]
            bubble = (sizes.pipeline - 1) / sizes.chunks * sum(work) / max(len(work), 1)
            slowest = max(slowest, sum(work) + bubble)
        return slowest

    def _stage_seconds(
        self, m: MicrobatchEstimate, flops_per_second: float, bytes_per_second: float | None
    ) -> float:
        """Of the slowest stage: one in between, or the last one with the output layer."""
        setup = self.setup
        stages, tensor = setup.ranks.pipeline, setup.ranks.tensor
        layers = step_flops(
            setup.memory, tokens=m.tokens_per_rank, pairs=m.pairs_per_rank, labels=0
        )
        last = layers / stages + m.outer_flops / setup.ranks.context
        slowest = max(last, layers / stages) if stages > 1 else last
        seconds = slowest / tensor / flops_per_second
        if bytes_per_second is not None:
            num_layers = setup.memory.shape.num_layers / stages
            seconds += m.received_per_layer * num_layers / bytes_per_second
        return seconds


def step_flops(
    memory: MemoryModel,
    *,
    tokens: int,
    pairs: int,
    labels: int,
    trimmed_tokens: int = 0,
    trimmed_pairs: int = 0,
) -> int:
    """Forward, backward (twice the forward), and what is computed again for it.

    Args:
        memory: the model, and what it computes again.
        tokens, pairs, labels: as of `ModelShape.flops`.
        trimmed_tokens, trimmed_pairs: that the last layer has no queries for.
    """
    shape, again = memory.shape, memory.recompute
    linear = tokens * shape.linear_flops_per_token()
    linear -= shape.last_layer_flops(tokens=trimmed_tokens, pairs=0)
    attention = pairs * shape.attention_flops_per_pair()
    attention -= shape.last_layer_flops(tokens=0, pairs=trimmed_pairs)
    head = labels * shape.head_flops_per_label()
    total = 3 * (linear + attention) + 4 * head  # the head's logits are made again in backward
    return total + {"none": 0, "selective": attention, "full": linear + attention}[again]


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
            _microbatch(
                packing.microbatch(units, slices),
                [first_trained[s.group][i] for s in slices for i in s.sequences],
                setup,
            )
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


def _microbatch(
    tree: PrefixTree, first_trained: Sequence[int], setup: StepSetup
) -> MicrobatchEstimate:
    ranks, memory = setup.ranks, setup.memory
    layout = pack(tree, pad_to_multiple=setup.packing.pad_to_multiple)
    labelled = np.zeros(layout.num_tokens, dtype=bool)
    for i, first in enumerate(first_trained):
        labelled[layout.sequence_positions(i)[first - 1 :]] = True
    pairs, labels = int(attention_pairs(tree).sum()), int(labelled.sum())
    untrained = tree.packed_lengths - trained_labels(tree, first_trained)
    trimmed = {
        "trimmed_tokens": int(untrained.sum()),
        "trimmed_pairs": int(attention_pairs_of(untrained, tree.first_positions).sum()),
    }
    if not memory.trim_last_layer:
        trimmed = {}
    labels_per_rank, pairs_per_rank, travelling, received = labels, pairs, 0, 0
    if ranks.context > 1:
        shards = shard_layout(layout, ranks.context)
        rows = [RankStages(shards, rank).rows() for rank in range(ranks.context)]
        labels_per_rank = max(int(labelled[r[r >= 0]].sum()) for r in rows)
        pairs_per_rank = int(shards.attention_pairs.max())
        travelling = int(shards.shard_tokens.sum() - shards.shard_tokens.min())
        received = _received_per_layer(setup, shards.tokens_per_rank, shards.shard_tokens.tolist())
        if setup.comm_type == "a2a":
            travelling = 0
    return MicrobatchEstimate(
        tokens=layout.num_tokens,
        tokens_per_rank=layout.num_tokens // ranks.context,
        labels_per_rank=labels_per_rank,
        pairs_per_rank=pairs_per_rank,
        travelling=travelling,
        flops=step_flops(memory, tokens=tree.grouped_tokens, pairs=pairs, labels=labels, **trimmed),
        outer_flops=step_flops(memory, tokens=0, pairs=0, labels=labels, **trimmed),
        received_per_layer=received,
    )


def _received_per_layer(setup: StepSetup, tokens_per_rank: int, shard_tokens: list[int]) -> int:
    """Bytes, forward and backward, that the rank that receives most receives in a layer."""
    memory, size = setup.memory, setup.ranks.context
    shape, b, wide = memory.shape, memory.element, memory.wide
    key_width = 2 * shape.num_query_groups * shape.kv_channels // setup.ranks.tensor
    if setup.comm_type == "a2a":
        query_width = shape.num_attention_heads * shape.kv_channels // setup.ranks.tensor
        once = tokens_per_rank * (2 * query_width + key_width) * (size - 1) // size * b
        return 2 * once
    # Keys and values in forward and again in backward, then the gradients of the rank's own from
    # every other rank.
    return max(
        2 * (sum(shard_tokens) - own) * key_width * b + (size - 1) * own * key_width * wide
        for own in shard_tokens
    )


def _stage_memory(
    setup: StepSetup, stage: int, microbatches: Sequence[MicrobatchEstimate]
) -> RankMemory:
    memory, ranks = setup.memory, setup.ranks
    chunks = [list(layers) for layers in setup.stages[stage]]
    last_stage = stage == ranks.pipeline - 1
    live = peak = peak_live = 0

    def ends(chunk: int) -> dict[str, bool]:
        return {
            "first": stage == 0 and chunk == 0,
            "last": last_stage and chunk == len(chunks) - 1,
        }

    def kept(chunk: int, m: MicrobatchEstimate) -> int:
        layers = sum(
            memory.kept_by_layer(layer, m.tokens_per_rank, m.labels_per_rank, ranks)
            for layer in chunks[chunk]
        )
        return (
            layers
            + memory.kept_by_outer(m.tokens_per_rank, m.labels_per_rank, ranks=ranks, **ends(chunk))
            + memory.kept_at_borders(m.tokens_per_rank, ranks, **ends(chunk))
        )

    for step in pipeline_passes(
        stage,
        num_ranks=ranks.pipeline,
        num_chunks=ranks.chunks,
        num_microbatches=len(microbatches),
    ):
        m = microbatches[step.microbatch]
        if step.forward:
            live += kept(step.chunk, m)
            continue
        transient = memory.transient(
            chunks[step.chunk],
            m.tokens_per_rank,
            m.labels_per_rank,
            ranks,
            last=ends(step.chunk)["last"],
            travelling=m.travelling,
        )
        if live + transient > peak:
            peak, peak_live = live + transient, live
        live -= kept(step.chunk, m)
    assert live == 0
    layers = [layer for chunk in chunks for layer in chunk]
    return RankMemory(
        pipeline_rank=stage,
        static=memory.static(layers, ranks, first=stage == 0, last=last_stage),
        activations=peak_live,
        transient=peak - peak_live,
    )

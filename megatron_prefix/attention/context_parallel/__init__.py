"""Exact attention with shared prefixes over a row that is distributed over ranks.

Every kind of communication (see `comm_types`) computes the same stages, merged by log-sum-exp as on
one rank: `gathered` is all_gather, `ring` p2p, `heads` a2a. The first two move keys and values of
the shards only: in forward while the rank's own segments attend to themselves, and in backward
again, so that none are kept.

Shapes of this folder: C tokens of this rank's row, of which the first n are its shard; N of them
attend (all, but for a trimmed last layer); T of all ranks' rows. H query heads, Hk key/value heads,
D head size.
"""

from megatron_prefix.attention.context_parallel.attend import attend_across_ranks

__all__ = ["attend_across_ranks"]

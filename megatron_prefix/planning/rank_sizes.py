"""Over how many ranks a run divides what it holds and computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RankSizes:
    """Over how many ranks what is divided."""

    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1
    """Model chunks of a pipeline rank, more than 1 under interleaving."""
    context: int = 1
    data: int = 1
    expert: int = 1
    expert_tensor: int = 1
    """Tensor-parallel ranks of one expert."""
    sequence_parallel: bool = False
    distributed_optimizer: bool = True

    @property
    def world(self) -> int:
        """All ranks."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def sequence(self) -> int:
        """Tensor-parallel ranks that the row is divided over between the matrix products."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def dense_replicas(self) -> int:
        """Ranks with equal dense parameters."""
        return self.data * self.context

    @property
    def expert_replicas(self) -> int:
        """Ranks with equal experts."""
        return self.world // (self.pipeline * self.expert * self.expert_tensor)

"""The `parallel` section: how the model is laid out over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_prefix.config.bounds import below, refuse
from megatron_prefix.config.loader import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is laid out over ranks.

    The data-parallel size is the number of processes divided by tensor- x pipeline- x
    context-parallel size.
    """

    tensor_model_parallel_size: int = 1
    """Ranks that share every layer."""
    pipeline_model_parallel_size: int = 1
    """Ranks that the layers are divided over."""
    context_parallel_size: int = 1
    """Ranks that a packed row is distributed over. `model.transformer.cp_comm_type` says how they
    communicate."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks of each pipeline rank (interleaved schedule); null: one chunk."""
    expert_model_parallel_size: int = 1
    """Ranks that the experts of a layer are spread over."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that each expert is split over; null: 1 with expert parallelism, the tensor-parallel
    size without."""
    sequence_parallel: bool | None = None
    """The row is sharded over tensor-parallel ranks between layers; null: true if there are any."""

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        yield from below(
            self,
            1,
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
        )
        chunks = self.virtual_pipeline_model_parallel_size
        if chunks is not None and chunks < 1:
            yield (f"virtual_pipeline_model_parallel_size: {chunks} must be at least 1, or null")
        split = self.expert_tensor_parallel_size
        if split is not None and split < 1:
            yield f"expert_tensor_parallel_size: {split} must be at least 1, or null"
        tensor = self.tensor_model_parallel_size
        if split not in (None, tensor) and self.expert_model_parallel_size == 1:
            # It takes their parameters for a dense layer's: ranks are missing from their sums.
            yield (
                f"expert_tensor_parallel_size: {split} with tensor_model_parallel_size: {tensor} "
                "and expert_model_parallel_size: 1 gives wrong gradients in Megatron-Core; set it "
                "to null, or spread the experts (expert_model_parallel_size)"
            )
        if self.num_model_chunks > 1 and self.pipeline_model_parallel_size == 1:
            yield (
                f"virtual_pipeline_model_parallel_size: {chunks} needs "
                "pipeline_model_parallel_size of at least 2; set it, or set this to null"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            yield (
                "sequence_parallel: true needs tensor_model_parallel_size of at least 2; set it, "
                "or set this to null"
            )

    @property
    def num_model_chunks(self) -> int:
        """Model chunks per pipeline rank, 1 without interleaving."""
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def expert_split(self) -> int:
        """`expert_tensor_parallel_size`, resolved."""
        if self.expert_tensor_parallel_size is not None:
            return self.expert_tensor_parallel_size
        return 1 if self.expert_model_parallel_size > 1 else self.tensor_model_parallel_size

    @property
    def uses_sequence_parallel(self) -> bool:
        """`sequence_parallel`, resolved."""
        if self.sequence_parallel is None:
            return self.tensor_model_parallel_size > 1
        return self.sequence_parallel

    @property
    def pad_to_multiple(self) -> int:
        """What the length of a packed row must be a multiple of."""
        tensor = self.tensor_model_parallel_size if self.uses_sequence_parallel else 1
        return self.context_parallel_size * tensor

    @property
    def microbatch_multiple(self) -> int:
        """What the number of microbatches must be a multiple of: the interleaved schedule's."""
        return self.pipeline_model_parallel_size if self.num_model_chunks > 1 else 1

    @property
    def model_parallel_size(self) -> int:
        """Ranks that work on one packed row: tensor, pipeline and context parallel."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    def data_parallel_size(self, world_size: int) -> int:
        """Packed rows that run side by side in a world of `world_size` ranks."""
        if world_size % self.model_parallel_size:
            sizes = "tensor_model_parallel_size x pipeline_model_parallel_size"
            if self.context_parallel_size > 1:
                sizes += " x context_parallel_size"
            processes = "process does" if world_size == 1 else "processes do"
            raise ConfigError(
                f"parallel: {world_size} {processes} not divide by {sizes} = "
                f"{self.model_parallel_size}; start a multiple of it: torchrun --nproc-per-node "
                f"{self.model_parallel_size} -m megatron_prefix.training ..."
            )
        experts, split = self.expert_model_parallel_size, self.expert_tensor_parallel_size or 1
        ranks_of_stage = world_size // self.pipeline_model_parallel_size
        if ranks_of_stage % (experts * split):
            sizes = f"expert_model_parallel_size: {experts}"
            if split > 1:
                sizes += f" x expert_tensor_parallel_size: {split}"
            raise ConfigError(
                f"parallel.{sizes} does not divide the {ranks_of_stage} ranks of a pipeline stage"
            )
        return world_size // self.model_parallel_size

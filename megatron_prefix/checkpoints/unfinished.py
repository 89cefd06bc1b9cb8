"""A checkpoint while it is written: all ranks begin, and all complete it or clear it away."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_prefix.checkpoints import files
from megatron_prefix.checkpoints.writer import CheckpointWriter
from megatron_prefix.distributed.rank_results import raise_together
from megatron_prefix.megatron.saving import begin_save
from megatron_prefix.packages import needed_by
from megatron_prefix.system_errors import system_error


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnfinishedCheckpoint:
    """A checkpoint that is being written. Every method is collective over all ranks."""

    path: Path
    partial: Path
    """Where it is until it is complete."""
    writer: CheckpointWriter
    state: dict[str, Any]
    """Of the trainer."""

    @classmethod
    def begin(
        cls, path: Path, contents: dict[str, Any], state: dict[str, Any], *, writer: str
    ) -> UnfinishedCheckpoint:
        """Begin to write.

        Args:
            path: of the complete checkpoint.
            contents: sharded tensors and objects.
            state: the trainer's own state, as plain JSON values.
            writer: `mcore` or `nvrx`.

        Raises:
            ValueError: it cannot be written.
        """
        _require_psutil()
        partials: list[Path | None] = [None]
        with raise_together(name_rank=False):
            if dist.get_rank() == 0:
                try:
                    files.remove_partial(path.parent)
                    partials[0] = files.begin(path)
                except OSError as error:
                    raise _not_written(path, error) from error
        dist.broadcast_object_list(partials, src=0)
        partial = partials[0]
        assert partial is not None
        with _failing_alone(path, partial):
            save = begin_save(contents, partial, writer=writer)
        return cls(path=path, partial=partial, writer=CheckpointWriter(save), state=state)

    def is_writing(self) -> bool:
        """Whether any rank still writes its part."""
        return _on_any_rank(self.writer.is_writing)

    def finalize(self) -> None:
        """Write what describes the parts, which all ranks have written.

        Raises:
            ValueError: it could not be written, and is cleared away.
        """
        with self.failing_together():
            if self.writer.failure is not None:
                raise ValueError(self.writer.failure)
        error = None
        try:
            with _failing_alone(self.path, self.partial):
                self.writer.finalize()
        except CheckpointException as caught:
            error = caught
        with self.failing_together():
            if error is not None and error.failures:
                raise ValueError("; ".join(sorted({str(e) for e, _ in error.failures.values()})))

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Raise what fails on one rank on all of them, and clear away what was written."""
        try:
            with raise_together(name_rank=False):
                try:
                    yield
                except (ValueError, OSError) as error:
                    raise _not_written(self.path, error) from error
        except ValueError:
            if dist.get_rank() == 0:
                files.remove_partial(self.path.parent)
            raise


@contextmanager
def _failing_alone(path: Path, partial: Path) -> Iterator[None]:
    """Where rank 0 writes and the others wait for it, say what it could not write.

    Raises:
        ValueError: on rank 0, which has to end then: the others wait until it has.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if dist.get_rank() != 0:
            raise
        reason = system_error(error) or files.write_problem(partial)
        if reason is None:
            raise
        files.remove_partial(path.parent)
        raise _not_written(path, reason) from error


def _not_written(path: Path, reason: Exception) -> ValueError:
    return ValueError(
        f"{path}: could not be written: {reason}; the checkpoints before it are as they were"
    )


def _on_any_rank(condition: bool) -> bool:
    flag = torch.tensor([int(condition)], device=torch.cuda.current_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def _require_psutil() -> None:
    # Megatron's writer imports it in a child process, and would wait for it for ever.
    with needed_by("writing a checkpoint", extra="train"):
        import psutil  # noqa: F401

"""What a file of tasks says; NumPy is not needed, so that a wrong file is answered at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prefix.config.bounds import below, refuse
from megatron_prefix.config.loader import ConfigError, load_yaml

EXTRA = "reasoning-gym"


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What a file of tasks says."""

    task: str
    """Name of a data set of reasoning-gym."""
    seed: int = 0
    """reasoning-gym makes task i of the seed + i: two files have different tasks where the ranges
    from seed to seed + size do not meet."""
    size: int = 1000
    """Number of tasks."""
    config: dict[str, Any] = field(default_factory=dict)
    """Other options of the data set."""
    unlike: tuple[Path, ...] = ()
    """Files of tasks, beside this one, whose questions it must not ask: a task with the same text
    as one of theirs is left out, and another one made in its place."""

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        yield from below(self, 0, "seed")
        yield from below(self, 1, "size")
        for name in ("seed", "size"):
            if name in self.config:
                yield f"config.{name}: give it as {name}, beside config"

    def meets(self, other: TaskSpec) -> bool:
        """Whether some task is made of the same seed in both."""
        of_one_kind = self.task == other.task and self.config == other.config
        return of_one_kind and (
            self.seed < other.seed + other.size and other.seed < self.seed + self.size
        )


def read_task_spec(path: Path) -> TaskSpec:
    """What a file of tasks says.

    Raises:
        ValueError: the file is not such a file, naming it and the key.
    """
    try:
        return load_yaml(path, TaskSpec)
    except ConfigError as error:
        raise ValueError("\n".join(f"{path}: {fault}" for fault in error.faults)) from error

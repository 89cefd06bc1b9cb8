"""The `evaluation` section."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_prefix.config.bounds import below, refuse
from megatron_prefix.config.paths import all_files


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Sampling on prompts that are never trained on."""

    paths: tuple[Path, ...] | dict[str, tuple[Path, ...]]
    """JSONL or Parquet files of prompts with answers; `data/*.jsonl` is all files of that name.
    Several data sets are a mapping of their names to their files; each is reported by itself, too.
    """
    num_prompts: int
    """Number of prompts, from the beginning of the files; with several data sets, of each."""
    responses_per_prompt: int = 1
    """Responses to each prompt. With more than 1, pass@k is reported: the chance that of k
    responses at least one is right, which is one with a reward of at least 1. It needs a
    temperature above 0. Not with `rollouts.agent`."""
    every: int = 0
    """Steps between evaluations; 0: before the first and after the last step only."""
    temperature: float = 0.0
    """Temperature of sampling; 0 takes the most likely token."""

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        none = "none given; name at least one JSONL or Parquet file"
        if not self.paths:
            yield f"paths: {none}"
        if isinstance(self.paths, dict) and "" in self.paths:
            yield "paths: a data set has an empty name; give it one"
        for name, paths in self.data_sets.items():
            if self.paths and not paths:
                yield f"paths.{name}: {none}"
        yield from below(self, 1, "num_prompts", "responses_per_prompt")
        yield from below(self, 0, "every", "temperature")
        if self.responses_per_prompt > 1 and self.temperature == 0:
            yield (
                f"responses_per_prompt: {self.responses_per_prompt} with temperature: 0, which "
                "makes them all the same; set a temperature, such as 1.0"
            )

    @property
    def data_sets(self) -> dict[str, tuple[Path, ...]]:
        """The files by the name of their data set, which is empty where there is only one."""
        given = self.paths if isinstance(self.paths, dict) else {"": self.paths}
        return {name: all_files(paths) for name, paths in given.items()}

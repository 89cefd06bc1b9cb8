"""The `rollouts` and `evaluation` sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_prefix.config.bounds import at_least
from megatron_prefix.config.loader import ConfigError
from megatron_prefix.config.server import ServerConfig, WeightsConfig
from megatron_prefix.config.text import RewardProcessConfig, TextConfig


@dataclass(frozen=True, kw_only=True)
class RolloutsConfig:
    """Where groups of responses come from."""

    engine: Literal["file", "embedded", "openai", "hf"] = "file"
    """`file` reads finished rollouts; `embedded` samples from the model being trained, `openai`
    asks a completions server, `hf` generates with Hugging Face transformers in this process."""
    paths: tuple[Path, ...] = ()
    """JSONL or Parquet: rollouts for `file`, prompts (prompt, answer) for the others."""
    groups_per_step: int = 8
    group_size: int | None = None
    """Responses per prompt; checked by `file` where given, required by the others."""
    reward: str | None = None
    """A registered reward or module:function, where records carry an answer and no rewards."""
    reward_process: RewardProcessConfig = field(default_factory=RewardProcessConfig)
    """Where a module:function runs."""
    epochs: int | None = None
    """How often the files may be gone through; null: without end."""
    max_response_length: int | None = None
    """Tokens to sample at most; required by every engine but `file`."""
    temperature: float = 1.0
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    """A response ends with the first of these, which it keeps; none with `text` means the
    tokenizer's end of sequence."""
    text: TextConfig | None = None
    """Prompts, responses and rewards as text; null: all of them are token ids."""
    server: ServerConfig | None = None
    """Required by `openai`."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """How trained weights get to `openai` and `hf`."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ConfigError("paths: none given; name at least one JSONL or Parquet file")
        at_least(self, 1, "groups_per_step", "group_size", "epochs", "max_response_length")
        if self.engine != "file":
            for name in ("group_size", "max_response_length", "reward"):
                if getattr(self, name) is None:
                    raise ConfigError(f"{name}: required by engine: {self.engine}")
        self._check_server()
        if not self.temperature > 0:
            raise ConfigError(f"temperature: {self.temperature} must be above 0")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: {self.top_p} must be in (0, 1]")

    def _check_server(self) -> None:
        server = self.server
        if (self.engine == "openai") != (server is not None):
            raise ConfigError(
                f"server: {'missing' if server is None else 'set'}, with engine: {self.engine}; "
                "it belongs to engine: openai, and only there"
            )
        if server is None:
            return
        if self.text is None and server.kind in ("transformers", "openai"):
            raise ConfigError(
                f"text: required by server.kind: {server.kind}, which may answer in text only; "
                "set text.tokenizer"
            )
        if server.prefetch and self.weights.max_staleness < 1:
            raise ConfigError(
                "server.prefetch: makes groups a version old, more than weights.max_staleness: "
                f"{self.weights.max_staleness} allows; raise it, or set prefetch: false"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Sampling on prompts that are never trained on."""

    paths: tuple[Path, ...]
    """Prompts (prompt, answer) as JSONL or Parquet."""
    num_prompts: int
    """The first so many prompts of the files."""
    every: int = 0
    """Steps between evaluations; 0: only before the first and after the last step."""
    temperature: float = 0.0
    """0 takes the most likely token."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ConfigError("paths: none given; name at least one JSONL or Parquet file")
        at_least(self, 1, "num_prompts")
        at_least(self, 0, "every", "temperature")

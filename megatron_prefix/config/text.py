"""The parts of the `rollouts` section about text and rewards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_prefix.config.bounds import below, refuse
from megatron_prefix.config.loader import ConfigError


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Prompts and responses as text: the tokenizer, and how records become prompts."""

    tokenizer: Path
    """A folder with a Hugging Face tokenizer, or a name in its cache."""
    prompt_template: str | None = None
    """Text of the prompt with the record's fields in braces: `"Q: {question}\\nA:"`; null: the
    record's `prompt` (text or token ids) or `messages`."""
    chat: bool = False
    """A text prompt becomes a user's message in the tokenizer's chat template. `messages` go
    through the template in any case."""
    system: str | None = None
    """System message in front of a chat that has no system message."""
    answer_field: str = "answer"
    """Field of the record that the reward compares with."""
    shuffle: bool = True
    """Prompts come in another order each epoch, which depends on `training.seed`."""

    def __post_init__(self) -> None:
        if self.system is not None and not self.chat:
            raise ConfigError("system: needs chat: true; set it, or leave system out")


@dataclass(frozen=True, kw_only=True)
class RewardProcessConfig:
    """The processes that a reward function of your own (`module:function`), `math`, `code` and
    `reasoning_gym` run in."""

    processes: int = 2
    """Processes at most, on each rank that computes rewards; they start when they are needed."""
    timeout_s: float = 10.0
    """Seconds of a call at most; a longer call is ended, with its process."""
    on_failure: float | None = None
    """Reward of a response whose call raised, crashed or took too long; null: the run ends with an
    error that names the record, but with `math`, `code` and `reasoning_gym` what crashed or took
    too long counts as 0."""

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        yield from below(self, 1, "processes")
        if not self.timeout_s > 0:
            yield f"timeout_s: {self.timeout_s} must be above 0"

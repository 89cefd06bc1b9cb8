"""The parts of the `rollouts` section about text and rewards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_prefix.config.bounds import at_least
from megatron_prefix.config.loader import ConfigError


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Prompts and responses as text: the tokenizer, and how records become prompts."""

    tokenizer: Path
    """A folder with a Hugging Face tokenizer, or a name in its cache."""
    prompt_template: str | None = None
    """Text of the prompt with the record's fields in braces: "Q: {question}\\nA:"; null takes the
    record's `prompt` (text or token ids) or `messages`."""
    chat: bool = False
    """Send a text prompt as a user's message through the tokenizer's chat template. `messages`
    always go through it."""
    system: str | None = None
    """System message in front of a chat that has none."""
    answer_field: str = "answer"
    """The record's field that the reward compares with."""
    shuffle: bool = True
    """Go through the prompts in another order each epoch, which depends on training.seed."""

    def __post_init__(self) -> None:
        if self.system is not None and not self.chat:
            raise ConfigError("system: needs chat: true; set it, or leave system out")


@dataclass(frozen=True, kw_only=True)
class RewardProcessConfig:
    """Where a reward of yours (module:function) runs: in processes of its own."""

    processes: int = 2
    """At most so many on each rank that computes rewards; started when first needed."""
    timeout_s: float = 10.0
    """A call that takes longer is ended, with its process."""
    on_failure: float | None = None
    """Reward of a response whose call raised, crashed or took too long; null ends the run with an
    error that names the record."""

    def __post_init__(self) -> None:
        at_least(self, 1, "processes")
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s: {self.timeout_s} must be above 0")

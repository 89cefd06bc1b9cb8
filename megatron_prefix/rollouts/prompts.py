"""Prompts of token ids, read like rollouts: JSON Lines or Parquet, one prompt per record.

    {"prompt": [5, 7], "answer": [1, 2]}

What the answer is, is between the data and the reward function. Responses are passed over, so that
a file of rollouts is a file of prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from typing import Any, Protocol

from megatron_prefix.rollouts.engine import EndOfRollouts
from megatron_prefix.rollouts.parsing import (
    check_names_of_prompt,
    other_fields,
    read_prompt,
    read_tokens,
)
from megatron_prefix.rollouts.record import FilePosition, Record
from megatron_prefix.rollouts.stream import HasPosition, RecordStream
from megatron_prefix.rollouts.text.messages import Message
from megatron_prefix.rollouts.usable import UnusableRecord, Usable
from megatron_prefix.rollouts.validation import TOO_LONG, check_vocabulary


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt."""

    tokens: tuple[int, ...]
    answer: Any
    """What a reward function compares with; None if the record has none."""
    source: str
    """Where it stands, as errors name it: "file.jsonl:17"."""
    messages: tuple[Message, ...] = ()
    """Of a chat, what its tokens were made of."""
    tools: Any = None
    """Of a chat, what the template was told of tools."""
    template_options: Any = None
    """Of a chat, other variables of the template."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of its record, for a reward function."""


class PromptSource(HasPosition, Protocol):
    """Gives an engine its prompts, in an order that can be continued."""

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts.

        Raises:
            EndOfRollouts: fewer are left in the last epoch.
            ValueError: a record that is wrong; nothing is taken then.
        """
        ...

    def close(self) -> None:
        """Close what is open; a later `take` opens it again."""
        ...


def prompt_stream(
    paths: Sequence[str | PathLike[str]],
    *,
    vocab_size: int,
    max_prompt_length: int,
    epochs: int | None = None,
    usable: Usable | None = None,
) -> RecordStream[Prompt]:
    """The prompts of files, in their order.

    Args:
        paths: .jsonl, .jsonl.gz and .parquet files.
        vocab_size: token ids lie in [0, vocab_size).
        max_prompt_length: tokens that leave room for a response.
        epochs: how often to go through the files; None is without end.
        usable: what becomes of prompts that are too long; None: they are errors.

    Raises:
        ValueError: at once for what is wrong with the names; while reading for a wrong record,
            naming its file, line or row, and field.
    """

    usable = usable or Usable()

    def read(records: Iterator[Record]) -> Iterator[tuple[Prompt, FilePosition]]:
        for record in records:
            check_names_of_prompt(record)
            prompt = Prompt(
                tokens=tuple(read_prompt(record).tolist()),
                answer=record.values.get("answer"),
                source=record.source,
                record=other_fields(record.values),
            )
            if usable.made(partial(check_prompt, prompt, vocab_size, max_prompt_length)):
                yield prompt, record.end

    return RecordStream(paths, read, epochs=epochs)


def check_prompt(prompt: Prompt, vocab_size: int, max_prompt_length: int) -> Prompt:
    """The prompt, if a model can answer it.

    Raises:
        UnusableRecord: it is too long.
        ValueError: it is empty, or has what is no token of the vocabulary.
    """
    where = f"{prompt.source}: prompt"
    check_vocabulary(where, read_tokens(prompt.tokens, where), vocab_size)
    if len(prompt.tokens) > max_prompt_length:
        raise UnusableRecord(
            f"{where}: its {len(prompt.tokens)} tokens leave too little of the "
            f"model's max_sequence_length for a response; at most {max_prompt_length} tokens do "
            "(max_sequence_length less max_response_length); shorten it",
            TOO_LONG,
        )
    return prompt


def take_first(source: PromptSource, count: int, *, names: str) -> list[Prompt]:
    """The first `count` prompts of a source, which is closed.

    Raises:
        ValueError: there are fewer, or a wrong one among them; `names` says which files these are.
    """
    try:
        return source.take(count)
    except EndOfRollouts as end:
        raise ValueError(f"{names}: fewer than the {count} prompts that were asked for") from end
    finally:
        source.close()

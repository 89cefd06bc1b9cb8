"""Prompts from records of text, in a shuffled order that can be continued.

The files are read once, into a table of the `datasets` library: memory-mapped, so that files larger
than memory work, cached between runs, and open to access in any order. A record becomes a prompt
when its turn comes.

    {"prompt": "2 + 2 =", "answer": "4"}
    {"messages": [{"role": "user", "content": "What is 2 + 2?"}], "answer": "4"}
    {"question": "What is 2 + 2?", "answer": "4"}         with text.prompt_template
    {"prompt": [5, 7], "answer": [1, 2]}                  token ids go through as they are
"""

from __future__ import annotations

import dataclasses
import json
import re
import reprlib
import string
import sys
from collections.abc import Iterator, Sequence
from decimal import Decimal
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.config import TextConfig
from megatron_prefix.packages import needed_by
from megatron_prefix.rollouts.engine import EndOfRollouts
from megatron_prefix.rollouts.parsing import check_names_of_prompt, other_fields
from megatron_prefix.rollouts.prompts import Prompt, check_prompt
from megatron_prefix.rollouts.record import START, Record, value_at
from megatron_prefix.rollouts.record_files import identity_of, open_record_file, stamp_of
from megatron_prefix.rollouts.stream import opened
from megatron_prefix.rollouts.text.dialogue import check_special_tokens, check_tools_are_written
from megatron_prefix.rollouts.text.messages import (
    SAMPLED_KEYS,
    Message,
    checked_messages,
    without_nulls,
    writable,
)
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
from megatron_prefix.rollouts.usable import Usable

_MEDIA = ("images", "videos", "audios")


class TextPrompts:
    """A `PromptSource` of records of text."""

    def __init__(
        self,
        paths: Sequence[str | PathLike[str]],
        tokenizer: TextTokenizer,
        text: TextConfig,
        *,
        vocab_size: int,
        max_prompt_length: int,
        shuffle: bool,
        seed: int,
        epochs: int | None = None,
        usable: Usable | None = None,
    ) -> None:
        """Check the files' names; nothing is read yet.

        Args:
            paths: .jsonl, .jsonl.gz and .parquet files.
            tokenizer: makes tokens of text.
            text: how records become prompts.
            vocab_size: token ids lie in [0, vocab_size).
            max_prompt_length: tokens that leave room for a response.
            shuffle: another order each epoch, depending on `seed` and the epoch alone.
            seed: of the order.
            epochs: how often to go through the files; None is without end.
            usable: what becomes of prompts that are too long; None: they are errors.

        Raises:
            ValueError: no paths, a file that is not there or of unknown format, or epochs below 1.
        """
        self._paths = [file.path for file in opened(paths, epochs, files_of="prompts")]
        self._identities = [identity_of(path) for path in self._paths]
        self._usable = usable or Usable()
        self._tokenizer = tokenizer
        self._text = text
        self._vocab_size = vocab_size
        self._max_prompt_length = max_prompt_length
        self._seed = seed if shuffle else None
        self._epochs = epochs
        self._epoch = 0
        self._index = 0
        self._table: Any = None
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def read_fields(self) -> set[str]:
        """Fields that make prompts, beside those of every record."""
        template = self._text.prompt_template or ""
        names = {name for _, name, _, _ in string.Formatter().parse(template) if name}
        names |= {self._text.answer_field, "tools", "chat_template_kwargs"}
        return {re.split(r"[.\[]", name)[0] for name in names}

    @property
    def epoch(self) -> int:
        """Times that all files have been gone through."""
        return self._epoch

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts; they may reach over the end of an epoch.

        Raises:
            EndOfRollouts: fewer are left in the last epoch.
            ValueError: a record that is wrong, naming the file, the line or row, and the field.
        """
        self._read()
        epoch, index = self._epoch, self._index
        prompts: list[Prompt] = []
        while len(prompts) < count:
            if index == len(self._table):
                epoch, index = epoch + 1, 0
            if epoch == self._epochs:
                raise EndOfRollouts(
                    f"the prompts have been gone through (epochs={self._epochs}): {len(prompts)} "
                    f"are left, {count} were asked for"
                )
            prompt = self._at(int(self._order_of(epoch)[index]))
            if prompt is not None:
                prompts.append(prompt)
            index += 1
        self._epoch, self._index = epoch, index
        return prompts

    def each(self) -> Iterator[Prompt]:
        """All prompts once, in the order of the files; the position stays.

        Raises:
            ValueError: a record that is wrong.
        """
        self._read()
        found = (self._at(index) for index in range(len(self._table)))
        return (prompt for prompt in found if prompt is not None)

    def _read(self) -> None:
        if self._table is None:
            self._table = _read_table(self._paths)

    def _at(self, index: int) -> Prompt | None:
        """The prompt of a row; None where it is left out."""
        row = self._table[index]
        values = json.loads(row["record"])
        return self._usable.made(lambda: self._prompt(values, row["source"]))

    def state_dict(self) -> dict[str, Any]:
        """The position and the files and order that it is a position in, as plain values."""
        return {
            "epoch": self._epoch,
            "index": self._index,
            "shuffle_seed": self._seed,
            "files": [list(identity) for identity in self._identities],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: the files or the seed of the order are not those of `state`.
        """
        if [list(identity) for identity in state["files"]] != self._identities:
            raise ValueError(
                f"the files of prompts have changed: the saved position is one in {state['files']} "
                f"(name, bytes, digest), but there are {self._identities}; continue with the same "
                "files, or start a new run"
            )
        if state["shuffle_seed"] != self._seed:
            raise ValueError(
                f"the order of the prompts has changed: it was saved with seed "
                f"{state['shuffle_seed']}, but is {self._seed} now (null: not shuffled); set "
                "training.seed and rollouts.text.shuffle back, or start a new run"
            )
        self._epoch, self._index = state["epoch"], state["index"]

    def close(self) -> None:
        """Let go of the table."""
        self._table = None
        self._order = None

    def _order_of(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            number = len(self._table)
            if self._seed is None:
                order = np.arange(number)
            else:
                order = np.random.default_rng([self._seed, epoch]).permutation(number)
            self._order = (epoch, order)
        return self._order[1]

    def _prompt(self, values: dict[str, Any], source: str) -> Prompt:
        for name in _MEDIA:
            if values.get(name):
                raise ValueError(f"{source}: {name}: images and sounds are not trained on")
        answer_field = self._text.answer_field
        answer = value_at(values, answer_field)
        if answer is None and answer_field != "answer":
            raise ValueError(
                f"{source}: {answer_field}: missing, but rollouts.text.answer_field names it"
            )
        prompt = dataclasses.replace(
            self._made(values, source),
            answer=answer,
            record=other_fields(values),
        )
        return check_prompt(prompt, self._vocab_size, self._max_prompt_length)

    def _made(self, values: dict[str, Any], source: str) -> Prompt:
        """The prompt, without its answer."""
        template = self._text.prompt_template
        if template is not None:
            return self._of_text(_filled(template, values, source), source, told={})
        record = Record(values=values, source=source, end=START)
        check_names_of_prompt(record)
        if "messages" in values and "prompt" in values:
            raise ValueError(f"{source}: messages: a record has either messages or prompt")
        field = "messages" if "messages" in values else "prompt"
        if field not in values:
            raise ValueError(f"{source}: prompt: missing, and so is messages; give one of them")
        prompt = values[field]
        if field == "messages" or _are_messages(prompt):
            where = f"{source}: {field}"
            messages = checked_messages(prompt, where)
            if messages[-1]["role"] == "assistant":
                raise ValueError(
                    f"{where}[{len(messages) - 1}]: the last message is the assistant's, so there "
                    "is nothing to answer; end the prompt before it, and give what it says as the "
                    "answer"
                )
            _check_not_sampled(messages, where)
            return self._chat(messages, where, values, source)
        if isinstance(prompt, str):
            return self._of_text(prompt, source, told=values)
        if isinstance(prompt, list):
            _check_not_told(values, source, "give messages or text")
            return Prompt(tokens=tuple(prompt), answer=None, source=source)
        raise ValueError(
            f"{source}: prompt: {reprlib.repr(prompt)} is neither text nor a list of token ids"
        )

    def _of_text(self, text: str, source: str, *, told: dict[str, Any]) -> Prompt:
        """The prompt of a text; of the values in `told`, what a chat template is told."""
        writable(text, f"{source}: prompt")
        if self._text.chat:
            messages = [{"role": "user", "content": text}]
            return self._chat(messages, f"{source}: prompt", told, source)
        _check_not_told(told, source, "set rollouts.text.chat: true")
        return Prompt(tokens=self._tokenizer.encode_prompt(text), answer=None, source=source)

    def _chat(
        self, messages: list[Message], where: str, values: dict[str, Any], source: str
    ) -> Prompt:
        """The prompt of a chat; of a record's other values, what the template is told."""
        system = self._text.system
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        tools = without_nulls(values.get("tools"))
        options = without_nulls(values.get("chat_template_kwargs"))
        try:
            check_special_tokens(self._tokenizer, messages)
            check_tools_are_written(self._tokenizer, messages, tools, options)
            tokens = self._tokenizer.encode_messages(messages, tools=tools, options=options)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return Prompt(
            tokens=tokens,
            answer=None,
            source=source,
            messages=tuple(messages),
            tools=tools,
            template_options=options,
        )


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _check_not_told(values: dict[str, Any], source: str, remedy: str) -> None:
    """Refuse what a chat template is told, where there is none."""
    for name in ("tools", "chat_template_kwargs"):
        if values.get(name):
            raise ValueError(
                f"{source}: {name}: read by a chat template, which this prompt does not go "
                f"through; {remedy}, or remove it"
            )


def _check_not_sampled(messages: Sequence[Message], where: str) -> None:
    """Refuse what is said of sampled tokens: a prompt's are those of its text."""
    for i, message in enumerate(messages):
        for key in SAMPLED_KEYS:
            if key in message:
                raise ValueError(
                    f"{where}[{i}].{key}: not read in a prompt, whose tokens are those of its "
                    "text; remove it, or give the prompt as token ids"
                )


def _filled(template: str, values: dict[str, Any], source: str) -> str:
    try:
        return template.format_map(values)
    except KeyError as error:
        raise ValueError(
            f"{source}: {error.args[0]}: missing, but rollouts.text.prompt_template names it; the "
            f"record has {', '.join(values) or 'no fields'}"
        ) from error
    except (ValueError, IndexError, AttributeError) as error:
        raise ValueError(
            f"rollouts.text.prompt_template: {template!r} cannot be filled in: {error}; write "
            "braces that are meant as such twice"
        ) from error


def _read_table(paths: Sequence[Path]) -> Any:
    """A `datasets.Dataset` with a row for each record: its fields as JSON, and where it stands.

    As JSON, since a column has one type, but a prompt or an answer may be text here and a list
    there.
    """
    with needed_by(f"{paths[0]}: reading text prompts", extra="rollouts"):
        import datasets
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # a file of the log would get a line for each
    # The cache knows files by what is given here: a changed file must not be taken for the old one.
    stamps = [stamp_of(path) for path in paths]
    try:
        table = datasets.Dataset.from_generator(
            _rows,
            gen_kwargs={"paths": [str(path) for path in paths], "stamps": stamps},
            features=datasets.Features(
                {"record": datasets.Value("string"), "source": datasets.Value("string")}
            ),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, ValueError):
            raise cause from error
        raise ValueError(f"{paths[0]}: not read into a table: {cause}") from error
    return table


def _as_json(value: Any) -> Any:
    """What JSON has no form for: numbers as numbers, dates as text, bytes as null."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return None if isinstance(value, bytes) else str(value)


def _rows(paths: list[str], stamps: list[tuple[Any, ...]]) -> Iterator[dict[str, str]]:
    is_empty = True
    for path in paths:
        for record in open_record_file(Path(path)).records(START):
            is_empty = False
            yield {
                "record": json.dumps(record.values, default=_as_json),
                "source": record.source,
            }
    if is_empty:
        raise ValueError(f"no record in {', '.join(paths)}")

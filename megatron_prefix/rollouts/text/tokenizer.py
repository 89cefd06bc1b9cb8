"""Text to token ids and back, by a Hugging Face tokenizer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_prefix.packages import MissingPackageError, needed_by

logger = logging.getLogger(__name__)

Tokens = tuple[int, ...]


class TextTokenizer:
    """A tokenizer, checked against the model's vocabulary. Runs no code that comes with it."""

    def __init__(self, path: Path, *, vocab_size: int) -> None:
        """Load it.

        Args:
            path: a folder with the tokenizer's files, or a name in the Hugging Face cache.
            vocab_size: of the model; every id must be below it.

        Raises:
            ValueError: transformers is not installed, there is no such tokenizer, or it has tokens
                that the model has not.
        """
        with needed_by(f"rollouts.text.tokenizer: {path}", extra="rollouts"):
            from transformers import AutoTokenizer
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(path))
        except (OSError, ValueError) as error:
            first_line = (str(error).splitlines() or [""])[0]
            missing = "" if path.exists() else f"there is no folder {path.absolute()}, and: "
            raise ValueError(
                f"rollouts.text.tokenizer: {path}: not loaded as a Hugging Face tokenizer: "
                f"{missing}{first_line}"
            ) from error
        if len(self._tokenizer) > vocab_size:
            raise ValueError(
                f"rollouts.text.tokenizer: {path} has {len(self._tokenizer)} tokens, but "
                f"model.vocab_size is {vocab_size}; it is another model's, or raise vocab_size"
            )
        self.path = path
        sample = self.encode("one , two . do n't")
        self.cleans_up = self._tokenizer.decode(sample) != self.decode(sample)
        """Whether its files have whoever decodes by them drop spaces before punctuation."""
        # Servers that use the files which `save` writes give the text of the tokens as it is.
        self._tokenizer.clean_up_tokenization_spaces = False
        self._has_warned = False

    @property
    def end_token(self) -> int | None:
        """The end of sequence; None where the tokenizer has none."""
        return self._tokenizer.eos_token_id

    @property
    def stop_tokens(self) -> Tokens:
        """The ends of sequence: the tokenizer's, and those of generation_config.json beside it."""
        from transformers import GenerationConfig

        found = [] if self.end_token is None else [self.end_token]
        with contextlib.suppress(OSError):  # many tokenizers have no such file
            listed = GenerationConfig.from_pretrained(str(self.path)).eos_token_id
            found += listed if isinstance(listed, list) else [listed]
        return tuple(dict.fromkeys(token for token in found if token is not None))

    def encode_prompt(self, text: str) -> Tokens:
        """The tokens of a prompt's text, with those that the tokenizer puts in front by itself."""
        return tuple(self._tokenizer(text)["input_ids"])

    @property
    def special_texts(self) -> tuple[str, ...]:
        """The texts of tokens that a text cannot hold as such."""
        return tuple(self._tokenizer.all_special_tokens)

    def encode_messages(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        options: dict[str, Any] | None = None,
    ) -> Tokens:
        """The tokens of a chat up to where the assistant's answer begins; see `chat_text`.

        Raises:
            ValueError: there is no chat template, or it refuses these messages.
        """
        # The template's text holds the special tokens already.
        return self.encode(self.chat_text(messages, is_asked=True, tools=tools, options=options))

    def chat_text(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        is_asked: bool,
        tools: Sequence[dict[str, Any]] | None = None,
        options: dict[str, Any] | None = None,
    ) -> str:
        """What the chat template writes.

        Args:
            messages: of the chat.
            is_asked: whether the text ends where the assistant's answer begins.
            tools: that the template is told of.
            options: other variables of the template.

        Raises:
            ValueError: there is no chat template, or it refuses these messages.
        """
        if not self._tokenizer.chat_template:
            raise ValueError(f"the tokenizer {self.path} has no chat template")
        if "strftime_now" in str(self._tokenizer.chat_template) and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the chat template of %s writes today's date (strftime_now): the same records give "
                "other tokens on another day; set a template with a fixed date, or without one",
                self.path,
            )
        try:
            with needed_by(f"the chat template of {self.path}", extra="rollouts"):
                return self._tokenizer.apply_chat_template(
                    list(messages),
                    tools=None if tools is None else list(tools),
                    add_generation_prompt=is_asked,
                    tokenize=False,
                    **(options or {}),
                )
        except MissingPackageError:
            raise
        # Templates are programs: jinja2's own errors, KeyErrors, TypeErrors ...
        except Exception as error:
            raise ValueError(
                f"the chat template of {self.path} refuses it: {type(error).__name__}: {error}"
            ) from error

    def encode(self, text: str) -> Tokens:
        """The tokens of a text, and nothing added."""
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return self._decode(tokens, skip_special_tokens=False)

    def read(self, tokens: Sequence[int]) -> str:
        """The text of tokens as a reward reads it: without special tokens."""
        return self._decode(tokens, skip_special_tokens=True)

    def as_text(self, tokens: Tokens) -> str | None:
        """A text that `encode_prompt`, as a server runs it, turns back into exactly these tokens.

        None where there is no such text: some sequences of tokens are no tokenizer's output.
        """
        # What the tokenizer puts in front of every text is left out of the text.
        added = len(self.encode_prompt(""))
        for skipped in dict.fromkeys((0, added)):
            text = self.decode(tokens[skipped:])
            if self.encode_prompt(text) == tokens:
                return text
        return None

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder."""
        self._tokenizer.save_pretrained(str(folder))

    def _decode(self, tokens: Sequence[int], *, skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(
            list(tokens),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )

"""A tokenizer of digits, and prompts of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
from tests.rollouts.asking import PROMPTS
from tests.rollouts.files import write
from tests.rollouts.servers import DIGITS, save_word_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    folder = save_word_tokenizer(tmp_path_factory.mktemp("tokenizer"), DIGITS, ";")
    return TextTokenizer(folder, vocab_size=16)


@pytest.fixture
def path(tmp_path) -> Path:
    return write(tmp_path / "prompts.jsonl", PROMPTS)

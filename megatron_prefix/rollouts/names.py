"""What a configuration may name: files of records, and rewards.

Nothing but the standard library is needed, so that a wrong name is answered at once.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path

JSON_LINES_ENDINGS = (".jsonl", ".jsonl.gz")
PARQUET_ENDING = ".parquet"

REWARD_NAMES = ("exact_match", "token_match_fraction", "contains_answer", "ends_with_answer")
"""Of rewards that see token ids."""

TEXT_REWARD_NAMES = ("exact_match", "numeric", "multiple_choice")
"""Of rewards that see text."""


def fault_of_path(path: Path) -> str | None:
    """Why there is no file of records at a path, as one line that names it; None if there is one.

    It is not opened.
    """
    if os.path.isdir(path):  # unlike its method, false where the user may not look
        return f"{path}: is a directory; name the files in it"
    if not os.path.isfile(path):
        if glob.has_magic(str(path)):
            return f"{path}: no file matches{'' if path.is_absolute() else f' in {Path.cwd()}'}"
        searched = "" if path.is_absolute() else f" in {Path.cwd()}"
        return f"{path}: there is no such file{searched}"
    if not os.access(path, os.R_OK):
        return f"{path}: cannot be read by this user"
    if not path.name.lower().endswith((*JSON_LINES_ENDINGS, PARQUET_ENDING)):
        return f"{path}: unknown format; its name must end in .jsonl, .jsonl.gz or .parquet"
    return None


def fault_of_name(spec: str, *, has_tokenizer: bool) -> str | None:
    """What is wrong with a reward's name, and what to do; None if it may be one.

    A function's module is not looked for: to import it may take long, or do anything.
    """
    if spec in REWARD_NAMES or (spec in TEXT_REWARD_NAMES and has_tokenizer):
        return None
    if spec in TEXT_REWARD_NAMES:
        return "it reads text; set rollouts.text.tokenizer"
    module_name, colon, path = spec.partition(":")
    if colon and module_name and path:
        return None
    names = ", ".join(dict.fromkeys([*REWARD_NAMES, *TEXT_REWARD_NAMES]))
    return f"name one of {names}, or a function of yours as module:function"

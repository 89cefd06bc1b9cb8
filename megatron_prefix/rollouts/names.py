"""What a configuration may name: files of records, and rewards.

Nothing but the standard library is needed, so that a wrong name is answered at once.
"""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path

JSON_LINES_ENDINGS = (".jsonl", ".jsonl.gz")
PARQUET_ENDING = ".parquet"
TASKS_ENDING = ".gym.yaml"

REWARD_NAMES = ("exact_match", "token_match_fraction", "contains_answer", "ends_with_answer")
"""Of rewards that see token ids."""

TEXT_REWARD_NAMES = ("exact_match", "numeric", "multiple_choice")
"""Of rewards that see text."""


@dataclass(frozen=True, kw_only=True)
class LibraryReward:
    """A reward that sees text and is computed in processes of its own."""

    function: str
    """As module:function."""
    package: str | None = None
    """Name of the library that computes it, where Python imports it; None: Python's own."""
    project: str = ""
    """Its name on the package index."""
    extra: str = ""
    """Of megatron-prefix, which holds it."""


LIBRARY_REWARDS = {
    "math": LibraryReward(
        function="megatron_prefix.rollouts.text.math_reward:math_equal",
        package="math_verify",
        project="math-verify",
        extra="math",
    ),
    "reasoning_gym": LibraryReward(
        function="megatron_prefix.rollouts.gym.scoring:reasoning_gym_score",
        package="reasoning_gym",
        project="reasoning-gym",
        extra="reasoning-gym",
    ),
    "code": LibraryReward(function="megatron_prefix.rollouts.code.reward:passes_tests"),
}
"""By the name that a configuration gives."""


def is_task_file(path: Path) -> bool:
    """Whether a path names a file of tasks of reasoning-gym."""
    return path.name.lower().endswith(TASKS_ENDING)


def fault_of_path(path: Path) -> str | None:
    """Why there is no file of records at a path, as one line that names it; None if there is one.

    It is not opened.
    """
    if os.path.isdir(path):  # unlike its method, false where the user may not look
        return f"{path}: is a directory; name the files in it"
    if not os.path.isfile(path):
        searched = "" if path.is_absolute() else f" in {Path.cwd()}"
        missing = "no file matches" if glob.has_magic(str(path)) else "there is no such file"
        return f"{path}: {missing}{searched}"
    if not os.access(path, os.R_OK):
        return f"{path}: cannot be read by this user"
    if not path.name.lower().endswith((*JSON_LINES_ENDINGS, PARQUET_ENDING, TASKS_ENDING)):
        return (
            f"{path}: unknown format; its name must end in .jsonl, .jsonl.gz or .parquet, or in "
            f"{TASKS_ENDING} for tasks of reasoning-gym"
        )
    return None


def fault_of_name(spec: str, *, has_tokenizer: bool) -> str | None:
    """What is wrong with a reward's name, and what to do; None if it may be one.

    A function's module is not looked for: to import it may take long, or do anything.
    """
    reads_text = spec in TEXT_REWARD_NAMES or spec in LIBRARY_REWARDS
    if spec in REWARD_NAMES or (reads_text and has_tokenizer):
        return None
    if reads_text:
        return "it reads text; set rollouts.text.tokenizer"
    module_name, colon, path = spec.partition(":")
    if colon and module_name and path:
        return None
    names = ", ".join(dict.fromkeys([*REWARD_NAMES, *TEXT_REWARD_NAMES, *LIBRARY_REWARDS]))
    return f"name one of {names}, or a function of yours as module:function"

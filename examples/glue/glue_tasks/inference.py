"""What the tasks of both benchmarks share that ask whether a sentence follows from another."""

from __future__ import annotations

ENTAILS = {"entailment": "yes", "not_entailment": "no"}
"""Labels of two classes to the words that answer."""
INFERENCE = {"entailment": "yes", "neutral": "maybe", "contradiction": "no"}
"""Labels of three classes to the words that answer."""


def follows(first: str, second: str, *, maybe: bool = False) -> str:
    """The prompt's template.

    Args:
        first, second: the fields of the sentences.
        maybe: for three classes.
    """
    words = "yes, no or maybe" if maybe else "yes or no"
    return (
        f"{{{first}}}\nDoes it follow that the next sentence is true?\n{{{second}}}\nSay {words}."
    )

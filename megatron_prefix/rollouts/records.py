"""A group of rollouts, and what has to hold for a model to train on it."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Log-probabilities taken from bfloat16 logits can come out a little above 0; a value beyond this is
# no rounding but a sign that was dropped.
_LOGPROB_ROUNDING = 0.1


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """One prompt with the responses that were sampled for it. Tokens are ids, whole numbers."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    rewards: tuple[float, ...]
    """One for each response."""
    old_logprobs: tuple[tuple[float, ...], ...] | None = None
    """For each response and each of its tokens, the log-probability that it was sampled with."""
    finished: tuple[bool, ...] | None = None
    """For each response, whether it ended by itself, rather than at a limit of length."""
    answer: Any = None
    """What a reward function compares with."""
    policy_version: int | None = None
    """Rollout batches that the weights which sampled it had been trained on; None: not known."""
    source: str
    """Where the group comes from, as errors name it: "file.jsonl:17"."""


FieldName = Callable[[str, int], str]
"""How an error names the value of a field that belongs to a response, given by its index."""


def indexed_field(field: str, response: int) -> str:
    """The name of a response's value in a record that holds a whole group: `rewards[2]`."""
    return f"{field}[{response}]"


def validate_group(
    group: RolloutGroup,
    *,
    vocab_size: int,
    max_positions: int,
    field_name: FieldName = indexed_field,
) -> None:
    """Check that a model can train on the group.

    Args:
        group: what to check.
        vocab_size: token ids lie in [0, vocab_size).
        max_positions: positions of the model. A prompt and a response together take one less than
            they have tokens, since the last one is nobody's input.
        field_name: how errors name what belongs to one response.

    Raises:
        ValueError: an empty prompt or response, no responses, a token that is not an id of the
            vocabulary, a prompt and response beyond the model's positions, a reward or
            log-probability that is not finite, a log-probability above 0, or lists of different
            lengths; the message begins with the group's source and the field.
    """
    source = group.source
    check_tokens(f"{source}: prompt", group.prompt, vocab_size)
    if len(group.prompt) > max_positions:
        raise ValueError(
            f"{source}: prompt: its {len(group.prompt)} tokens exceed the model's {max_positions} "
            "positions"
        )
    if not group.responses:
        raise ValueError(f"{source}: responses: there are none; a group needs at least one")
    for field in ("rewards", "old_logprobs", "finished"):
        values = getattr(group, field)
        if values is not None and len(values) != len(group.responses):
            raise ValueError(
                f"{source}: {field}: {len(values)} for {len(group.responses)} responses; "
                "there must be one for each"
            )
    for r, response in enumerate(group.responses):
        where = f"{source}: {field_name('responses', r)}"
        check_tokens(where, response, vocab_size)
        needed = len(group.prompt) + len(response) - 1
        if needed > max_positions:
            raise ValueError(
                f"{where}: its {len(response)} tokens after a prompt of {len(group.prompt)} need "
                f"{needed} positions, the model has {max_positions}"
            )
        _check_finite(f"{source}: {field_name('rewards', r)}", group.rewards[r])
        if group.old_logprobs is not None:
            where = f"{source}: {field_name('old_logprobs', r)}"
            _check_logprobs(where, group.old_logprobs[r], len(response))


def check_tokens(where: str, tokens: Sequence[int], vocab_size: int) -> None:
    """Raise a ValueError, which begins with `where`, unless these are ids of the vocabulary."""
    if len(tokens) == 0:
        raise ValueError(f"{where}: is empty; it needs at least one token")
    # Whole lists at once where all is well: prompts are long, and every rank reads all of them.
    if set(map(type, tokens)) == {int} and min(tokens) >= 0 and max(tokens) < vocab_size:
        return
    for i, token in enumerate(tokens):
        if type(token) is not int:
            raise ValueError(
                f"{where}[{i}]: {reprlib.repr(token)} is not a token id (a whole number)"
            )
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{where}[{i}]: token {reprlib.repr(token)} is outside the vocabulary of "
                f"{vocab_size} (0 to {vocab_size - 1})"
            )


def _check_finite(where: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{where}: {value} is not a finite number")


def _check_logprobs(where: str, logprobs: Sequence[float], length: int) -> None:
    if len(logprobs) != length:
        raise ValueError(
            f"{where}: {len(logprobs)} log-probabilities for a response of {length} tokens; "
            "there must be one for each"
        )
    for i, value in enumerate(logprobs):
        _check_finite(f"{where}[{i}]", value)
        if value > _LOGPROB_ROUNDING:
            raise ValueError(f"{where}[{i}]: {value} is not a log-probability, they are at most 0")

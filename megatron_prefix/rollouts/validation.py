"""What has to hold of rollouts for a model to train on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.rollouts.record import GroupRecords
from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup
from megatron_prefix.rollouts.usable import UnusableRecord

# Log-probabilities taken from bfloat16 logits can come out a little above 0; a value beyond this is
# no rounding but a sign that was dropped.
_LOGPROB_ROUNDING = 0.125
LOWEST_LOGPROB = -100.0
"""A token that was sampled has a higher log-probability. Servers and trainers write -9999, -100 and
the like for what they do not know, or for what rounds to a probability of 0."""
TOO_LONG = "too long for the model"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of what a model is trained on."""

    vocab_size: int
    """Token ids lie in [0, vocab_size)."""
    max_positions: int
    """Positions of the model. A prompt and a response together take one less than they have tokens,
    since the last one is nobody's input."""
    is_corrected: bool = False
    """Log-probabilities of -100 and less are taken: the objective corrects samples, counts those
    that are not known, and leaves them out."""


def validate_group(group: RolloutGroup, limits: Limits) -> None:
    """Check that a model can train on the group.

    Raises:
        ValueError: see `RolloutBatch.from_groups` and `validate_batch`.
    """
    validate_batch(RolloutBatch.from_groups([group]), limits)


def validate_batch(
    batch: RolloutBatch, limits: Limits, *, records: GroupRecords | None = None
) -> None:
    """Check that a model can train on every group of the batch.

    Args:
        batch: its arrays are of their types and lengths.
        limits: of the model.
        records: that the one group of the batch comes from, for errors; None: of other groups.

    Raises:
        ValueError: a token outside of the vocabulary, a prompt and response beyond the model's
            positions, a log-probability above 0, or a response without a trained token; the message
            begins with the group's source and the field.
    """
    prompts, responses = np.diff(batch.prompt_offsets), np.diff(batch.response_offsets)

    def where(field: str, response: int) -> str:
        if records is not None:
            return records.where(field, response)
        group = int(np.searchsorted(batch.group_offsets, response, side="right")) - 1
        index = response - int(batch.group_offsets[group])
        return f"{batch.sources[group]}: {field}[{index}]"

    def where_token(field: str, place: int) -> str:
        response = int(np.searchsorted(batch.response_offsets, place, side="right")) - 1
        return f"{where(field, response)}[{place - int(batch.response_offsets[response])}]"

    if (group := _first(prompts > limits.max_positions)) is not None:
        raise UnusableRecord(
            f"{batch.sources[group]}: prompt: its {prompts[group]} tokens exceed the model's "
            f"{limits.max_positions} positions; shorten it",
            TOO_LONG,
        )
    for group, source in enumerate(batch.sources):
        check_vocabulary(f"{source}: prompt", batch.prompt(group), limits.vocab_size)
    if (place := _first_outside(batch.response_tokens, limits.vocab_size)) is not None:
        token = batch.response_tokens[place]
        raise _outside(where_token("responses", place), token, limits.vocab_size)
    before = np.repeat(prompts, np.diff(batch.group_offsets))
    if (r := _first(before + responses - 1 > limits.max_positions)) is not None:
        raise UnusableRecord(
            f"{where('responses', r)}: its {responses[r]} tokens after a prompt of {before[r]} "
            f"need {before[r] + responses[r] - 1} positions, the model has "
            f"{limits.max_positions}; shorten it",
            TOO_LONG,
        )
    mask, old = batch.loss_mask, batch.old_logprobs
    if mask is not None:
        is_trained = np.logical_or.reduceat(mask, batch.response_offsets[:-1])
        if (r := _first(~is_trained)) is not None:
            raise ValueError(
                f"{where('loss_mask', r)}: no token of the response is trained on; leave it out"
            )
    if old is None:
        return
    if (place := _first(old > _LOGPROB_ROUNDING)) is not None:
        raise ValueError(
            f"{where_token('old_logprobs', place)}: {old[place]!s} is not a log-probability, they "
            "are at most 0"
        )
    if limits.is_corrected:
        return
    is_none = old <= LOWEST_LOGPROB
    if (place := _first(is_none if mask is None else is_none & mask)) is not None:
        raise UnusableRecord(
            f"{where_token('old_logprobs', place)}: {old[place]:g} is no log-probability of a "
            "token that was sampled (it may stand for one that was not known); give the real one",
            "log-probabilities that are none",
        )


def check_vocabulary(where: str, tokens: NDArray[np.int32], vocab_size: int) -> None:
    """Raise a ValueError, which begins with `where`, unless these are ids of the vocabulary."""
    if (place := _first_outside(tokens, vocab_size)) is not None:
        raise _outside(f"{where}[{place}]", tokens[place], vocab_size)


def _outside(where: str, token: int, vocab_size: int) -> ValueError:
    return ValueError(
        f"{where}: token {token} is outside the vocabulary of {vocab_size} (0 to {vocab_size - 1})"
    )


def _first_outside(tokens: NDArray[np.int32], vocab_size: int) -> int | None:
    if tokens.min(initial=0) >= 0 and tokens.max(initial=0) < vocab_size:
        return None
    return _first((tokens < 0) | (tokens >= vocab_size))


def _first(is_wrong: NDArray[np.bool_]) -> int | None:
    """The first place where it is true."""
    return int(is_wrong.argmax()) if is_wrong.any() else None

"""What has to hold of rollouts for a model to train on them.

Whole arrays are looked at where all is well. Where it is not, the first fault in the order of the
groups is looked for, and named.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup
from megatron_prefix.rollouts.turns import num_turns
from megatron_prefix.rollouts.usable import UnusableRecord

# Log-probabilities taken from bfloat16 logits can come out a little above 0; a value beyond this is
# no rounding but a sign that was dropped. The same number in 32 and in 64 bits.
_LOGPROB_ROUNDING = 0.125
_LARGEST_LOGPROB = float(np.finfo(np.float32).max)
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


_OF_RESPONSES = ("turn_rewards", "advantages", "old_logprobs", "loss_mask", "keys")
"""Optional fields of a group with a list for each response."""

FieldName = Callable[[str, int], str]
"""How an error names the value of a field that belongs to a response, given by its index."""


def indexed_field(field: str, response: int) -> str:
    """The name of a response's value in a record that holds a whole group: `rewards[2]`."""
    return f"{field}[{response}]"


def validate_batch(batch: RolloutBatch, limits: Limits) -> None:
    """Check that a model can train on every group of the batch.

    Raises:
        ValueError: see `validate_group`; the first group that is wrong is named.
    """
    if not is_trainable(batch, limits):
        for group in batch.groups():
            validate_group(group, limits)
        raise AssertionError("the checks of a batch and of its groups differ")


def validate_group(
    group: RolloutGroup, limits: Limits, *, field_name: FieldName = indexed_field
) -> None:
    """Check that a model can train on the group.

    Args:
        group: what to check.
        limits: of the model.
        field_name: how errors name what belongs to one response.

    Raises:
        ValueError: an empty prompt or response, no responses, a token that is not an id of the
            vocabulary, a prompt and response beyond the model's positions, a reward or
            log-probability that is not finite, a log-probability above 0, a response without a
            trained token, an advantage that is not finite, or lists of different lengths; the
            message begins with the group's source and the field.
    """
    source = group.source
    check_tokens(f"{source}: prompt", group.prompt, limits.vocab_size)
    if len(group.prompt) > limits.max_positions:
        raise UnusableRecord(
            f"{source}: prompt: its {len(group.prompt)} tokens exceed the model's "
            f"{limits.max_positions} positions; shorten it",
            TOO_LONG,
        )
    if len(group.responses) == 0:
        raise ValueError(f"{source}: responses: there are none; a group needs at least one")
    if group.prompt_keys is not None:
        _check_count(f"{source}: prompt_keys", group.prompt_keys, len(group.prompt))
    for field in (*_OF_RESPONSES, "rewards", "finished"):
        values = getattr(group, field)
        if values is not None and len(values) != len(group.responses):
            raise ValueError(
                f"{source}: {field}: {len(values)} for {len(group.responses)} responses; "
                "there must be one for each"
            )
    for r in range(len(group.responses)):
        _validate_response(group, r, limits, lambda field, r=r: f"{source}: {field_name(field, r)}")


def _validate_response(
    group: RolloutGroup, r: int, limits: Limits, where: Callable[[str], str]
) -> None:
    """Check what belongs to one response; `where` is how errors name a field of it."""
    response, length = group.responses[r], len(group.responses[r])
    check_tokens(where("responses"), response, limits.vocab_size)
    needed = len(group.prompt) + length - 1
    if needed > limits.max_positions:
        raise UnusableRecord(
            f"{where('responses')}: its {length} tokens after a prompt of {len(group.prompt)} need "
            f"{needed} positions, the model has {limits.max_positions}; shorten it",
            TOO_LONG,
        )
    of = {name: values[r] for name in _OF_RESPONSES if (values := getattr(group, name)) is not None}
    mask = of.get("loss_mask")
    if mask is not None:
        _check_count(where("loss_mask"), mask, length, " values for a response of {} tokens")
        if not any(mask):
            raise ValueError(
                f"{where('loss_mask')}: no token of the response is trained on; leave it out"
            )
    if "turn_rewards" in of:
        trained = " for {} trained turns (runs of tokens that loss_mask has trained)"
        _check_count(where("turn_rewards"), of["turn_rewards"], num_turns(mask), trained)
        _check_all_finite(where("turn_rewards"), of["turn_rewards"])
    _check_finite(where("rewards"), group.rewards[r])
    if "old_logprobs" in of:
        found = " log-probabilities for a response of {} tokens"
        _check_count(where("old_logprobs"), of["old_logprobs"], length, found)
        if limits.is_corrected:
            mask = np.zeros(length, dtype=np.bool_)
        _check_logprobs(where("old_logprobs"), of["old_logprobs"], mask)
    if "advantages" in of:
        _check_count(where("advantages"), of["advantages"], length, " for a response of {} tokens")
        _check_all_finite(where("advantages"), of["advantages"])
    if "keys" in of:
        _check_count(where("keys"), of["keys"], length)


def check_tokens(where: str, tokens: Sequence[Any] | NDArray, vocab_size: int) -> None:
    """Raise a ValueError, which begins with `where`, unless these are ids of the vocabulary."""
    if len(tokens) == 0:
        raise ValueError(f"{where}: is empty; it needs at least one token")
    if isinstance(tokens, np.ndarray) and tokens.dtype.kind in "iu":
        if tokens.min() >= 0 and tokens.max() < vocab_size:
            return
        tokens = tokens.tolist()
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


def is_trainable(batch: RolloutBatch, limits: Limits) -> bool:
    """Whether every group passes `validate_group`; whole arrays are looked at."""
    prompts, responses = np.diff(batch.prompt_offsets), np.diff(batch.response_offsets)
    sizes = np.diff(batch.group_offsets)
    lengths_are_good = (
        prompts.min(initial=1) >= 1
        and responses.min(initial=1) >= 1
        and sizes.min(initial=1) >= 1
        and prompts.max(initial=0) <= limits.max_positions
        and (np.repeat(prompts, sizes) + responses - 1).max(initial=0) <= limits.max_positions
    )
    values_are_good = all(
        tokens.min(initial=0) >= 0 and tokens.max(initial=0) < limits.vocab_size
        for tokens in (batch.prompt_tokens, batch.response_tokens)
    )
    if not (lengths_are_good and values_are_good and np.isfinite(batch.rewards).all()):
        return False
    if not (_are_finite(batch.turn_rewards) and _are_finite(batch.advantages)):
        return False
    old, mask = batch.old_logprobs, batch.loss_mask
    if old is not None:
        sampled = old if mask is None else np.where(mask, old, 0.0)
        in_range = np.isfinite(old).all() and (old <= _LOGPROB_ROUNDING).all()
        if not (in_range and (limits.is_corrected or (sampled > LOWEST_LOGPROB).all())):
            return False
    if mask is None or not len(responses):
        return True
    return bool(np.logical_or.reduceat(mask, batch.response_offsets[:-1]).all())


def _are_finite(values: NDArray[np.float64] | None) -> bool:
    """Whether all are numbers, or NaN for what is not given."""
    return values is None or not np.isinf(values).any()


def _check_finite(where: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{where}: {value} is not a finite number")


def _check_all_finite(where: str, values: Sequence[float] | NDArray) -> None:
    if isinstance(values, np.ndarray) and np.isfinite(values).all():
        return
    for i, value in enumerate(values):
        _check_finite(f"{where}[{i}]", value)


def _check_count(
    where: str, values: Sequence[Any] | NDArray, count: int, of: str = " for {} tokens"
) -> None:
    """Raise a ValueError, which begins with `where`, unless there are so many values."""
    if len(values) != count:
        raise ValueError(f"{where}: {len(values)}{of.format(count)}; there must be one for each")


def _check_logprobs(
    where: str, logprobs: Sequence[float] | NDArray, mask: Sequence[bool] | NDArray | None
) -> None:
    if isinstance(logprobs, np.ndarray):
        if ((logprobs > LOWEST_LOGPROB) & (logprobs <= _LOGPROB_ROUNDING)).all():
            return
        logprobs = logprobs.tolist()
    for i, value in enumerate(logprobs):
        _check_finite(f"{where}[{i}]", value)
        if value < -_LARGEST_LOGPROB:
            raise ValueError(f"{where}[{i}]: {value} is beyond the numbers of 32 bits")
        if value > _LOGPROB_ROUNDING:
            raise ValueError(f"{where}[{i}]: {value} is not a log-probability, they are at most 0")
        if value <= LOWEST_LOGPROB and (mask is None or mask[i]):
            raise UnusableRecord(
                f"{where}[{i}]: {value:g} is no log-probability of a token that was sampled (it "
                "may stand for one that was not known); give the real one",
                "log-probabilities that are none",
            )

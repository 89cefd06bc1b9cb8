"""What has to hold of rollouts for a model to train on them.

Whole arrays are looked at where all is well. Where it is not, the first fault in the order of the
groups is looked for, and named.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence
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

FieldName = Callable[[str, int], str]
"""How an error names the value of a field that belongs to a response, given by its index."""


def indexed_field(field: str, response: int) -> str:
    """The name of a response's value in a record that holds a whole group: `rewards[2]`."""
    return f"{field}[{response}]"


def validate_batch(batch: RolloutBatch, *, vocab_size: int, max_positions: int) -> None:
    """Check that a model can train on every group of the batch.

    Raises:
        ValueError: see `validate_group`; the first group that is wrong is named.
    """
    if not is_trainable(batch, vocab_size=vocab_size, max_positions=max_positions):
        for group in batch.groups():
            validate_group(group, vocab_size=vocab_size, max_positions=max_positions)
        raise AssertionError("the checks of a batch and of its groups differ")


def validate_group(
    group: RolloutGroup,
    *,
    vocab_size: int,
    max_positions: int,
    field_name: FieldName = indexed_field,
    is_corrected: bool = False,
) -> None:
    """Check that a model can train on the group.

    Args:
        group: what to check.
        vocab_size: token ids lie in [0, vocab_size).
        max_positions: positions of the model. A prompt and a response together take one less than
            they have tokens, since the last one is nobody's input.
        field_name: how errors name what belongs to one response.
        is_corrected: log-probabilities of -100 and less are taken: the objective corrects samples,
            and leaves out those that are not known.

    Raises:
        ValueError: an empty prompt or response, no responses, a token that is not an id of the
            vocabulary, a prompt and response beyond the model's positions, a reward or
            log-probability that is not finite, a log-probability above 0, a response without a
            trained token, an advantage that is not finite, or lists of different lengths; the
            message begins with the group's source and the field.
    """
    source = group.source
    check_tokens(f"{source}: prompt", group.prompt, vocab_size)
    if len(group.prompt) > max_positions:
        raise UnusableRecord(
            f"{source}: prompt: its {len(group.prompt)} tokens exceed the model's {max_positions} "
            "positions; shorten it",
            TOO_LONG,
        )
    if len(group.responses) == 0:
        raise ValueError(f"{source}: responses: there are none; a group needs at least one")
    if group.prompt_keys is not None:
        _check_keys(f"{source}: prompt_keys", group.prompt_keys, len(group.prompt))
    for field in (
        "turn_rewards",
        "rewards",
        "advantages",
        "old_logprobs",
        "loss_mask",
        "finished",
        "keys",
    ):
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
            raise UnusableRecord(
                f"{where}: its {len(response)} tokens after a prompt of {len(group.prompt)} need "
                f"{needed} positions, the model has {max_positions}; shorten it",
                TOO_LONG,
            )
        if group.loss_mask is not None:
            where = f"{source}: {field_name('loss_mask', r)}"
            _check_mask(where, group.loss_mask[r], len(response))
        if group.turn_rewards is not None:
            where = f"{source}: {field_name('turn_rewards', r)}"
            mask = None if group.loss_mask is None else group.loss_mask[r]
            _check_turn_rewards(where, group.turn_rewards[r], num_turns(mask))
        _check_finite(f"{source}: {field_name('rewards', r)}", group.rewards[r])
        if group.old_logprobs is not None:
            where = f"{source}: {field_name('old_logprobs', r)}"
            mask = None if group.loss_mask is None else group.loss_mask[r]
            if is_corrected:  # which counts unknown ones, and leaves them out
                mask = np.zeros(len(response), dtype=np.bool_)
            _check_logprobs(where, group.old_logprobs[r], len(response), mask)
        if group.advantages is not None:
            where = f"{source}: {field_name('advantages', r)}"
            _check_advantages(where, group.advantages[r], len(response))
        if group.keys is not None:
            _check_keys(f"{source}: {field_name('keys', r)}", group.keys[r], len(response))


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


def is_trainable(batch: RolloutBatch, *, vocab_size: int, max_positions: int) -> bool:
    """Whether every group passes `validate_group`; whole arrays are looked at."""
    prompts, responses = np.diff(batch.prompt_offsets), np.diff(batch.response_offsets)
    sizes = np.diff(batch.group_offsets)
    lengths_are_good = (
        prompts.min(initial=1) >= 1
        and responses.min(initial=1) >= 1
        and sizes.min(initial=1) >= 1
        and prompts.max(initial=0) <= max_positions
        and (np.repeat(prompts, sizes) + responses - 1).max(initial=0) <= max_positions
    )
    values_are_good = all(
        tokens.min(initial=0) >= 0 and tokens.max(initial=0) < vocab_size
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
        if not (in_range and (sampled > LOWEST_LOGPROB).all()):
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


def _check_logprobs(
    where: str, logprobs: Sequence[float] | NDArray, length: int, mask: Sequence[bool] | None
) -> None:
    if len(logprobs) != length:
        raise ValueError(
            f"{where}: {len(logprobs)} log-probabilities for a response of {length} tokens; "
            "there must be one for each"
        )
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


def _check_turn_rewards(where: str, rewards: Sequence[float] | NDArray, turns: int) -> None:
    if len(rewards) != turns:
        raise ValueError(
            f"{where}: {len(rewards)} for {turns} trained turns (runs of tokens that loss_mask has "
            "trained); there must be one for each"
        )
    _check_all_finite(where, rewards)


def _check_advantages(where: str, advantages: Sequence[float] | NDArray, length: int) -> None:
    if len(advantages) != length:
        raise ValueError(
            f"{where}: {len(advantages)} for a response of {length} tokens; there must be one for "
            "each"
        )
    _check_all_finite(where, advantages)


def _check_keys(where: str, keys: Sequence[int] | NDArray, length: int) -> None:
    if len(keys) != length:
        raise ValueError(f"{where}: {len(keys)} for {length} tokens; there must be one for each")


def _check_mask(where: str, mask: Sequence[bool] | NDArray, length: int) -> None:
    if len(mask) != length:
        raise ValueError(
            f"{where}: {len(mask)} values for a response of {length} tokens; there must be one for "
            "each"
        )
    if not any(mask):
        raise ValueError(f"{where}: no token of the response is trained on; leave it out")

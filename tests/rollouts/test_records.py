"""A group that a model cannot train on is refused, by source, field and value."""

from __future__ import annotations

import dataclasses
import math

import pytest

from megatron_prefix.rollouts.records import RolloutGroup
from megatron_prefix.rollouts.validation import Limits, validate_group

GROUP = RolloutGroup(
    prompt=(1, 2, 3),
    responses=((4, 5), (6,)),
    prompt_keys=(0, -8, 2**62),
    keys=((1, 1), (0,)),
    rewards=(1.0, 0.0),
    old_logprobs=((-0.5, -1.0), (-2.0,)),
    finished=(True, False),
    source="file.jsonl:17",
)

BARE = {"old_logprobs": None, "finished": None, "prompt_keys": None, "keys": None}
"""Without what is optional."""


def validate(group: RolloutGroup = GROUP, *, vocab_size: int = 10, max_positions: int = 8) -> None:
    validate_group(group, Limits(vocab_size=vocab_size, max_positions=max_positions))


def test_a_good_group_passes_at_the_edge_of_every_limit():
    validate(vocab_size=7, max_positions=4)
    validate(dataclasses.replace(GROUP, old_logprobs=None, finished=None))
    validate(dataclasses.replace(GROUP, rewards=(1, -0.0)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ()}, "prompt: is empty; it needs at least one token"),
        ({"responses": ()}, "responses: there are none; a group needs at least one"),
        ({"responses": ((4, 5), ())}, "responses[1]: is empty; it needs at least one token"),
        ({"rewards": (1.0,)}, "rewards: 1 for 2 responses; there must be one for each"),
        ({"prompt_keys": (1, 2)}, "prompt_keys: 2 for 3 tokens; there must be one for each"),
        ({"keys": ((1, 2),)}, "keys: 1 for 2 responses; there must be one for each"),
        ({"keys": ((1, 2), (3, 4))}, "keys[1]: 2 for 1 tokens; there must be one for each"),
        ({"finished": (True,) * 3}, "finished: 3 for 2 responses; there must be one for each"),
        ({"old_logprobs": ()}, "old_logprobs: 0 for 2 responses; there must be one for each"),
        (
            {"old_logprobs": ((-0.5,), (-2.0,))},
            "old_logprobs[0]: 1 log-probabilities for a response of 2 tokens; there must be one "
            "for each",
        ),
        (
            {"old_logprobs": ((-0.5, math.nan), (-2.0,))},
            "old_logprobs[0][1]: nan is not a finite number",
        ),
        (
            {"old_logprobs": ((-0.5, 0.0), (-math.inf,))},
            "old_logprobs[1][0]: -inf is not a finite number",
        ),
        (
            {"old_logprobs": ((0.5, 1.0), (-2.0,))},
            "old_logprobs[0][0]: 0.5 is not a log-probability, they are at most 0",
        ),
        ({"rewards": (1.0, math.nan)}, "rewards[1]: nan is not a finite number"),
        ({"rewards": (math.inf, 1.0)}, "rewards[0]: inf is not a finite number"),
        ({"prompt": (1, -1)}, "prompt[1]: token -1 is outside the vocabulary of 10 (0 to 9)"),
        (
            {"responses": ((4, 5), (10,))},
            "responses[1][0]: token 10 is outside the vocabulary of 10 (0 to 9)",
        ),
        ({"prompt": (1, 2.0)}, "prompt[1]: 2.0 is not a token id (a whole number)"),
        ({"prompt": (True, 2)}, "prompt[0]: True is not a token id (a whole number)"),
        ({"responses": ((4, "5"), (6,))}, "responses[0][1]: '5' is not a token id"),
        ({"prompt": (1,) * 9}, "prompt: its 9 tokens exceed the model's 8 positions"),
        (
            {"prompt": (1,) * 7, "responses": ((4,), (5, 6, 7))},
            "responses[1]: its 3 tokens after a prompt of 7 need 9 positions, the model has 8",
        ),
    ],
)
def test_what_is_wrong_is_named(changes, message):
    group = dataclasses.replace(GROUP, **{**BARE, **changes})
    with pytest.raises(ValueError) as caught:
        validate(group)
    assert str(caught.value).startswith(f"file.jsonl:17: {message}")


def test_the_last_token_takes_no_position():
    group = dataclasses.replace(GROUP, prompt=(1,) * 7, prompt_keys=None, old_logprobs=None)
    validate(group, max_positions=8)
    with pytest.raises(ValueError, match=r"responses\[0\]: .* need 8 positions, the model has 7"):
        validate(group, max_positions=7)


def test_log_probabilities_may_be_above_zero_by_rounding_only():
    validate(dataclasses.replace(GROUP, old_logprobs=((0.0, 0.03), (1e-7,))))


def test_a_group_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GROUP.rewards = (0.0, 0.0)

"""Which responses count and run, and what over-long responses lose, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from megatron_prefix.objective import ObjectiveConfig, group_terms
from megatron_prefix.objective.filters import GroupTerms, overlong_penalties
from megatron_prefix.objective.options import OverlongConfig

MASK = {"kind": "mask"}
PENALTY = {"kind": "penalty", "length": 20, "buffer": 8, "factor": 2.0}


def terms(
    rewards: list[float],
    *,
    lengths: list[int] | None = None,
    finished: list[int] | None = None,
    overlong: dict[str, Any] | None = None,
    given: list[float] | None = None,
    **options: Any,
) -> GroupTerms:
    count = len(rewards)
    config = ObjectiveConfig(
        advantage="mean",
        overlong=None if overlong is None else OverlongConfig(**overlong),
        **options,
    )
    return group_terms(
        np.array(rewards),
        np.array(lengths or [5] * count),
        np.array(finished or [1] * count, dtype=np.int8),
        config.resolved(),
        given=None if given is None else np.array(given),
    )


def test_the_soft_penalty_of_dapo_grows_over_the_buffer() -> None:
    # length - buffer = 12 tokens are free; then (n - 12) / 8, times 2; at most 2.
    found = overlong_penalties(np.array([1, 12, 13, 16, 20, 30]), OverlongConfig(**PENALTY))
    assert found.tolist() == [0, 0, 0.25, 1, 2, 2]


def test_a_penalty_lowers_the_reward_before_the_advantage() -> None:
    # Rewards 1, 1, 0 become 1, 1 - 1, 0: their mean is 1/3.
    found = terms([1, 1, 0], lengths=[5, 16, 5], overlong=PENALTY)
    assert found.advantages.tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert found.overlong.tolist() == [False, True, False]
    assert found.trained.all() and found.computed.all()


def test_a_response_that_was_cut_off_is_masked_and_its_reward_counts() -> None:
    found = terms([1, 0, 0, 1], finished=[1, 0, 1, 1], overlong=MASK)
    assert found.advantages.tolist() == [0.5, -0.5, -0.5, 0.5]
    assert found.trained.tolist() == found.computed.tolist() == [True, False, True, True]
    assert found.overlong.tolist() == [False, True, False, False]


def test_where_it_is_not_known_the_length_says_whether_a_response_was_cut_off() -> None:
    found = terms(
        [1, 0, 0, 1], lengths=[8, 8, 7, 8], finished=[1, -1, -1, 0], overlong={**MASK, "length": 8}
    )
    assert found.trained.tolist() == [True, False, True, False]
    with pytest.raises(ValueError, match=r"finished: not known of response 1, .*overlong\.length"):
        terms([1, 0], finished=[1, -1], overlong=MASK)


def test_zero_advantages_are_skipped_where_that_is_asked_for() -> None:
    # The mean of 1, 0.5, 0 is 0.5: the response in the middle has no gradient either.
    for rewards, computed in (([1, 0.5, 0], [True, False, True]), ([2, 2, 2], [False] * 3)):
        kept, skipped = terms(rewards), terms(rewards, zero_advantages="skip")
        assert kept.computed.all()
        assert skipped.computed.tolist() == computed
        assert skipped.trained.all()
        assert skipped.advantages.tolist() == kept.advantages.tolist()


def test_advantages_that_are_given_for_tokens_stand_in_for_those_of_rewards() -> None:
    found = terms([1, 0, 1], given=[math.nan, 0.0, -2.0], zero_advantages="skip")
    assert found.advantages.tolist() == pytest.approx([1 / 3, 0, -2])
    assert found.computed.tolist() == [True, False, True]
    for options, message in (
        ({"given": [1.0, 1e21, 0.0]}, r"an advantage of response 1 is 1e\+21"),
        (
            {"given": [math.nan, 1.0, 0.0], "overlong": PENALTY},
            r"response 1 has advantages .* objective\.overlong\.kind: penalty lowers",
        ),
        (
            {"given": [math.nan, 1.0, 0.0], "kl_in": "reward", "kl_coefficient": 0.1},
            r"response 1 has advantages .* objective\.kl_in: reward lowers",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            terms([1, 0, 1], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "drop"}, r"kind='drop': choose one of mask, penalty"),
        ({"kind": "penalty"}, r"length=None: set the tokens"),
        ({"kind": "penalty", "length": 8}, r"buffer=None: set the tokens"),
        ({"kind": "penalty", "length": 8, "buffer": 9}, r"buffer=9: set at most 8, length"),
        ({"kind": "penalty", "length": 0, "buffer": 1}, r"length=0: set a whole number"),
        ({**PENALTY, "factor": 0.0}, r"factor=0\.0: set a number above 0"),
        ({"kind": "mask", "buffer": 9}, r"buffer=9 is not used by kind 'mask'"),
        ({"kind": "mask", "factor": 2.0}, r"factor=2\.0 is not used by kind 'mask'"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OverlongConfig(**options)

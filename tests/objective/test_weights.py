"""Token weights against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_prefix.objective import token_weights

LENGTHS = [1, 4, 5]


def test_sequence_mean_counts_every_sequence_alike():
    # 1 / (3 * 1), 1 / (3 * 4), 1 / (3 * 5)
    np.testing.assert_allclose(
        token_weights(LENGTHS, "sequence_mean"), [1 / 3, 1 / 12, 1 / 15], rtol=1e-15
    )


def test_token_mean_counts_every_token_alike():
    # 1 / (1 + 4 + 5)
    np.testing.assert_allclose(token_weights(LENGTHS, "token_mean"), [0.1, 0.1, 0.1], rtol=1e-15)


def test_constant_divides_by_the_given_length():
    # 1 / (3 * 8)
    np.testing.assert_allclose(
        token_weights(LENGTHS, "constant", max_response_length=8), [1 / 24, 1 / 24, 1 / 24]
    )


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_the_weights_of_a_mean_add_up_to_one(aggregation):
    lengths = np.random.default_rng(0).integers(1, 500, size=64)
    assert np.dot(token_weights(lengths, aggregation), lengths) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
def test_an_empty_batch_has_no_weights(aggregation):
    weights = token_weights([], aggregation, max_response_length=4)
    assert weights.shape == (0,)
    assert weights.dtype == np.float64


@pytest.mark.parametrize(
    ("lengths", "aggregation", "maximum", "message"),
    [
        ([3, 0], "sequence_mean", None, "response 1 has 0 tokens"),
        ([3, 9, 2], "constant", 8, "response 1 has 9 tokens, more than max_response_length=8"),
        ([3], "constant", None, "max_response_length=None"),
        ([3], "sum", None, "aggregation='sum': choose one of"),
        ([[3]], "token_mean", None, r"shape \[1, 1\]"),
    ],
)
def test_wrong_arguments_are_named(lengths, aggregation, maximum, message):
    with pytest.raises(ValueError, match=message):
        token_weights(lengths, aggregation, max_response_length=maximum)

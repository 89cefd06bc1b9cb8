"""Tokens are drawn from the right distribution, and the same ones whatever the layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_prefix.rollouts.embedded import drawing
from megatron_prefix.rollouts.embedded.drawing import draw_tokens, response_uniforms

LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.0, 1.1, -0.4, 0.9], dtype=torch.float64)


def draws(logits: torch.Tensor, count: int, **options: float) -> np.ndarray:
    numbers = response_uniforms(seed=11, step=2, prompt=0, response=0, length=count)
    options = {"temperature": 1.0, "top_p": 1.0, **options}
    tokens, _ = draw_tokens(logits[None], torch.from_numpy(numbers)[None], **options)
    return tokens[0].numpy()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
def test_frequencies_are_those_of_the_softmax(temperature):
    count = 20_000
    found = np.bincount(draws(LOGITS, count, temperature=temperature), minlength=len(LOGITS))
    expected = count * (LOGITS / temperature).softmax(-1).numpy()
    # Exceeded with probability 1e-4 by a chi-square of 6 degrees of freedom.
    assert ((found - expected) ** 2 / expected).sum() < 27.9


def test_frequencies_within_the_nucleus_are_those_of_the_softmax_over_it():
    count = 20_000
    found = np.bincount(draws(LOGITS, count, top_p=0.75), minlength=len(LOGITS))
    # By probability: token 2 (.47), 4 (.19), 6 (.16); .47 + .19 < .75 <= .47 + .19 + .16.
    inside = [2, 4, 6]
    assert found[inside].sum() == count
    expected = count * LOGITS[inside].softmax(-1).numpy()
    # Exceeded with probability 1e-4 by a chi-square of 2 degrees of freedom.
    assert ((found[inside] - expected) ** 2 / expected).sum() < 18.4


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_holds_as_much(top_p):
    torch.manual_seed(0)
    logits = 3 * torch.randn(50, 40, dtype=torch.float64)
    numbers = torch.rand(50, 200, dtype=torch.float64)
    tokens, _ = draw_tokens(logits, numbers, temperature=1.0, top_p=top_p)
    for row, probabilities in zip(tokens, logits.softmax(-1), strict=True):
        likeliest = probabilities.argsort(descending=True)
        size = 1
        while probabilities[likeliest[:size]].sum() < top_p:
            size += 1
        assert set(row.tolist()) <= set(likeliest[:size].tolist())


def test_one_of_equally_likely_tokens_is_kept_where_one_is_enough():
    assert set(draws(torch.zeros(4, dtype=torch.float64), 100, top_p=0.2)) == {0}
    assert set(draws(torch.zeros(4, dtype=torch.float64), 100, top_p=0.5)) == {0, 1}


def test_temperature_zero_takes_the_likeliest_token():
    assert set(draws(LOGITS, 50, temperature=0.0)) == {2}


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_tokens_without_probability_are_never_drawn(number):
    infinite = float("inf")
    for logits in ([-infinite, 0.0, 0.1, -infinite], [-infinite, 0.0, -800.0]):
        numbers = torch.tensor([[number]], dtype=torch.float64)
        token, logprob = draw_tokens(
            torch.tensor([logits], dtype=torch.float64), numbers, temperature=1.0, top_p=1.0
        )
        assert token.item() in (1, 2)
        assert logits[token.item()] != -800.0
        assert logprob.item() > -1


def test_log_probabilities_are_at_the_temperature_and_before_top_p():
    numbers = torch.rand(1, 30, dtype=torch.float64)
    tokens, found = draw_tokens(LOGITS[None].float(), numbers, temperature=0.5, top_p=0.6)
    expected = (LOGITS.float().double() / 0.5).log_softmax(-1)[tokens[0]]
    assert (found[0] - expected).abs().max() < 1e-14
    tokens, found = draw_tokens(LOGITS[None], numbers, temperature=0.0, top_p=1.0)
    assert (found[0] - LOGITS.log_softmax(-1)[tokens[0]]).abs().max() < 1e-14


def test_rows_may_be_worked_on_in_blocks(monkeypatch):
    torch.manual_seed(1)
    logits, numbers = torch.randn(10, 7), torch.rand(10, 3, dtype=torch.float64)
    whole = draw_tokens(logits, numbers, temperature=0.7, top_p=0.8)
    monkeypatch.setattr(drawing, "_BLOCK_ELEMENTS", 21)
    for found, expected in zip(
        draw_tokens(logits, numbers, temperature=0.7, top_p=0.8), whole, strict=True
    ):
        assert torch.equal(found, expected)


def test_no_rows_give_no_tokens():
    tokens, logprobs = draw_tokens(
        torch.zeros(0, 7), torch.zeros(0, 3, dtype=torch.float64), temperature=1.0, top_p=0.5
    )
    assert tokens.shape == logprobs.shape == (0, 3)


def test_every_response_has_random_numbers_of_its_own():
    def numbers(**changed: int) -> tuple[float, ...]:
        key = {"seed": 1, "step": 0, "prompt": 0, "response": 0, "length": 5, **changed}
        return tuple(response_uniforms(**key))

    keys = [{}, {"seed": 2}, {"seed": -1}, {"step": 1}, {"prompt": 1}, {"response": 1}]
    keys += [{"seed": 0, "step": 1}, {"prompt": 1, "response": 1}, {"step": 1 << 63}]
    assert len({numbers(**key) for key in keys}) == len(keys)
    assert numbers() == numbers()
    assert numbers(length=3) == numbers()[:3]

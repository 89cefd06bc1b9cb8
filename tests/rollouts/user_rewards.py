"""Rewards as a user writes them; imports nothing, since each worker process imports this anew."""

from __future__ import annotations


def even_first_token(prompt, response, answer):
    return float(response[0] % 2 == 0)

"""Rewards as a user writes them; imports nothing, since each worker process imports this anew."""

from __future__ import annotations


def even_first_token(prompt, response, answer):
    return float(response[0] % 2 == 0)


def shout(prompt, response, answer):
    print("to standard output, where the answers do not go")
    return {"hang": hang, "crash": crash, "raise": fail}.get(response, good)(prompt, answer)


def good(prompt, answer):
    return 1.0 if prompt.endswith(answer) else 0.5


def hang(prompt, answer):
    while True:
        pass


def crash(prompt, answer):
    import os

    os.abort()


def fail(prompt, answer):
    return {}[prompt]

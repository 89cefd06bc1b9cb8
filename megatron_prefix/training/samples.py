"""What the policy says: a few responses of a batch as text, with their rewards.

They are chosen from the highest reward to the lowest, so that what is rewarded stands beside what
is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.rollouts.records import UNKNOWN, RolloutBatch

Reader = Callable[[Sequence[int]], str]
"""The text of tokens."""

_PROMPT_WIDTH, _RESPONSE_WIDTH = 32, 56


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One response."""

    source: str
    """Where its prompt comes from, as errors name it."""
    prompt: str
    response: str
    reward: float
    rewards: dict[str, float]
    """Where responses have several rewards, each by its name."""
    answer: Any
    """What the reward function compared with."""
    tokens: int
    """Of the response."""
    finished: bool | None
    """Whether it ended by itself, rather than at a limit of length; None: not known."""

    def as_row(self, step: int, kind: str) -> dict[str, Any]:
        """What is written of it; a reward that is not a number is written as null."""
        row = {"step": step, "kind": kind, **vars(self)}
        row["rewards"] = {
            name: None if np.isnan(value) else value for name, value in self.rewards.items()
        }
        return json.loads(json.dumps(row, default=str))


def samples_of(batch: RolloutBatch, count: int, read: Reader) -> list[Sample]:
    """Some responses of a batch, the highest reward first.

    Args:
        batch: of any size.
        count: of the samples, at most.
        read: writes tokens as text.
    """
    group_of = np.repeat(np.arange(batch.num_groups), np.diff(batch.group_offsets))
    return [
        _sample(batch, int(group_of[response]), response, read)
        for response in _spread(batch.rewards, count)
    ]


def _spread(rewards: NDArray[np.float64], count: int) -> list[int]:
    """Indices of `count` rewards, evenly from the highest to the lowest; ties in their order."""
    order = np.argsort(-rewards, kind="stable")
    places = np.linspace(0, len(order) - 1, num=min(count, len(order)))
    return [int(order[round(place)]) for place in places]


def _sample(batch: RolloutBatch, group: int, response: int, read: Reader) -> Sample:
    tokens = batch.response_tokens[batch.tokens_of(response)].tolist()
    finished = int(batch.finished[response])
    return Sample(
        source=batch.sources[group],
        prompt=read(batch.prompt(group).tolist()),
        response=read(tokens),
        reward=float(batch.rewards[response]),
        rewards={name: float(of[response]) for name, of in batch.named_rewards.items()},
        answer=batch.answers[group],
        tokens=len(tokens),
        finished=None if finished == UNKNOWN else bool(finished),
    )


def table(samples: Sequence[Sample], title: str) -> str:
    """Samples for a terminal, a line each: the end of the prompt, both ends of the response."""
    lines = [title, f"  {'reward':>8}  {'tokens':>6}  {'prompt':<{_PROMPT_WIDTH}}  response"]
    for sample in samples:
        prompt, response = printable(sample.prompt), printable(sample.response)
        if len(prompt) > _PROMPT_WIDTH:
            prompt = f"...{prompt[3 - _PROMPT_WIDTH :]}"
        if len(response) > _RESPONSE_WIDTH:
            end = _RESPONSE_WIDTH // 2 - 3
            response = f"{response[: _RESPONSE_WIDTH - end - 5]} ... {response[-end:]}"
        cut = "" if sample.finished in (None, True) else "  (cut off)"
        lines.append(
            f"  {sample.reward:>8.3g}  {sample.tokens:>6}  {prompt:<{_PROMPT_WIDTH}}  "
            f"{response}{cut}"
        )
    return "\n".join(lines)


def printable(text: str) -> str:
    """A text on one line; what would move a terminal's cursor or colours is written as Python
    writes it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def markdown(samples: Sequence[Sample]) -> str:
    """Samples for TensorBoard: whole prompts and responses, as code."""
    parts = []
    for sample in samples:
        rewards = ", ".join(f"{name} {value:g}" for name, value in sample.rewards.items())
        head = f"**reward {sample.reward:g}**{f' ({rewards})' if rewards else ''}, {sample.source}"
        parts += [head, _code(sample.prompt), "response:", _code(sample.response)]
    return "\n\n".join(parts)


def _code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])

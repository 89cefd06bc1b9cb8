"""From prompts to responses: what engines that sample differ in, and all that they differ in.

Rank 0 decides what is sampled. It runs a generator that gives the responses it wants next, takes
their answers, and returns a result (`Asking`). Who answers is a `Sampler`: all ranks together
(`answered_by_ranks`), or something elsewhere that rank 0 alone asks (`answered`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.distributed.rank_results import gather_to_rank_0, on_rank_0
from megatron_prefix.rollouts.engine import ENGINE_ERRORS
from megatron_prefix.rollouts.prompts import Prompt
from megatron_prefix.rollouts.text.tokenizer import Tokens

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class SamplingSpec:
    """How responses are sampled."""

    group_size: int = 1
    """Responses to each prompt."""
    max_response_length: int
    """Tokens of a response at most (of a turn, where it has several)."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Tokens come from the smallest set of most likely ones that holds so much probability."""
    stop_tokens: tuple[int, ...] = ()
    """A response ends with the first of these, which it keeps."""
    seed: int = 0
    """The same seed and step give the same responses."""

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("group_size", self.group_size >= 1, "at least 1"),
            ("max_response_length", self.max_response_length >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or a number above it"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, at most 1"),
        ):
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)}: set {wanted}")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """So many responses to a prompt."""

    prompt: Prompt
    count: int
    seed: int = 0
    """Of a request to a server; the trained model's own sampler draws by step and index."""

    def of_tokens(self) -> Wanted:
        """Without what only rewards and environments read."""
        prompt = Prompt(tokens=self.prompt.tokens, answer=None, source=self.prompt.source)
        return dataclasses.replace(self, prompt=prompt)


@dataclass(frozen=True, kw_only=True, eq=False)
class Response:
    """One response."""

    tokens: NDArray
    """Whole numbers; whether they are ids of the vocabulary is not checked yet."""
    logprobs: NDArray | None
    """Of each token, at the sampling temperature (at 1 where that is 0) and before top-p; None
    where they are not known."""
    finished: bool
    """Whether it ended with a stop token."""
    from_text: bool = False
    """Whether the tokens were made from text."""
    loss_mask: NDArray[np.bool_] | None = None
    """Of each token, whether the model said it; None: all are its own."""
    routes: NDArray | None = None
    """The experts that the tokens of prompt and response, but the last, were sent to, see
    `RolloutGroup`; None: they were not asked for."""
    turn_rewards: tuple[float, ...] | None = None
    """What the environment gave for each turn; None: there is no environment."""


@dataclass(kw_only=True)
class Tally:
    """What happened while responses were sampled."""

    samples: int = 0
    from_text: int = 0
    rejected: int = 0
    """Responses that could not be used."""
    reasons: list[str] = field(default_factory=list)
    """The first few, of those that were rejected."""
    retries: int = 0
    """Requests that were sent again."""
    partial_groups: int = 0
    """That lacked responses at first."""
    dropped_groups: int = 0
    """That lacked responses to the end."""
    identical_groups: int = 0
    """Whose responses are all the same."""
    environment_failures: int = 0
    """Calls of an environment that raised, crashed or took too long."""
    turns: int = 0
    """Of all responses of several turns."""

    def reject(self, count: int, reason: str) -> None:
        """Count responses that are missing for one reason."""
        self.rejected += count
        if count and len(self.reasons) < 3:
            self.reasons.append(reason)

    def count(self, responses: Sequence[Response]) -> None:
        """Count responses that came."""
        self.samples += len(responses)
        self.from_text += sum(response.from_text for response in responses)

    def add_failures(self, other: Tally) -> None:
        """Count what went wrong while some of the responses were sampled."""
        self.retries += other.retries
        self.reject(other.rejected, "; ".join(other.reasons))

    def metrics(self) -> dict[str, float]:
        """Of a batch that a server sampled."""
        return {
            "partial_groups": float(self.partial_groups),
            "dropped_groups": float(self.dropped_groups),
            "rejected_responses": float(self.rejected),
            "identical_groups": float(self.identical_groups),
            "tokens_from_text": self.from_text / max(1, self.samples),
            "server_retries": float(self.retries),
        }


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What was sampled."""

    responses: list[list[Response]]
    """For each of the wanted, as many as came out well."""
    tally: Tally = field(default_factory=Tally)


Asking = Generator[list[Wanted], Answers, Result]
"""Gives what is wanted next, takes its answers, and returns a result."""


class Sampler(Protocol):
    """Samples from the policy. What stands here is for one that samples from the trained model."""

    is_remote: bool = False
    """Whether rank 0 alone samples, somewhere else: so it may do so while ranks train, and some
    responses may not come. Otherwise all ranks sample together."""

    def sample(self, wanted: Sequence[Wanted], *, step: int) -> Answers | None:
        """Responses to at least one of the wanted, on rank 0; None on other ranks. Collective,
        unless `is_remote`: then it is called on rank 0 alone.

        A step has randomness of its own, and so has the seed of the `SamplingSpec`.

        Raises:
            ValueError: such as a prompt that is too long, naming it, or a server that refuses.
        """
        ...

    def hand_over(self, step: int) -> int | None:
        """Bring the policy's weights to where they are sampled from, where that is due. Collective.

        Their version is the step, the number of rollout batches trained on so far.

        Returns:
            The version that is sampled from; None where it is always the trained model, or where
            the weights are not this run's affair.
        """
        return None

    def can_be_asked(self, tokens: Tokens) -> bool:
        """Whether responses can be sampled behind these tokens, for all that is known."""
        return True

    def close(self) -> None:
        """Give up what is under way, and let go of models and connections."""
        return None


def answers_of_ranks(
    compute: Callable[[], dict[int, list[Response]]], count: int
) -> Answers | None:
    """Of each rank the responses to some of the `count` wanted, by their index, together on rank
    0; None on other ranks. Collective.
    """
    shares = gather_to_rank_0(compute)
    if shares is None:
        return None
    found = {index: responses for share in shares for index, responses in share.items()}
    return Answers(responses=[found[index] for index in range(count)])


def answered(asking: Asking[Result], sample: Callable[[Sequence[Wanted]], Answers]) -> Result:
    """The result, where one process asks and answers."""
    with contextlib.closing(asking):
        wanted, result = _go_on(asking, None)
        while wanted is not None:
            wanted, result = _go_on(asking, sample(wanted))
        return result


def answered_by_ranks(asking: Asking[Any] | None, sampler: Sampler, *, step: int) -> Any:
    """The result of rank 0, where all ranks sample; elsewhere without its `rollouts`. Collective.

    Args:
        asking: on rank 0; None elsewhere.
        sampler: of the responses.
        step: of the first answers; those after them have the steps that follow.
    """
    answers: Answers | None = None
    with contextlib.nullcontext() if asking is None else contextlib.closing(asking):
        for turn in itertools.count():
            go_on = functools.partial(_go_on, asking, answers)
            wanted, result = on_rank_0(go_on, tell=_told, errors=ENGINE_ERRORS)
            if wanted is None:
                return result
            answers = sampler.sample(wanted, step=step + turn)


def _go_on(asking: Asking[Any] | None, answers: Answers | None) -> tuple[list[Wanted] | None, Any]:
    """What is wanted next, or else the result."""
    assert asking is not None
    try:
        # A generator begins with None.
        return asking.send(answers), None
    except StopIteration as ended:
        return None, ended.value


def _told(step: tuple[list[Wanted] | None, Any]) -> tuple[list[Wanted] | None, Any]:
    """What other ranks than 0 get: no rollouts, and no fields that only rewards read."""
    wanted, result = step
    if wanted is None:
        return None, dataclasses.replace(result, rollouts=None)
    return [item.of_tokens() for item in wanted], None

"""From a server's answer to sampled tokens, checked.

Servers differ in what they give. vLLM and newer SGLang return `token_ids` and `prompt_token_ids` of
each choice when asked to; vLLM can also write the ids where the log-probabilities' tokens stand
("token_id:17"); others, such as `transformers serve`, return text alone. Text becomes tokens by
tokenising it on its own, never together with its prompt: the prompt's tokens are the run's own and
cannot change. Text says less than tokens; what it leaves open is checked against the counts in
`usage`, and refused where it does not add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.rollouts.server.client import ServerError
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer, Tokens

_TOKEN_ID = "token_id:"


class SampleRejected(ValueError):
    """One response that cannot be trained on; others may be well."""


class ServerMismatch(ServerError):
    """The server samples from something else than the run trains."""


class OtherWeights(ServerMismatch):
    """The server answers with other weights than were loaded last."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One response."""

    tokens: NDArray
    """Whole numbers; whether they are ids of the vocabulary is not checked yet."""
    logprobs: NDArray[np.float32] | None
    """Of each token; None where the server gives none."""
    finished: bool
    """Whether it ended with a stop token."""
    from_text: bool
    """Whether the tokens were made from text."""
    loss_mask: NDArray[np.bool_] | None = None
    """Of each token, whether the model said it; None: all are its own."""
    turn_rewards: tuple[float, ...] | None = None
    """What the environment gave for each turn; None: there is no environment."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Reads choices."""

    tokenizer: TextTokenizer | None
    stop_tokens: Tokens
    max_response_length: int

    def read(self, choice: dict[str, Any], prompt: Tokens, usage: dict[str, Any] | None) -> Sample:
        """The sample of one choice.

        Args:
            choice: of the answer's `choices`.
            prompt: the tokens that were asked about.
            usage: the answer's, where this is its only choice.

        Raises:
            SampleRejected: an aborted response, or one whose tokens are not certain.
            ServerMismatch: the server's tokens are not the tokenizer's.
        """
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise SampleRejected(f"finish_reason is {reason!r}")
        _check_prompt(choice.get("prompt_token_ids"), prompt)
        tokens = _token_ids(choice)
        if tokens is None:
            return self._from_text(choice, usage)
        tokens = self._with_stop(tokens, choice)
        if not tokens:
            raise SampleRejected("it has no tokens")
        if len(tokens) > self.max_response_length:
            raise ServerMismatch(
                f"the server gave {len(tokens)} tokens where at most {self.max_response_length} "
                "were asked for"
            )
        finished = tokens[-1] in self.stop_tokens
        if reason == "stop" and not finished:
            raise ServerMismatch(
                f"the server stopped after token {tokens[-1]}, which is not in stop_tokens "
                f"{list(self.stop_tokens)}: its model has other stop tokens; add them to "
                "rollouts.stop_tokens"
            )
        self._check_text(tokens, choice.get("text"))
        return Sample(
            tokens=_token_array(tokens),
            logprobs=_logprobs(choice, len(tokens)),
            finished=finished,
            from_text=False,
        )

    def _with_stop(self, tokens: Tokens, choice: dict[str, Any]) -> Tokens:
        """With the stop token that some servers cut off and name."""
        matched = choice.get("matched_stop", choice.get("stop_reason"))
        if (
            choice["finish_reason"] == "stop"
            and type(matched) is int
            and matched in self.stop_tokens
            and tokens[-1:] != (matched,)
        ):
            return (*tokens, matched)
        return tokens

    def _check_text(self, tokens: Tokens, text: Any) -> None:
        """The ids and the text of one response must agree, or the tokenizers differ."""
        if self.tokenizer is None or not isinstance(text, str) or "\ufffd" in text:
            return
        ours = (self.tokenizer.decode(tokens), self.tokenizer.read(tokens))
        # Servers cut characters in the middle and white space at the ends.
        if not any(text.strip() in own or "\ufffd" in own for own in ours):
            raise ServerMismatch(
                f"the server's tokens {list(tokens[:8])} ... are {text[:60]!r} to it, but "
                f"{ours[1][:60]!r} by {self.tokenizer.path}: it serves another tokenizer's model; "
                "check server.model and rollouts.text.tokenizer"
            )

    def _from_text(self, choice: dict[str, Any], usage: dict[str, Any] | None) -> Sample:
        text = choice.get("text")
        if self.tokenizer is None:
            raise ServerMismatch(
                "the server returns no token ids, so a tokenizer is needed: set "
                "rollouts.text.tokenizer"
            )
        if not isinstance(text, str):
            raise SampleRejected("it has neither token ids nor text")
        tokens = self.tokenizer.encode(text)
        if self.tokenizer.decode(tokens) != text:
            raise SampleRejected(
                f"its text {text[:60]!r} does not come back from its tokens, so they are not those "
                "that were sampled"
            )
        finished = choice["finish_reason"] == "stop"
        if finished and tokens[-1:] != self.stop_tokens:
            # Text ends before the stop token.
            tokens = (*tokens, *self.stop_tokens)
        counted = None if usage is None else usage.get("completion_tokens")
        if counted is not None and counted != len(tokens):
            raise SampleRejected(
                f"its text {text[:60]!r} is {len(tokens)} tokens, but the server sampled {counted}"
            )
        if not tokens:
            raise SampleRejected("it is empty")
        return Sample(tokens=_token_array(tokens), logprobs=None, finished=finished, from_text=True)


def check_prompt_count(usage: dict[str, Any] | None, prompt: Tokens, source: str) -> None:
    """Raise unless the server counts as many tokens in the prompt as were sent.

    Raises:
        ServerMismatch: it counts others, so it made other tokens of the prompt's text.
    """
    counted = None if usage is None else usage.get("prompt_tokens")
    if counted is not None and counted != len(prompt):
        raise ServerMismatch(
            f"{source}: prompt: {len(prompt)} tokens, but the server counts {counted} in it: it "
            "serves another tokenizer's model; check server.model and rollouts.text.tokenizer"
        )


def gives_token_ids(choice: dict[str, Any]) -> bool:
    """Whether the choice says its tokens' ids."""
    return _token_ids(choice) is not None


def _check_prompt(found: Any, prompt: Tokens) -> None:
    if isinstance(found, list) and tuple(found) != prompt:
        raise ServerMismatch(
            f"the server read the prompt as other tokens than were sent ({len(found)} tokens "
            f"beginning {found[:8]}, not {len(prompt)} beginning {list(prompt[:8])})"
        )


def _token_ids(choice: dict[str, Any]) -> Tokens | None:
    found = choice.get("token_ids")
    if isinstance(found, list):
        if not all(type(token) is int for token in found):
            raise SampleRejected("token_ids are not all whole numbers")
        return tuple(found)
    logprobs = choice.get("logprobs")
    tokens = logprobs.get("tokens") if isinstance(logprobs, dict) else None
    if (
        isinstance(tokens, list)
        and tokens
        and all(isinstance(t, str) and t.startswith(_TOKEN_ID) for t in tokens)
    ):
        return tuple(int(token.removeprefix(_TOKEN_ID)) for token in tokens)
    return None


def _token_array(tokens: Tokens) -> NDArray:
    """In 32 bits where they fit; other numbers stay as they are, for the error that names them."""
    array = np.array(tokens)
    fits = array.dtype.kind == "i" and abs(array).max(initial=0) < 1 << 31
    return array.astype(np.int32) if fits else array


def _logprobs(choice: dict[str, Any], length: int) -> NDArray[np.float32] | None:
    logprobs = choice.get("logprobs")
    found = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(found, list) or not found:
        return None
    if len(found) != length:
        raise SampleRejected(f"{len(found)} log-probabilities for {length} tokens")
    if not all(type(value) in (int, float) for value in found):
        raise SampleRejected("a log-probability is missing")
    return np.array(found, dtype=np.float64).astype(np.float32)

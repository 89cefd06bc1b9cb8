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

from megatron_prefix.rollouts.engine import ServerError
from megatron_prefix.rollouts.routes import FIELD as ROUTES
from megatron_prefix.rollouts.routes import RouteShape
from megatron_prefix.rollouts.sampling.sampler import Response, SamplingSpec
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer, Tokens
from megatron_prefix.rollouts.validation import LOWEST_LOGPROB

_TOKEN_ID = "token_id:"


class SampleRejected(ValueError):
    """One response that cannot be trained on; others may be well."""


class ServerMismatch(ServerError):
    """The server samples from something else than the run trains."""


class OtherWeights(ServerMismatch):
    """The server answers with other weights than were loaded last."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Reads choices."""

    tokenizer: TextTokenizer | None
    has_our_tokenizer: bool = False
    """Whether the server uses the tokenizer's files that the run hands over."""
    spec: SamplingSpec
    """What was asked for."""
    is_corrected: bool = False
    """See `validate_group`."""
    routes: RouteShape | None = None
    """Of the routes that each answer must have; None: they are not looked at."""

    def read(
        self, choice: dict[str, Any], prompt: Tokens, usage: dict[str, Any] | None
    ) -> Response:
        """The response of one choice.

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
        if tokens is None and self.routes is not None:
            raise ServerMismatch(
                "the server returns no token ids, and training.replayed_routes needs to know which "
                "tokens its routes are of; use a server that does, or set replayed_routes: null"
            )
        if tokens is None:
            return self._from_text(choice, usage)
        tokens = self._with_stop(tokens, choice)
        if not tokens:
            raise SampleRejected("it has no tokens")
        if len(tokens) > self.spec.max_response_length:
            raise ServerMismatch(
                f"the server gave {len(tokens)} tokens where at most "
                f"{self.spec.max_response_length} were asked for"
            )
        finished = tokens[-1] in self.spec.stop_tokens
        if reason == "stop" and not finished:
            named = _stop_named(choice)
            seen = f"after token {tokens[-1]}" if named is None else f"at token {named}"
            guess = ""
            if named is None:
                guess = (
                    "; it may have cut off the token that ended the response, which "
                    "generation_config.json (eos_token_id) of its model names"
                )
            raise ServerMismatch(
                f"the server stopped {seen}, which is not in stop_tokens "
                f"{list(self.spec.stop_tokens)}; add the model's other ends of sequence to "
                f"rollouts.stop_tokens{guess}"
            )
        self._check_text(tokens, choice.get("text"))
        return Response(
            tokens=_token_array(tokens),
            logprobs=_logprobs(choice, len(tokens), is_corrected=self.is_corrected),
            finished=finished,
            from_text=False,
            routes=None if self.routes is None else self._routes(choice, len(prompt) + len(tokens)),
        )

    def _routes(self, choice: dict[str, Any], num_tokens: int) -> NDArray:
        assert self.routes is not None
        value = choice.get(ROUTES)
        if value is None:
            raise ServerMismatch(
                f"the server gives no {ROUTES}, which training.replayed_routes replays; start it "
                "with --enable-return-routed-experts (SGLang, vLLM), or set replayed_routes: null"
            )
        try:
            return self.routes.read(value, ROUTES, num_tokens)
        except ValueError as error:
            raise ServerMismatch(str(error)) from error

    def _with_stop(self, tokens: Tokens, choice: dict[str, Any]) -> Tokens:
        """With the stop token that some servers cut off and name."""
        named = _stop_named(choice)
        if (
            choice["finish_reason"] == "stop"
            and named in self.spec.stop_tokens
            and tokens[-1:] != (named,)
        ):
            return (*tokens, named)
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

    def _from_text(self, choice: dict[str, Any], usage: dict[str, Any] | None) -> Response:
        text = choice.get("text")
        if self.tokenizer is None:
            raise ServerMismatch(
                "the server returns no token ids, so a tokenizer is needed: set "
                "rollouts.text.tokenizer"
            )
        if not isinstance(text, str):
            raise SampleRejected("it has neither token ids nor text")
        self._check_not_cleaned(choice, text)
        tokens = self.tokenizer.encode(text)
        if self.tokenizer.decode(tokens) != text:
            raise SampleRejected(
                f"its text {text[:60]!r} does not come back from its tokens, so they are not those "
                "that were sampled"
            )
        finished = choice["finish_reason"] == "stop"
        if finished and not (tokens and tokens[-1] in self.spec.stop_tokens):
            # Text ends before the stop token.
            tokens = (*tokens, self._stop_of_text(choice))
        counted = _count(usage, "completion_tokens")
        if counted is not None and counted != len(tokens):
            raise SampleRejected(
                f"its text {text[:60]!r} is {len(tokens)} tokens, but the server sampled {counted}"
            )
        if not tokens:
            raise SampleRejected("it is empty")
        return Response(
            tokens=_token_array(tokens), logprobs=None, finished=finished, from_text=True
        )

    def _stop_of_text(self, choice: dict[str, Any]) -> int:
        """The token that ended a response of text."""
        named = _stop_named(choice)
        if named is not None and named in self.spec.stop_tokens:
            return named
        if len(self.spec.stop_tokens) != 1:
            raise ServerMismatch(
                "the server answers in text, which does not say which of the stop tokens "
                f"{list(self.spec.stop_tokens)} ended it; set rollouts.stop_tokens to the one "
                "that the server ends with, or use a server that gives token ids"
            )
        return self.spec.stop_tokens[0]

    def _check_not_cleaned(self, choice: dict[str, Any], text: str) -> None:
        """Refuse text that is not that of its tokens: others would be trained on."""
        assert self.tokenizer is not None
        whole = _joined_tokens(choice)
        if whole is not None:
            if not whole.strip().startswith(text.strip()):
                raise ServerMismatch(
                    f"the server's text {text[:60]!r} is not that of its tokens, {whole[:60]!r}: "
                    "it cleans text up; switch that off (clean_up_tokenization_spaces: false in "
                    "its tokenizer_config.json), or use a server that gives token ids"
                )
        elif self.tokenizer.cleans_up and not self.has_our_tokenizer:
            raise ServerMismatch(
                f"the server answers in text, and the tokenizer {self.tokenizer.path} cleans text "
                "up (' ,' becomes ','), so that it may hide what was sampled; set "
                "clean_up_tokenization_spaces: false in tokenizer_config.json, the server's too, "
                "or use a server that gives token ids"
            )


def _stop_named(choice: dict[str, Any]) -> int | None:
    """The token that ended a response, where the server says it."""
    named = choice.get("matched_stop", choice.get("stop_reason"))
    return named if type(named) is int else None


def _joined_tokens(choice: dict[str, Any]) -> str | None:
    """The text of the choice's tokens, one behind the other; None where they are not given, or in
    the vocabulary's own spelling."""
    logprobs = choice.get("logprobs")
    found = logprobs.get("tokens") if isinstance(logprobs, dict) else None
    if not isinstance(found, list) or not found or not all(isinstance(t, str) for t in found):
        return None
    whole = "".join(found)
    is_spelt = any(sign in whole for sign in ("\ufffd", "bytes:", "<0x", "\u0120", "\u2581"))
    return None if is_spelt else whole


def _count(usage: dict[str, Any] | None, name: str) -> int | None:
    """A count of tokens; None where it is not known, for which some servers write 0 or text."""
    found = None if usage is None else usage.get(name)
    return found if type(found) is int and found > 0 else None


def check_prompt_count(usage: dict[str, Any] | None, prompt: Tokens, source: str) -> None:
    """Raise unless the server counts as many tokens in the prompt as were sent.

    Raises:
        ServerMismatch: it counts others, so it made other tokens of the prompt's text.
    """
    counted = _count(usage, "prompt_tokens")
    if counted is not None and counted != len(prompt):
        raise ServerMismatch(
            f"{source}: prompt: {len(prompt)} tokens, but the server counts {counted} in it; it "
            "may serve another tokenizer's model: check server.model and rollouts.text.tokenizer"
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


def _logprobs(
    choice: dict[str, Any], length: int, *, is_corrected: bool
) -> NDArray[np.float32] | None:
    logprobs = choice.get("logprobs")
    found = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(found, list) or not found:
        return None
    if len(found) != length:
        raise SampleRejected(f"{len(found)} log-probabilities for {length} tokens")
    if not all(type(value) in (int, float) for value in found):
        raise SampleRejected("a log-probability is missing")
    if min(found) <= LOWEST_LOGPROB and not is_corrected:
        raise SampleRejected(f"{min(found):g} is no log-probability of a token that was sampled")
    return np.array(found, dtype=np.float64).astype(np.float32)

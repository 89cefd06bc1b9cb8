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

    def read(self, choice: dict[str, Any], prompt: Tokens, usage: Any) -> Response:
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
        read_as = choice.get("prompt_token_ids")
        if isinstance(read_as, list) and tuple(read_as) != prompt:
            raise ServerMismatch(
                f"the server read the prompt as other tokens than were sent ({len(read_as)} tokens "
                f"beginning {read_as[:8]}, not {len(prompt)} beginning {list(prompt[:8])})"
            )
        tokens = _token_ids(choice)
        from_text = tokens is None
        tokens = self._of_text(choice, usage) if from_text else self._of_ids(tokens, choice)
        routes = None
        if self.routes is not None:
            routes = self._routes(choice, self.routes, len(prompt) + len(tokens))
        # In 32 bits where they fit; other numbers stay, for the error that names them.
        array = np.array(tokens)
        fits = array.dtype.kind == "i" and abs(array).max() < 1 << 31
        return Response(
            tokens=array.astype(np.int32) if fits else array,
            logprobs=None if from_text else self._logprobs(choice, len(tokens)),
            finished=tokens[-1] in self.spec.stop_tokens if not from_text else reason == "stop",
            from_text=from_text,
            routes=routes,
        )

    def _of_ids(self, tokens: Tokens, choice: dict[str, Any]) -> Tokens:
        """With the stop token that some servers cut off and name."""
        stop_tokens, longest = self.spec.stop_tokens, self.spec.max_response_length
        is_stopped, named = choice["finish_reason"] == "stop", _stop_named(choice)
        if is_stopped and named in stop_tokens and tokens[-1:] != (named,):
            tokens = (*tokens, named)
        if not tokens:
            raise SampleRejected("it has no tokens")
        if len(tokens) > longest:
            raise ServerMismatch(
                f"the server gave {len(tokens)} tokens where at most {longest} were asked for"
            )
        if is_stopped and tokens[-1] not in stop_tokens:
            seen, guess = f"at token {named}", ""
            if named is None:
                seen = f"after token {tokens[-1]}"
                guess = (
                    "; it may have cut off the token that ended the response, which "
                    "generation_config.json (eos_token_id) of its model names"
                )
            raise ServerMismatch(
                f"the server stopped {seen}, which is not in stop_tokens {list(stop_tokens)}; add "
                f"the model's other ends of sequence to rollouts.stop_tokens{guess}"
            )
        self._check_text(tokens, choice.get("text"))
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

    def _of_text(self, choice: dict[str, Any], usage: Any) -> Tokens:
        """The tokens that a response's text was sampled as."""
        if self.routes is not None:
            raise ServerMismatch(
                "the server returns no token ids, and training.replayed_routes needs to know which "
                "tokens its routes are of; use a server that does, or set replayed_routes: null"
            )
        if self.tokenizer is None:
            raise ServerMismatch(
                "the server returns no token ids, so a tokenizer is needed: set "
                "rollouts.text.tokenizer"
            )
        text = choice.get("text")
        if not isinstance(text, str):
            raise SampleRejected("it has neither token ids nor text")
        self._check_not_cleaned(choice, text)
        tokens = self.tokenizer.encode(text)
        if self.tokenizer.decode(tokens) != text:
            raise SampleRejected(
                f"its text {text[:60]!r} does not come back from its tokens, so they are not those "
                "that were sampled"
            )
        if choice["finish_reason"] == "stop" and not (
            tokens and tokens[-1] in self.spec.stop_tokens
        ):
            # Text ends before the stop token.
            tokens = (*tokens, self._stop_of_text(choice))
        counted = _count(usage, "completion_tokens")
        if counted is not None and counted != len(tokens):
            raise SampleRejected(
                f"its text {text[:60]!r} is {len(tokens)} tokens, but the server sampled {counted}"
            )
        if not tokens:
            raise SampleRejected("it is empty")
        return tokens

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

    def _routes(self, choice: dict[str, Any], shape: RouteShape, num_tokens: int) -> NDArray:
        value = choice.get(ROUTES)
        if value is None:
            raise ServerMismatch(
                f"the server gives no {ROUTES}, which training.replayed_routes replays; start it "
                "with --enable-return-routed-experts (SGLang, vLLM), or set replayed_routes: null"
            )
        try:
            return shape.read(value, ROUTES, num_tokens)
        except ValueError as error:
            raise ServerMismatch(str(error)) from error

    def _logprobs(self, choice: dict[str, Any], length: int) -> NDArray[np.float32] | None:
        found = of_logprobs(choice, "token_logprobs")
        if found is None:
            return None
        if len(found) != length:
            raise SampleRejected(f"{len(found)} log-probabilities for {length} tokens")
        if not all(type(value) in (int, float) for value in found):
            raise SampleRejected("a log-probability is missing")
        if min(found) <= LOWEST_LOGPROB and not self.is_corrected:
            raise SampleRejected(
                f"{min(found):g} is no log-probability of a token that was sampled"
            )
        return np.array(found, dtype=np.float64).astype(np.float32)


def check_prompt_count(usage: Any, prompt: Tokens, source: str) -> None:
    """Raise where the server made other tokens of a prompt's text, and so counts others."""
    counted = _count(usage, "prompt_tokens")
    if counted is not None and counted != len(prompt):
        raise ServerMismatch(
            f"{source}: prompt: {len(prompt)} tokens, but the server counts {counted} in it; it "
            "may serve another tokenizer's model: check server.model and rollouts.text.tokenizer"
        )


def gives_token_ids(choice: dict[str, Any]) -> bool:
    """Whether the choice says its tokens' ids."""
    return _token_ids(choice) is not None


def of_logprobs(choice: dict[str, Any], name: str) -> list[Any] | None:
    """A list of a choice's `logprobs`, with at least one item."""
    logprobs = choice.get("logprobs")
    found = logprobs.get(name) if isinstance(logprobs, dict) else None
    return found if isinstance(found, list) and found else None


def _token_ids(choice: dict[str, Any]) -> Tokens | None:
    found = choice.get("token_ids")
    if isinstance(found, list):
        if not all(type(token) is int for token in found):
            raise SampleRejected("token_ids are not all whole numbers")
        return tuple(found)
    tokens = of_logprobs(choice, "tokens")
    if tokens and all(isinstance(t, str) and t.startswith(_TOKEN_ID) for t in tokens):
        return tuple(int(token.removeprefix(_TOKEN_ID)) for token in tokens)
    return None


def _stop_named(choice: dict[str, Any]) -> int | None:
    """The token that ended a response, where the server says it."""
    named = choice.get("matched_stop", choice.get("stop_reason"))
    return named if type(named) is int else None


def _joined_tokens(choice: dict[str, Any]) -> str | None:
    """The text of the choice's tokens, one behind the other; None where they are not given, or in
    the vocabulary's own spelling."""
    found = of_logprobs(choice, "tokens")
    if found is None or not all(isinstance(token, str) for token in found):
        return None
    whole = "".join(found)
    is_spelt = any(sign in whole for sign in ("\ufffd", "bytes:", "<0x", "\u0120", "\u2581"))
    return None if is_spelt else whole


def _count(usage: Any, name: str) -> int | None:
    """A count of tokens; None where it is not known, for which some servers write 0 or text."""
    found = usage.get(name) if isinstance(usage, dict) else None
    return found if type(found) is int and found > 0 else None

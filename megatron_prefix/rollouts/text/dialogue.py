"""A dialogue as a prompt and a response with a mask, through the tokenizer's chat template.

The response begins with the first turn that is trained on; earlier turns belong to the prompt. What
a policy sampled, up to and with the token that ends its turn, is trained on; whatever the template
writes around it, and all other roles, is seen and not trained on. The tokens are those of a policy
that goes on turn by turn:

    prompt    the template's text up to where the assistant is asked
    turn      the ids that were sampled where a message gives them, else those of its text
    between   the template's text from the end of the turn to where the assistant is asked again

Each is made into tokens by itself. Where a template writes an earlier turn otherwise once messages
follow, no such sequence is what the policy saw, and the dialogue is refused.
"""

from __future__ import annotations

import itertools
import json
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prefix.rollouts.text.messages import SAMPLED_KEYS, Message
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer, Tokens


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """A trajectory of messages as tokens."""

    prompt: Tokens
    response: Tokens
    loss_mask: tuple[bool, ...]
    """For each token of the response, whether it is trained on."""
    logprobs: tuple[float, ...] | None
    """Of each token of the response, 0 where it is not trained on; None: no message gives them."""


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """What one message of the assistant comes to, or what stands between two of them."""

    tokens: Tokens
    is_trained: bool
    logprobs: tuple[float, ...] | None = None
    rest: str = ""
    """What the template writes between the end of the turn and what follows it."""


class DialogueEncoder:
    """Makes tokens of dialogues."""

    def __init__(self, tokenizer: TextTokenizer, *, stop_tokens: Sequence[int]) -> None:
        """Encode with a tokenizer that has a chat template.

        Args:
            tokenizer: of the policy.
            stop_tokens: that a policy ends its turn with.
        """
        self._tokenizer = tokenizer
        self._stop_texts = {token: tokenizer.decode((token,)) for token in stop_tokens}

    def encode_texts(self, prompt: str, completion: str) -> tuple[Tokens, Tokens]:
        """The tokens of a prompt, and of what follows it up to the end of sequence."""
        end = self._tokenizer.end_token
        ends = () if end is None else (end,)
        encode = self._tokenizer.encode
        return self._tokenizer.encode_prompt(prompt), (*encode(completion), *ends)

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        template_options: dict[str, Any] | None = None,
    ) -> Dialogue:
        """The dialogue's tokens. Messages of the assistant are trained on.

        A message of the assistant may have `token_ids`, as they were sampled, with `logprobs` of
        them, and `weight`: 0 for a turn that is not trained on.

        Args:
            messages: from `checked_messages`.
            tools: what the template is told of tools.
            template_options: other variables of the template.

        Raises:
            ValueError: no turn to train on, a template that does not go on from its own text, or a
                message that is wrong, named as [i].
        """
        check_special_tokens(self._tokenizer, messages)
        asked = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        trained = [i for i in asked if _is_trained(messages[i], i)]
        if not trained:
            raise ValueError("no message of the assistant is trained on; leave the record out")
        has_logprobs = _all_or_none_have_logprobs(messages, trained)
        check_tools_are_written(self._tokenizer, messages, tools, template_options)
        # A turn of the prompt whose ids are given keeps them too.
        first = next(i for i in asked if i == trained[0] or "token_ids" in messages[i])
        taken = [i for i in asked if first <= i <= trained[-1]]
        parts = self._parts(messages, taken, self._writer(tools, template_options))
        begin = next(place for place, part in enumerate(parts) if part.is_trained)
        prompt, response = parts[:begin], parts[begin:]
        logprobs = (part.logprobs or (0.0,) * len(part.tokens) for part in response)
        return Dialogue(
            prompt=tuple(token for part in prompt for token in part.tokens),
            response=tuple(token for part in response for token in part.tokens),
            loss_mask=tuple(part.is_trained for part in response for _ in part.tokens),
            logprobs=tuple(itertools.chain(*logprobs)) if has_logprobs else None,
        )

    def _parts(
        self, messages: Sequence[Message], taken: Sequence[int], write: Callable[..., str]
    ) -> list[_Turn]:
        """What comes before the first of the taken turns, these turns, and what is between them."""
        before = write(messages[: taken[0]], is_asked=True)
        parts = [_Turn(tokens=self._tokenizer.encode(before), is_trained=False)]
        for i, following in zip(taken, (*taken[1:], None), strict=True):
            after = write(messages[: i + 1], is_asked=False)
            if "token_ids" not in messages[i]:
                _check_written(write, messages[: i + 1], after)
            turn = self._turn(messages[i], _continued(before, after, i, "is asked for"), i)
            parts.append(turn)
            if following is None:
                break
            before = write(messages[:following], is_asked=True)
            between = turn.rest + _continued(after, before, i, "is written once others follow")
            parts.append(_Turn(tokens=self._tokenizer.encode(between), is_trained=False))
        return parts

    def between(
        self,
        messages: Sequence[Message],
        following: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        template_options: dict[str, Any] | None = None,
    ) -> Tokens:
        """The tokens from the end of a turn to where the assistant is asked again.

        Args:
            messages: the last of them is the turn.
            following: that come behind it.
            tools, template_options: see `encode`.

        Raises:
            ValueError: see `encode`.
        """
        check_special_tokens(self._tokenizer, following)
        write = self._writer(tools, template_options)
        last = len(messages) - 1
        before = write(messages[:-1], is_asked=True)
        after = write(messages, is_asked=False)
        turn = self._turn(messages[-1], _continued(before, after, last, "is asked for"), last)
        asked = write([*messages, *following], is_asked=True)
        rest = turn.rest + _continued(after, asked, last, "is written once others follow")
        return self._tokenizer.encode(rest)

    def _writer(
        self, tools: Sequence[dict[str, Any]] | None, options: dict[str, Any] | None
    ) -> Callable[..., str]:
        """What the template writes of messages, `is_asked` or not; see `chat_text`."""

        def write(messages: Sequence[Message], *, is_asked: bool) -> str:
            shown = [_without_own(message) for message in messages]
            return self._tokenizer.chat_text(shown, is_asked=is_asked, tools=tools, options=options)

        return write

    def _turn(self, message: Message, text: str, index: int) -> _Turn:
        """The turn of a message, of which the template writes this text."""
        end = max((text.rfind(stop) + len(stop) for stop in self._ends_in(text)), default=len(text))
        is_trained = _is_trained(message, index)
        given = message.get("token_ids")
        if given is None:
            if "logprobs" in message:
                raise ValueError(f"[{index}].logprobs: given without token_ids, which they are of")
            tokens = self._tokenizer.encode(text[:end])
            return _Turn(tokens=tokens, is_trained=is_trained, rest=text[end:])
        tokens = _token_ids(given, index)
        if tokens[-1] not in self._stop_texts:
            # It was cut off: the next request writes the end of the turn.
            stops = [text.rfind(stop) for stop in self._ends_in(text)]
            end = max(stops, default=len(text))
        logprobs = message.get("logprobs")
        if logprobs is not None:
            logprobs = _logprobs(logprobs, len(tokens), index)
        if not is_trained:
            logprobs = None
        return _Turn(tokens=tokens, logprobs=logprobs, is_trained=is_trained, rest=text[end:])

    def _ends_in(self, text: str) -> list[str]:
        return [stop for stop in self._stop_texts.values() if stop in text]


def check_special_tokens(tokenizer: TextTokenizer, messages: Sequence[Message]) -> None:
    """Refuse text that would become a special token, as if the template had written it.

    Raises:
        ValueError: naming the message. What was sampled as token ids is not looked at.
    """
    for i, message in enumerate(messages):
        if "token_ids" in message:
            continue
        for key in ("content", *_WRITTEN_KEYS):
            text = message.get(key, "")
            text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
            for special in tokenizer.special_texts:
                if special in text:
                    raise ValueError(
                        f"[{i}].{key}: holds {special!r}, which would become a special token; "
                        "remove it from the text"
                    )


def check_tools_are_written(
    tokenizer: TextTokenizer,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    options: dict[str, Any] | None,
) -> None:
    """Refuse tools that the chat template says nothing of.

    Raises:
        ValueError: the template writes the messages as it does without tools, or refuses them.
    """
    if not tools:
        return
    shown = [_without_own(message) for message in messages]
    without = tokenizer.chat_text(shown, is_asked=False, options=options)
    if tokenizer.chat_text(shown, is_asked=False, tools=tools, options=options) == without:
        raise ValueError(
            "the chat template writes nothing of the record's tools; remove them, or set a "
            "template that does"
        )


_WRITTEN_KEYS = ("reasoning_content", "tool_calls")
"""Of a message of the assistant, beside its content: what a template may write of it."""


def _check_written(write: Callable[..., str], messages: Sequence[Message], written: str) -> None:
    """Refuse a last message of which the template leaves out what would be trained on."""
    last = messages[-1]
    for key in _WRITTEN_KEYS:
        if not last.get(key):
            continue
        without = {name: value for name, value in last.items() if name != key}
        if write([*messages[:-1], without], is_asked=False) == written:
            raise ValueError(
                f"[{len(messages) - 1}].{key}: the chat template writes nothing of it; remove it, "
                "write it into the content, or set a template that does"
            )


def _all_or_none_have_logprobs(messages: Sequence[Message], trained: Sequence[int]) -> bool:
    """Whether the trained turns have log-probabilities."""
    without = [i for i in trained if "logprobs" not in messages[i]]
    if without and len(without) < len(trained):
        raise ValueError(f"[{without[0]}].logprobs: missing, but other turns have them")
    return not without


def _continued(before: str, after: str, index: int, when: str) -> str:
    """What comes in `after` behind `before`."""
    if not after.startswith(before):
        raise ValueError(
            f"[{index}]: the chat template does not write the same text before this turn as when "
            f"it {when}, so no tokens are those that were seen; give token ids (prompt, response, "
            "loss_mask), or a template that keeps earlier turns as they are"
        )
    return after[len(before) :]


def _is_trained(message: Message, index: int) -> bool:
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise ValueError(f"[{index}].weight: {reprlib.repr(weight)} is neither 0 nor 1")
    return bool(weight)


def _without_own(message: Message) -> Message:
    """The message as a template knows it."""
    return {key: value for key, value in message.items() if key not in SAMPLED_KEYS}


def _token_ids(given: Any, index: int) -> Tokens:
    if not isinstance(given, list) or not given or any(type(token) is not int for token in given):
        raise ValueError(f"[{index}].token_ids: {reprlib.repr(given)} is no list of token ids")
    return tuple(given)


def _logprobs(given: Any, count: int, index: int) -> tuple[float, ...]:
    if not isinstance(given, list) or any(type(value) not in (int, float) for value in given):
        raise ValueError(f"[{index}].logprobs: {reprlib.repr(given)} is no list of numbers")
    if len(given) != count:
        raise ValueError(
            f"[{index}].logprobs: {len(given)} for {count} token_ids; there must be one for each"
        )
    return tuple(map(float, given))

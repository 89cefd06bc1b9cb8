"""Completion requests, and what of them a server understands.

The first request has every field. A server that refuses it is asked in plainer ways, until one is
answered: text in place of token ids, without the fields of its kind, and at last field by field.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from megatron_prefix.config import ServerConfig
from megatron_prefix.rollouts.prompts import Prompt
from megatron_prefix.rollouts.sampling.sampler import Wanted
from megatron_prefix.rollouts.server.answers import Reader, gives_token_ids
from megatron_prefix.rollouts.server.client import (
    RequestFailed,
    RequestRefused,
    ServerClient,
    ServerError,
)

logger = logging.getLogger(__name__)

_EXTRAS: dict[str, dict[str, Any]] = {
    # A model's own generation_config.json gives vLLM its defaults: each has to be set.
    kind: {
        "return_token_ids": True,
        "skip_special_tokens": False,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    for kind in ("vllm", "sglang")
}
_OPTIONAL = ("extras", "n", "seed", "logprobs", "top_p")
"""What a request can do without, `extras` being the fields of the server's kind."""
_WRONG_FIELD = (400, 422, 501)
"""Statuses that may mean a field; with any other, a request stays refused in another form."""


class Form(NamedTuple):
    """How a server is asked."""

    as_ids: bool
    """With prompts as token ids; else as text."""
    without: frozenset[str]
    """Fields that it refuses, of `_OPTIONAL`."""


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What a server can do, as seen in its answers to the first requests."""

    form: Form
    """The richest one that it understands."""
    takes_n: bool
    """Several responses to one request are of use."""
    gives_ids: bool
    gives_logprobs: bool

    def __str__(self) -> str:
        without = self.form.without
        refused = f"; refuses {', '.join(sorted(without))}" if without else ""
        return (
            f"prompts as {'token ids' if self.form.as_ids else 'text'}, "
            f"{'n responses' if self.takes_n else 'one response'} a request, responses as "
            f"{'token ids' if self.gives_ids else 'text'}, "
            f"{'with' if self.gives_logprobs else 'without'} log-probabilities{refused}"
        )


class Requests:
    """Makes the requests to a server, and finds out which are understood."""

    def __init__(self, client: ServerClient, config: ServerConfig, reader: Reader) -> None:
        self.model = config.model
        """What requests name as the model."""
        self._client = client
        self._reader = reader
        self._extras = dict(_EXTRAS.get(config.kind, {}))
        # vLLM gives them to all requests or to none.
        self._asks_for_routes = reader.routes is not None and config.kind == "sglang"
        if self._extras:
            self._extras["stop_token_ids"] = list(reader.spec.stop_tokens)
        if self._asks_for_routes:
            self._extras["return_routed_experts"] = True

    def find_abilities(self, prompt: Prompt) -> Abilities:
        """Ask in the richest way, and in plainer ones while the server refuses; a `ServerError`
        where it refuses all of them, or a sampling that was configured."""
        refusals: list[str] = []

        def answer(*form: Any) -> Any:
            body = self.body(Wanted(prompt=prompt, count=2), Form(*form))
            try:
                return self._client.send("POST", "/v1/completions", body, attempts=2)
            except (RequestRefused, RequestFailed) as error:
                if isinstance(error, RequestRefused) and error.status not in _WRONG_FIELD:
                    raise ServerError(f"{prompt.source}: {error}") from error
                refusals.append(str(error))
                return None

        extras, every = frozenset({"extras"}), frozenset(_OPTIONAL)
        rich = (frozenset(), extras) if self._extras else (extras,)
        prompts = [True] if self._reader.tokenizer is None else [True, False]
        for as_ids, without in [*product(prompts, rich), *product(prompts, [every])]:
            found = answer(as_ids, without)
            if found is not None and without == every:
                alone = {name: answer(as_ids, every - {name}) for name in _OPTIONAL}
                without = frozenset(name for name, one in alone.items() if one is None)
                found = answer(as_ids, without)
            if found is not None:
                if "top_p" in without and self._reader.spec.top_p < 1:
                    raise ServerError(
                        f"rollouts.top_p: {self._reader.spec.top_p}, but the server takes no top_p "
                        f"({refusals[-1]}); set it to 1"
                    )
                return self._seen(found, Form(as_ids, without))
        raise ServerError(f"{prompt.source}: {refusals[-1]}")

    def _seen(self, answer: Any, form: Form) -> Abilities:
        choices = choices_of(answer, self._client.url)
        first = choices[0] if choices else {}
        gives_ids = gives_token_ids(first)
        if not self._extras:
            form = form._replace(without=form.without - {"extras"})
        abilities = Abilities(
            form=form,
            # Text is checked by its count of tokens, which is given for all choices together.
            # Of several choices SGLang gives the routes of the first one.
            takes_n=len(choices) == 2 and gives_ids and not self._asks_for_routes,
            gives_ids=gives_ids,
            gives_logprobs=isinstance(first.get("logprobs"), dict),
        )
        logger.info("%s: %s", self._client.url, abilities)
        return abilities

    def body(self, wanted: Wanted, form: Form) -> dict[str, Any]:
        """A request for responses; a `ServerError` where no text gives a prompt's tokens."""
        spec = self._reader.spec
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(wanted.prompt.tokens) if form.as_ids else self._text(wanted.prompt),
            "max_tokens": spec.max_response_length,
            "temperature": spec.temperature,
            "top_p": spec.top_p,
            "n": wanted.count,
            "logprobs": 1,
            "seed": wanted.seed,
            **({} if "extras" in form.without else self._extras),
        }
        return {name: value for name, value in body.items() if name not in form.without}

    def _text(self, prompt: Prompt) -> str:
        tokenizer = self._reader.tokenizer
        text = None if tokenizer is None else tokenizer.as_text(prompt.tokens)
        if text is None:
            raise ServerError(
                f"{prompt.source}: prompt: the server takes text only, and no text gives exactly "
                "these tokens; give the prompt as text, or use a server that takes token ids"
            )
        return text


def choices_of(answer: Any, url: str) -> list[dict[str, Any]]:
    """The choices of an answer; an answer without them is a `ServerError`."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise ServerError(f"{url}/v1/completions: an answer without choices: {str(answer)[:200]}")
    return choices

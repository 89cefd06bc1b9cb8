"""Completion requests: what a server understands, and the answers to a batch of prompts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_prefix.config import ServerConfig
from megatron_prefix.rollouts.prompts import Prompt
from megatron_prefix.rollouts.server.answers import (
    OtherWeights,
    Reader,
    Sample,
    SampleRejected,
    ServerMismatch,
    check_prompt_count,
    gives_token_ids,
)
from megatron_prefix.rollouts.server.client import (
    RequestFailed,
    RequestRefused,
    ServerClient,
    ServerError,
)
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

_EXTRAS: dict[str, dict[str, Any]] = {
    # A model's own generation_config.json gives vLLM its defaults: each has to be set.
    "vllm": {
        "return_token_ids": True,
        "skip_special_tokens": False,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    },
    "sglang": {
        "return_token_ids": True,
        "skip_special_tokens": False,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    },
}


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What a server can do, as seen in its answer to a first request."""

    takes_ids: bool
    """Prompts as token ids; else as text."""
    takes_extras: bool
    """The extra fields of its kind."""
    takes_n: bool
    """Several responses to one request are of use."""
    gives_ids: bool
    gives_logprobs: bool

    def __str__(self) -> str:
        return (
            f"prompts as {'token ids' if self.takes_ids else 'text'}, "
            f"{'n responses' if self.takes_n else 'one response'} a request, responses as "
            f"{'token ids' if self.gives_ids else 'text'}, "
            f"{'with' if self.gives_logprobs else 'without'} log-probabilities"
        )


@dataclass(kw_only=True)
class Tally:
    """What happened while a batch was sampled."""

    samples: int = 0
    from_text: int = 0
    rejected: int = 0
    """Responses that could not be used."""
    failed_requests: int = 0
    environment_failures: int = 0
    """Calls of an environment that raised, crashed or took too long."""
    turns: int = 0
    """Of all samples of several turns."""
    reasons: list[str] = dataclasses.field(default_factory=list)
    """The first few."""

    def reject(self, count: int, reason: str) -> None:
        """Count responses that are missing for one reason."""
        self.rejected += count
        if count and len(self.reasons) < 3:
            self.reasons.append(reason)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """So many responses to a prompt."""

    prompt: Prompt
    count: int
    seed: int


class Asker:
    """Asks one server for responses."""

    def __init__(
        self,
        client: ServerClient,
        config: ServerConfig,
        reader: Reader,
        *,
        temperature: float,
        top_p: float,
    ) -> None:
        """Nothing is asked yet.

        Args:
            client: the way to the server.
            config: of the server.
            reader: of its answers.
            temperature: of the sampling.
            top_p: of the sampling.
        """
        self.model = config.model
        """What requests name as the model."""
        self.weights: str | None = None
        """Version that answers have to be of, where they tell it; None: any."""
        self.abilities: Abilities | None = None
        """Found by the first `ask`."""
        self._client = client
        self._config = config
        self._reader = reader
        self._temperature = temperature
        self._top_p = top_p

    def find_model(self) -> None:
        """Take the server's only model where none is configured, and refuse one it does not list.

        Raises:
            ServerError: the server lists another, several or none.
        """
        listed = self._client.get("/v1/models")
        entries = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(entries, list):
            raise ServerError(f"{self._client.url}/v1/models: is no list of models: {listed}")
        names = [str(entry.get("id")) for entry in entries if isinstance(entry, dict)]
        if self.model is None and len(names) == 1:
            self.model = names[0]
        if self.model not in names:
            raise ServerError(
                f"server.model: {self.model} is not on {self._client.url}, which lists "
                f"{', '.join(names) or 'none'}; name one of them"
            )

    def ask(self, wanted: Sequence[Wanted], tally: Tally) -> list[list[Sample]]:
        """Samples for each of the wanted, as many as came out well.

        Raises:
            ServerError: the server is down, refuses a request, or serves another model.
        """
        if self.abilities is None and wanted:
            self.abilities = self._find_abilities(wanted[0].prompt)
            logger.info("%s: %s", self._client.url, self.abilities)
        requests = []
        for index, item in enumerate(wanted):
            if self.abilities is not None and self.abilities.takes_n:
                requests.append((index, item))
            else:
                requests += [
                    (index, dataclasses.replace(item, count=1, seed=(item.seed + i) % (1 << 31)))
                    for i in range(item.count)
                ]
        samples: list[list[Sample]] = [[] for _ in wanted]
        threads = ThreadPoolExecutor(max_workers=self._config.concurrency)
        try:
            answers = threads.map(self._one, [item for _, item in requests])
            for (index, item), answer in zip(requests, answers, strict=True):
                if isinstance(answer, RequestFailed):
                    tally.failed_requests += 1
                    tally.reject(item.count, str(answer))
                else:
                    samples[index] += self._read(item, answer, tally)
        finally:
            threads.shutdown(wait=True, cancel_futures=True)
        return samples

    def _one(self, wanted: Wanted) -> Any:
        assert self.abilities is not None
        body = self._body(
            wanted.prompt,
            count=wanted.count,
            seed=wanted.seed,
            as_ids=self.abilities.takes_ids,
            with_extras=self.abilities.takes_extras,
        )
        try:
            return self._client.post("/v1/completions", body)
        except RequestFailed as error:
            return error
        except RequestRefused as error:
            raise ServerError(f"{wanted.prompt.source}: {error}") from error

    def _read(self, wanted: Wanted, answer: Any, tally: Tally) -> list[Sample]:
        choices = _choices(answer, self._client.url)
        self._check_weights(answer)
        usage = answer.get("usage") if isinstance(answer.get("usage"), dict) else None
        check_prompt_count(usage, wanted.prompt.tokens, wanted.prompt.source)
        if len(choices) < wanted.count:
            tally.reject(wanted.count - len(choices), f"{len(choices)} of {wanted.count} came back")
        read = []
        for choice in choices[: wanted.count]:
            try:
                sample = self._reader.read(
                    choice, wanted.prompt.tokens, usage if len(choices) == 1 else None
                )
            except SampleRejected as error:
                tally.reject(1, str(error))
                continue
            except ServerMismatch as error:
                raise ServerMismatch(f"{wanted.prompt.source}: {error}") from error
            read.append(sample)
            tally.samples += 1
            tally.from_text += sample.from_text
        return read

    def _check_weights(self, answer: dict[str, Any]) -> None:
        """SGLang says in each answer which weights it is of."""
        metadata = answer.get("metadata")
        found = metadata.get("weight_version") if isinstance(metadata, dict) else None
        if None not in (found, self.weights) and found != self.weights:
            raise OtherWeights(
                f"{self._client.url}: answers with weights of version {found}, but {self.weights} "
                "were loaded; does something else load weights into this server?"
            )

    def _find_abilities(self, prompt: Prompt) -> Abilities:
        """Ask in the richest way, and in plainer ones while the server refuses."""
        refusals: list[str] = []
        ways = [
            (as_ids, with_extras)
            for as_ids in (True, False)
            for with_extras in ((True, False) if self._config.kind in _EXTRAS else (False,))
        ]
        for as_ids, with_extras in ways:
            if not as_ids and self._reader.tokenizer is None:
                break
            body = self._body(prompt, count=2, seed=0, as_ids=as_ids, with_extras=with_extras)
            try:
                answer = self._client.post("/v1/completions", body)
            except RequestRefused as error:
                refusals.append(str(error))
                # Anything else than "this field is wrong" stays as it is in another form.
                if error.status in (400, 422):
                    continue
                break
            choices = _choices(answer, self._client.url)
            first = choices[0] if choices else {}
            gives_ids = gives_token_ids(first)
            return Abilities(
                takes_ids=as_ids,
                takes_extras=with_extras,
                # Text is checked by its count of tokens, which is given for all choices together.
                takes_n=len(choices) == 2 and gives_ids,
                gives_ids=gives_ids,
                gives_logprobs=isinstance(first.get("logprobs"), dict),
            )
        raise ServerError(f"{prompt.source}: {refusals[-1]}")

    def _body(
        self, prompt: Prompt, *, count: int, seed: int, as_ids: bool, with_extras: bool
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(prompt.tokens) if as_ids else self._text(prompt),
            "n": count,
            "max_tokens": self._reader.max_response_length,
            "temperature": self._temperature,
            "top_p": self._top_p,
            "logprobs": 1,
            "seed": seed,
        }
        if with_extras:
            body |= _EXTRAS[self._config.kind]
            body["stop_token_ids"] = list(self._reader.stop_tokens)
        return body

    def _text(self, prompt: Prompt) -> str:
        tokenizer: TextTokenizer | None = self._reader.tokenizer
        text = None if tokenizer is None else tokenizer.as_text(prompt.tokens)
        if text is None:
            raise ServerError(
                f"{prompt.source}: prompt: the server takes text only, and no text gives exactly "
                "these tokens; give the prompt as text, or use a server that takes token ids"
            )
        return text


def request_seed(*, seed: int, step: int, prompt: int, attempt: int) -> int:
    """Of a group's first request; those of its later ones count on from it."""
    state = np.random.SeedSequence([seed, step, prompt, attempt]).generate_state(1)
    return int(state[0]) % (1 << 31)


def _choices(answer: Any, url: str) -> list[dict[str, Any]]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise ServerError(f"{url}/v1/completions: an answer without choices: {str(answer)[:200]}")
    return choices

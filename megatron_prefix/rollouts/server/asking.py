"""The answers of a server to a batch of prompts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from megatron_prefix.config import ServerConfig
from megatron_prefix.rollouts.prompts import Prompt
from megatron_prefix.rollouts.routes import FIELD as ROUTES
from megatron_prefix.rollouts.sampling.sampler import Response, Tally, Wanted
from megatron_prefix.rollouts.server.abilities import Abilities, Requests, choices_of
from megatron_prefix.rollouts.server.answers import (
    OtherWeights,
    Reader,
    SampleRejected,
    ServerMismatch,
    check_prompt_count,
    of_logprobs,
)
from megatron_prefix.rollouts.server.client import (
    RequestFailed,
    RequestRefused,
    ServerClient,
    ServerDown,
    ServerError,
)
from megatron_prefix.rollouts.text.tokenizer import Tokens

logger = logging.getLogger(__name__)


class Asker:
    """Asks one server for responses, and reads its answers."""

    def __init__(self, client: ServerClient, config: ServerConfig, reader: Reader) -> None:
        self.weights: str | None = None
        """Version that answers have to be of, where they tell it; None: any."""
        self.abilities: Abilities | None = None
        """Found by the first `ask`."""
        self.client = client
        self.requests = Requests(client, config, reader)
        self._concurrency = config.concurrency
        self._reader = reader
        self._probe: Prompt | None = None
        self._n_differs = False
        """Whether responses of one request have differed: several are of use, then."""
        self._has_warned = False

    def find_model(self) -> None:
        """Take the server's only model where none is configured, and refuse one it does not
        list."""
        listed = self.client.send("GET", "/v1/models")
        entries = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(entries, list):
            raise ServerError(f"{self.client.url}/v1/models: is no list of models: {listed}")
        names = [str(entry.get("id")) for entry in entries if isinstance(entry, dict)]
        if self.requests.model is None and len(names) == 1:
            self.requests.model = names[0]
        if self.requests.model not in names:
            raise ServerError(
                f"server.model: {self.requests.model} is not on {self.client.url}, which lists "
                f"{', '.join(names) or 'none'}; name one of them"
            )

    def ask(self, wanted: Sequence[Wanted], tally: Tally) -> list[list[Response]]:
        """Samples for each of the wanted, as many as came out well. A server that is down, refuses
        a request or serves another model is a `ServerError`."""
        if not wanted:
            return []
        if self.abilities is None:
            self._probe = wanted[0].prompt
            self.abilities = self.requests.find_abilities(self._probe)
        samples = self._asked(wanted, tally)
        return self._without_copies(wanted, samples, tally)

    def _asked(self, wanted: Sequence[Wanted], tally: Tally) -> list[list[Response]]:
        assert self.abilities is not None
        requests = [
            (index, dataclasses.replace(item, count=count, seed=(item.seed + i) % (1 << 31)))
            for index, item in enumerate(wanted)
            for i, count in enumerate([item.count] if self.abilities.takes_n else [1] * item.count)
        ]
        samples: list[list[Response]] = [[] for _ in wanted]
        threads = ThreadPoolExecutor(max_workers=self._concurrency)
        try:
            answers = threads.map(self._one, [item for _, item in requests])
            for (index, item), answer in zip(requests, answers, strict=True):
                if isinstance(answer, RequestFailed):
                    tally.reject(item.count, str(answer))
                else:
                    samples[index] += self._read(item, answer, tally)
        finally:
            threads.shutdown(wait=True, cancel_futures=True)
        return samples

    def _without_copies(
        self, wanted: Sequence[Wanted], samples: list[list[Response]], tally: Tally
    ) -> list[list[Response]]:
        """The samples, those of a server that copies one response n times asked for one by one.

        A policy that is certain gives equal responses too: one group, asked again, tells the two
        apart, until the responses of one request have differed.
        """
        equal = [i for i, found in enumerate(samples) if len(found) > 1 and _are_equal(found)]
        several = sum(len(found) > 1 for found in samples)
        assert self.abilities is not None
        if self.abilities.takes_n and not self._n_differs:
            self._n_differs = several > len(equal)
            if equal and not self._n_differs:
                by_n = self.abilities
                self.abilities = dataclasses.replace(by_n, takes_n=False)
                (again,) = self._asked([wanted[equal[0]]], Tally())
                if len(again) > 1 and not _are_equal(again):
                    logger.warning(
                        "%s: answers a request for n responses with n copies, and single requests "
                        "with different ones; they are asked for one by one",
                        self.client.url,
                    )
                    for i, found in zip(
                        equal, self._asked([wanted[i] for i in equal], tally), strict=True
                    ):
                        samples[i] = found
                    return self._without_copies(wanted, samples, tally)
                self.abilities = by_n
        tally.identical_groups += len(equal)
        if len(equal) == several > 1 and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s: the responses to each of %d prompts are all the same, so that they teach "
                "nothing; it may decode greedily or overlook seeds, or the policy may be certain",
                *(self.client.url, several),
            )
        return samples

    def can_be_asked(self, tokens: Tokens) -> bool:
        """Whether responses can be sampled behind these tokens, for all that is known."""
        if self.abilities is None or self.abilities.form.as_ids:
            return True
        tokenizer = self._reader.tokenizer
        return tokenizer is not None and tokenizer.as_text(tokens) is not None

    def fingerprint(self) -> list[float] | None:
        """Log-probabilities that the server's weights give to the likeliest answer to the first
        prompt; None where it gives none, or has not been asked yet."""
        if self._probe is None or self.abilities is None or not self.abilities.gives_logprobs:
            return None
        wanted = Wanted(prompt=self._probe, count=1, seed=0)
        try:
            answer = self._one(wanted, temperature=0.0)
        except ServerDown:
            raise
        except ServerError:  # such as one that refuses this temperature
            return None
        choices = [] if isinstance(answer, RequestFailed) else answer.get("choices")
        return of_logprobs(choices[0], "token_logprobs") if choices else None

    def _one(self, wanted: Wanted, **changes: Any) -> Any:
        assert self.abilities is not None
        body = self.requests.body(wanted, self.abilities.form)
        try:
            return self.client.send("POST", "/v1/completions", body | changes)
        except RequestFailed as error:
            return error
        except RequestRefused as error:
            raise ServerError(f"{wanted.prompt.source}: {error}") from error

    def _read(self, wanted: Wanted, answer: Any, tally: Tally) -> list[Response]:
        choices = choices_of(answer, self.client.url)
        self._check_weights(answer)
        prompt, usage = wanted.prompt, answer.get("usage")
        check_prompt_count(usage, prompt.tokens, prompt.source)
        if len(choices) < wanted.count:
            tally.reject(wanted.count - len(choices), f"{len(choices)} of {wanted.count} came back")
        if len(choices) == 1:
            choices = [_with_routes_of_answer(choices[0], answer)]
        else:
            usage = None
        read = []
        for choice in choices[: wanted.count]:
            try:
                read.append(self._reader.read(choice, prompt.tokens, usage))
            except SampleRejected as error:
                tally.reject(1, str(error))
            except ServerMismatch as error:
                raise ServerMismatch(f"{prompt.source}: {error}") from error
        return read

    def _check_weights(self, answer: dict[str, Any]) -> None:
        """SGLang says in each answer which weights it is of."""
        metadata = answer.get("metadata")
        found = metadata.get("weight_version") if isinstance(metadata, dict) else None
        if None not in (found, self.weights) and found != self.weights:
            raise OtherWeights(
                f"{self.client.url}: answers with weights of version {found}, but {self.weights} "
                "were loaded; does something else load weights into this server?"
            )


def _with_routes_of_answer(choice: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """SGLang has the routes of the first choice beside the choices."""
    beside = answer.get("sglext")
    found = beside.get(ROUTES) if isinstance(beside, dict) else None
    return choice if choice.get(ROUTES) is not None else {**choice, ROUTES: found}


def _are_equal(samples: Sequence[Response]) -> bool:
    return all(np.array_equal(sample.tokens, samples[0].tokens) for sample in samples)

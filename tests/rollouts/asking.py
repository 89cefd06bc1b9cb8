"""What the tests of servers share: a sampler that asks one, and answers as servers write them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from megatron_prefix.config import ServerConfig
from megatron_prefix.rollouts.prompts import PromptSource, prompt_stream
from megatron_prefix.rollouts.rewards import exact_match
from megatron_prefix.rollouts.routes import RouteReader
from megatron_prefix.rollouts.sampling.groups import Batch, GroupMaker, GroupSpec
from megatron_prefix.rollouts.sampling.sampler import SamplingSpec, answered
from megatron_prefix.rollouts.server.answers import Reader
from megatron_prefix.rollouts.server.asking import Asker
from megatron_prefix.rollouts.server.client import ServerClient
from megatron_prefix.rollouts.server.sampler import ServerSampler
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
from megatron_prefix.rollouts.validation import Limits
from tests.rollouts.replies import Reply, ReplyServer, Request
from tests.rollouts.servers import DIGITS, END

PROMPTS = [{"prompt": [n, 1, 10], "answer": [1, n, END]} for n in range(6)]
GOOD = ("1 2", "stop", 3)
"""Text, finish reason and tokens of a response."""


def parts(
    url: str,
    path: Path,
    *,
    tokenizer: TextTokenizer | None = None,
    group_size: int = 4,
    load_again: Any = None,
    key: str | None = None,
    stop_tokens: tuple[int, ...] = (END,),
    top_p: float = 1.0,
    routes: RouteReader | None = None,
    **server: Any,
) -> tuple[BatchSampler, ServerClient]:
    config = ServerConfig(url=url, model="policy", **{"patience_s": 5.0, "kind": "vllm", **server})
    client = ServerClient(config, api_key=key)
    sampling = SamplingSpec(
        group_size=group_size, max_response_length=4, top_p=top_p, stop_tokens=stop_tokens, seed=1
    )
    spec = GroupSpec(
        sampling=sampling,
        limits=Limits(vocab_size=16, max_positions=32),
        uses_logprobs=True,
        partial_groups=config.partial_groups,
        routes=routes,
        asked=client.url,
    )
    shape = None if routes is None else routes.shape
    asker = Asker(client, config, Reader(tokenizer=tokenizer, spec=sampling, routes=shape))
    source = prompt_stream([path], vocab_size=16, max_prompt_length=20, epochs=1)
    return BatchSampler(asker, source, GroupMaker(spec, exact_match), load_again), client


class BatchSampler:
    """Makes batches in one process, of a server whose weights are its own affair."""

    def __init__(
        self,
        asker: Asker,
        source: PromptSource,
        maker: GroupMaker,
        load_again: Any = None,
    ) -> None:
        self._asker = asker
        self._source = source
        self._maker = maker
        self._sampler = ServerSampler(asker, None, None)
        if load_again is not None:
            self._sampler.forgets, self._sampler.load_again = True, load_again

    def sample(self, num_groups: int, *, step: int, version: int | None) -> Batch:
        making = self._maker.batch(self._source, num_groups, step=step, version=version)
        return answered(making, functools.partial(self._sampler.sample, step=step))


def ids_choice(index: int, tokens: list[int], prompt: list[int], **changes: Any) -> dict[str, Any]:
    """A choice as vLLM answers with return_token_ids, and SGLang too."""
    return {
        "index": index,
        "text": " ".join(DIGITS[token] for token in tokens),
        "logprobs": {
            "tokens": [DIGITS[token] for token in tokens],
            "token_logprobs": [-0.5 - i for i in range(len(tokens))],
            "top_logprobs": [None] * len(tokens),
            "text_offset": list(range(len(tokens))),
        },
        "finish_reason": "stop" if tokens[-1] == END else "length",
        "stop_reason": None,
        "token_ids": tokens,
        "prompt_token_ids": prompt,
        **changes,
    }


def completion(choices: list[dict[str, Any]], prompt_tokens: int, tokens: int) -> dict[str, Any]:
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "policy",
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
        },
    }


def vllm_answers(request: Request) -> Reply:
    prompt, n = request.body["prompt"], request.body["n"]
    answers = [[1, prompt[0], END], [3, 4, 5, 6]]
    choices = [ids_choice(i, answers[i % 2], prompt) for i in range(n)]
    return Reply(body=completion(choices, len(prompt), 3 * n))


def text_answers(request: Request, texts: list[tuple[str, str, int]] | None = None) -> Reply:
    """A server that knows text only, one choice, and no field that OpenAI has not."""
    body = request.body
    if not isinstance(body["prompt"], str):
        return Reply(status=400, body={"detail": "prompt must be a string."})
    text, reason, count = (texts or [GOOD])[body.get("seed", 0) % len(texts or [0])]
    choice = {"index": 0, "text": text, "finish_reason": reason}
    return Reply(body=completion([choice], len(body["prompt"].split()), count))


def completions(server: ReplyServer) -> list[Request]:
    return [r for r in server.requests if r.path == "/v1/completions"]

"""Routes of experts come with a server's answers, in the forms of vLLM and of SGLang."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_prefix.rollouts.routes import RouteReader, RouteShape
from megatron_prefix.rollouts.server.answers import ServerMismatch
from tests.rollouts.asking import PROMPTS, completion, completions, ids_choice, parts, vllm_answers
from tests.rollouts.replies import Reply, Request, reply_server
from tests.rollouts.servers import END
from tests.training.runs import write_records

SHAPE = RouteShape(with_experts=(True, False, True), topk=2, num_experts=8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_records(tmp_path / "prompts.jsonl", PROMPTS)


def _drawn(num_tokens: int, seed: int, layers: int) -> NDArray:
    rng = np.random.default_rng(seed)
    return rng.random((num_tokens - 1, layers, 8)).argsort(-1)[..., :2].astype(np.int32)


def _as_numpy_file(routes: NDArray) -> str:
    file = io.BytesIO()
    np.save(file, routes)
    return base64.b64encode(file.getvalue()).decode()


def _vllm(request: Request) -> Reply:
    """Routes of each choice, as a NumPy file, of all layers."""
    body = vllm_answers(request).body
    for choice in body["choices"]:
        num_tokens = len(choice["prompt_token_ids"]) + len(choice["token_ids"])
        routes = _drawn(num_tokens, choice["index"], 3)
        choice["routed_experts"] = _as_numpy_file(routes.astype(np.uint8))
    return Reply(body=body)


def _sglang(request: Request) -> Reply:
    """Routes of the first choice, beside the choices, where they are asked for."""
    prompt, seed = request.body["prompt"], request.body["seed"]
    choices = [ids_choice(i, [1, prompt[0], END], prompt) for i in range(request.body["n"])]
    body = completion([{**c, "routed_experts": None} for c in choices], len(prompt), 3)
    if request.body.get("return_routed_experts"):
        routes = _drawn(len(prompt) + 3, seed % 100, 2)
        body["sglext"] = {"routed_experts": base64.b64encode(routes.tobytes()).decode()}
    return Reply(body=body)


@pytest.mark.parametrize("prompts_as_first", [False, True])
@pytest.mark.parametrize(("kind", "answers"), [("vllm", _vllm), ("sglang", _sglang)])
def test_a_batch_has_the_routes_of_each_response(
    path: Path, kind: str, answers: Callable[[Request], Reply], prompts_as_first: bool
) -> None:
    reader = RouteReader(shape=SHAPE, prompts_as_first=prompts_as_first)
    with reply_server(answers) as server:
        sampler, client = parts(server.url, path, kind=kind, group_size=2, routes=reader)
        rollouts = sampler.sample(2, step=0, version=None).rollouts
        client.close()
        asked = completions(server)
    assert rollouts.routes.dtype == np.uint8 and rollouts.num_responses == 4
    prompt = len(PROMPTS[0]["prompt"])
    for response in range(4):
        found = rollouts.routes_of(response)
        num_tokens = prompt + int(np.diff(rollouts.response_offsets)[response])
        if kind == "vllm":
            whole = _drawn(num_tokens, response % 2, 3)[:, [0, 2]]
        else:
            # Of several choices only the first one has them: each is asked for alone.
            seeds = sorted(r.body["seed"] % 100 for r in asked if r.body["n"] == 1)
            candidates = [np.sort(_drawn(num_tokens, seed, 2), -1) for seed in seeds]
            if not prompts_as_first:
                assert any((found == candidate).all() for candidate in candidates)
            whole = next(c for c in candidates if (found[prompt:] == c[prompt:]).all())
        expected = np.sort(whole, axis=-1)
        assert (found[prompt:] == expected[prompt:]).all()
        if prompts_as_first:
            first = rollouts.routes_of(response - response % 2)
            assert (found[:prompt] == first[:prompt]).all()
        else:
            assert (found == expected).all()


def _without(request: Request) -> Reply:
    return vllm_answers(request)


def _of_other_layers(request: Request) -> Reply:
    body = _vllm(request).body
    for choice in body["choices"]:
        num_tokens = len(choice["prompt_token_ids"]) + len(choice["token_ids"])
        choice["routed_experts"] = _as_numpy_file(_drawn(num_tokens, 0, 4))
    return Reply(body=body)


def _without_ids(request: Request) -> Reply:
    body = _vllm(request).body
    for choice in body["choices"]:
        choice |= {"token_ids": None, "logprobs": None}
    return Reply(body=body)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (_without, "gives no routed_experts, .*; start it with --enable-return-routed-experts"),
        (_of_other_layers, r"routed_experts: \[\d+, 4, 2\] experts for \d+ tokens"),
        (_without_ids, "returns no token ids, and training.replayed_routes needs"),
    ],
)
def test_answers_that_cannot_be_replayed_end_the_run(
    path: Path, answers: Callable[[Request], Reply], message: str
) -> None:
    reader = RouteReader(shape=SHAPE, prompts_as_first=False)
    options: dict[str, Any] = {"group_size": 2, "routes": reader}
    with reply_server(answers) as server:
        sampler, client = parts(server.url, path, **options)
        with pytest.raises(ServerMismatch, match=message):
            sampler.sample(1, step=0, version=None)
        client.close()

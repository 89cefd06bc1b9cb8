"""What different servers answer, and what a run makes of it; broken networks and broken servers.

Not covered here: that any of these servers really answers so. `test_openai_engine.py` samples from
a real one.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_prefix.config import ServerConfig
from megatron_prefix.rollouts.engine import EndOfRollouts
from megatron_prefix.rollouts.prompts import prompt_stream
from megatron_prefix.rollouts.rewards import exact_match
from megatron_prefix.rollouts.server.answers import Reader, ServerMismatch
from megatron_prefix.rollouts.server.asking import Asker
from megatron_prefix.rollouts.server.client import (
    RequestFailed,
    ServerClient,
    ServerDown,
    ServerError,
)
from megatron_prefix.rollouts.server.engine import BatchSampler, GroupSpec
from megatron_prefix.rollouts.server.loading import SGLangLoader, TransformersLoader, VLLMLoader
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
from tests.rollouts.files import write
from tests.rollouts.replies import Reply, ReplyServer, Request, reply_server
from tests.rollouts.servers import DIGITS, END, save_word_tokenizer

PROMPTS = [{"prompt": [n, 1, 10], "answer": [1, n, END]} for n in range(6)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    folder = save_word_tokenizer(tmp_path_factory.mktemp("tokenizer"), DIGITS, ";")
    return TextTokenizer(folder, vocab_size=16)


@pytest.fixture
def path(tmp_path) -> Path:
    return write(tmp_path / "prompts.jsonl", PROMPTS)


def parts(
    url: str,
    path: Path,
    *,
    tokenizer: TextTokenizer | None = None,
    group_size: int = 4,
    load_again: Any = None,
    key: str | None = None,
    **server: Any,
) -> tuple[BatchSampler, ServerClient]:
    config = ServerConfig(url=url, model="policy", **{"patience_s": 5.0, "kind": "vllm", **server})
    client = ServerClient(config, api_key=key)
    reader = Reader(tokenizer=tokenizer, stop_tokens=(END,), max_response_length=4)
    spec = GroupSpec(
        group_size=group_size,
        vocab_size=16,
        max_sequence_length=32,
        uses_logprobs=True,
        partial_groups=config.partial_groups,
        seed=1,
    )
    sampler = BatchSampler(
        Asker(client, config, reader, temperature=1.0, top_p=1.0),
        client,
        prompt_stream([path], vocab_size=16, max_prompt_length=20, epochs=1),
        exact_match,
        spec,
        load_again=load_again,
    )
    return sampler, client


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
    text, reason, count = (texts or [("1 2", "stop", 3)])[body["seed"] % len(texts or [0])]
    choice = {"index": 0, "text": text, "finish_reason": reason}
    return Reply(body=completion([choice], len(body["prompt"].split()), count))


def completions(server: ReplyServer) -> list[Request]:
    return [r for r in server.requests if r.path == "/v1/completions"]


def test_token_ids_and_log_probabilities_are_taken_as_the_server_gives_them(path, tokenizer):
    with reply_server(vllm_answers) as server:
        sampler, client = parts(server.url + "/v1", path, tokenizer=tokenizer)
        batch = sampler.sample(2, step=0, version=7)
        client.close()
    first, second = batch.groups
    assert first.prompt == (0, 1, 10)
    assert second.responses == ((1, 1, END), (3, 4, 5, 6), (1, 1, END), (3, 4, 5, 6))
    assert second.rewards == (1.0, 0.0, 1.0, 0.0)
    assert second.old_logprobs[1] == (-0.5, -1.5, -2.5, -3.5)
    assert second.finished == (True, False, True, False)
    assert (second.policy_version, second.source) == (7, f"{path}:2")
    assert batch.metrics["tokens_from_text"] == 0
    # One that finds out what the server can do, then one for each prompt.
    asked = completions(server)
    assert [r.body["n"] for r in asked] == [2, 4, 4]
    assert len({r.body["seed"] for r in asked}) == 3
    for name, value in {
        "model": "policy",
        "prompt": [0, 1, 10],
        "max_tokens": 4,
        "temperature": 1.0,
        "return_token_ids": True,
        "stop_token_ids": [END],
        "top_k": -1,
    }.items():
        assert asked[0].body[name] == value


@pytest.mark.parametrize(
    "changes",
    [
        # vLLM with return_tokens_as_token_ids
        {
            "token_ids": None,
            "logprobs": {
                "tokens": ["token_id:1", "token_id:2", f"token_id:{END}"],
                "token_logprobs": [-0.5, -1.5, -2.5],
            },
        },
        # SGLang where it has cut the stop token off and names it
        {"token_ids": [1, 2], "matched_stop": END, "logprobs": None},
        {"text": "1 2"},
    ],
)
def test_servers_write_the_same_tokens_in_several_ways(path, tokenizer, changes):
    def answer(request: Request) -> Reply:
        choices = [
            ids_choice(i, [1, 2, END], request.body["prompt"], **changes)
            for i in range(request.body["n"])
        ]
        return Reply(body=completion(choices, 3, 3 * len(choices)))

    with reply_server(answer) as server:
        sampler, client = parts(server.url, path, tokenizer=tokenizer, kind="sglang")
        [group] = sampler.sample(1, step=0, version=0).groups
        client.close()
    assert group.responses == ((1, 2, END),) * 4
    assert group.finished == (True,) * 4
    assert (group.old_logprobs is None) == (changes.get("logprobs", 1) is None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_token_ids": [9, 0, 1, 10]}, "read the prompt as other tokens than were sent"),
        ({"text": "seven eight"}, "it serves another tokenizer's model"),
        ({"token_ids": [1, 2, 3], "text": "1 2 3"}, "stopped after token 3, which is not in stop"),
        ({"token_ids": [1] * 9, "text": None}, "9 tokens where at most 4 were asked for"),
    ],
)
def test_a_server_of_another_model_is_found_out_and_the_record_named(
    path, tokenizer, changes, message
):
    def answer(request: Request) -> Reply:
        prompt = request.body["prompt"]
        return Reply(body=completion([ids_choice(0, [1, 2, END], prompt, **changes)] * 2, 3, 6))

    with reply_server(answer) as server:
        sampler, client = parts(server.url, path, tokenizer=tokenizer, group_size=2)
        with pytest.raises(ServerMismatch, match=message) as caught:
            sampler.sample(1, step=0, version=0)
        client.close()
    assert str(caught.value).startswith(f"{path}:1: ")


def test_text_becomes_tokens_on_its_own_and_is_said_to_be_text(path, tokenizer):
    with reply_server(text_answers) as server:
        sampler, client = parts(server.url, path, tokenizer=tokenizer)
        batch = sampler.sample(2, step=0, version=0)
        client.close()
    for n, group in enumerate(batch.groups):
        assert group.prompt == (n, 1, 10)
        assert group.responses == ((1, 2, END),) * 4
        assert group.old_logprobs is None
    assert batch.metrics["tokens_from_text"] == 1
    assert completions(server)[-1].body["prompt"] in ("0 1 >", "1 1 >")
    assert "return_token_ids" in completions(server)[0].body
    assert len(completions(server)) > 8


def test_a_prompt_that_the_server_counts_otherwise_means_another_tokenizer(path, tokenizer):
    def answer(request: Request) -> Reply:
        reply = text_answers(request)
        if reply.status == 200:
            reply.body["usage"]["prompt_tokens"] += 1
        return reply

    with reply_server(answer) as server:
        sampler, client = parts(server.url, path, tokenizer=tokenizer, kind="openai")
        with pytest.raises(ServerMismatch, match=r"jsonl:1: prompt: 3 tokens, but .* counts 4"):
            sampler.sample(1, step=0, version=0)
        client.close()


GOOD = ("1 2", "stop", 3)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (("1 2", "stop", 5), "is 3 tokens, but the server sampled 5"),
        (("1 2", "length", 3), "is 2 tokens, but the server sampled 3"),
        (("1 two", "stop", 3), "does not come back from its tokens"),
        (("1 2", "abort", 3), "finish_reason is 'abort'"),
    ],
)
def test_a_response_whose_tokens_are_not_certain_is_asked_for_again(path, tokenizer, bad, reason):
    with reply_server(lambda request: text_answers(request, [GOOD, bad])) as server:
        sampler, client = parts(server.url, path, tokenizer=tokenizer, kind="openai")
        batch = sampler.sample(1, step=0, version=0)
        assert batch.groups[0].responses == ((1, 2, END),) * 4
        assert batch.metrics["partial_groups"] == 1
        assert batch.metrics["rejected_responses"] >= 2
        server.script = lambda request: text_answers(request, [bad])
        with pytest.raises(ServerError, match=f"in 5 rounds only 0 of 1 .*{re.escape(reason)}"):
            sampler.sample(1, step=0, version=0)
        client.close()


@pytest.mark.parametrize(
    ("policy", "sources", "sizes"), [("drop", [2, 3], [4, 4]), ("keep", [1, 2], [2, 4])]
)
def test_groups_with_missing_responses_are_dropped_or_kept_as_configured(
    path, tokenizer, policy, sources, sizes
):
    def answer(request: Request) -> Reply:
        is_first = request.body["prompt"] == "0 1 >"
        return text_answers(request, [GOOD, ("1 2", "abort", 3)] if is_first else [GOOD])

    with reply_server(answer) as server:
        sampler, client = parts(
            server.url, path, tokenizer=tokenizer, kind="openai", partial_groups=policy
        )
        batch = sampler.sample(2, step=0, version=0)
        client.close()
    assert [group.source for group in batch.groups] == [f"{path}:{line}" for line in sources]
    assert [len(group.responses) for group in batch.groups] == sizes
    assert batch.metrics["dropped_groups"] == (policy == "drop")
    assert batch.metrics["partial_groups"] == 1


@pytest.mark.parametrize(
    "fault",
    [
        Reply(
            status=429, body={"error": {"message": "slow down"}}, headers=(("retry-after", "1"),)
        ),
        Reply(status=503, body=b"starting"),
        Reply(status=500, body=b"Internal Server Error"),
        Reply(body={"choices": []}, cut_at=5),
        Reply(body=b'{"choices": ['),
        Reply(body={"choices": []}, delay_s=1.5),
    ],
    ids=["too many", "starting", "broken", "disconnected", "truncated", "slow"],
)
def test_a_request_that_goes_wrong_once_costs_time_only(path, fault):
    faults = [fault]

    def answer(request: Request) -> Reply:
        if request.body["n"] == 4 and faults:
            return faults.pop()
        return vllm_answers(request)

    with reply_server(answer) as server:
        sampler, client = parts(server.url, path, request_timeout_s=1.0)
        batch = sampler.sample(2, step=0, version=0)
        client.close()
    assert [len(group.responses) for group in batch.groups] == [4, 4]
    assert batch.metrics["server_retries"] == 1
    assert batch.metrics["rejected_responses"] == 0


def test_a_request_that_keeps_failing_makes_its_group_partial(path):
    def answer(request: Request) -> Reply:
        if request.body["n"] > 2 and request.body["prompt"][0] == 0:
            return Reply(status=500, body=b"")
        return vllm_answers(request)

    with reply_server(answer) as server:
        sampler, client = parts(server.url, path, partial_groups="drop", max_attempts=2)
        batch = sampler.sample(1, step=0, version=0)
        client.close()
    assert [group.source for group in batch.groups] == [f"{path}:2"]
    assert batch.metrics["dropped_groups"] == 1


def test_a_refusal_is_told_at_once_in_the_servers_words_and_nothing_is_used_up(path):
    def answer(request: Request) -> Reply:
        if request.headers.get("authorization") != "Bearer secret":
            return Reply(status=401, body={"error": {"message": "Incorrect API key"}})
        return vllm_answers(request)

    with reply_server(answer) as server:
        sampler, client = parts(server.url, path, key="wrong")
        with pytest.raises(ServerError, match=r"401 .*: Incorrect API key; set server.api_key_var"):
            sampler.sample(1, step=0, version=0)
        client.close()
        assert len(server.requests) == 1
        sampler, client = parts(server.url, path, key="secret")
        assert sampler.sample(6, step=0, version=0).groups[0].source == f"{path}:1"
        with pytest.raises(EndOfRollouts):
            sampler.sample(1, step=0, version=0)
        client.close()


def test_a_server_that_stays_away_ends_the_run_after_its_patience_with_nothing_used_up(path):
    with reply_server(vllm_answers) as server:
        url = server.url
    sampler, client = parts(url, path, patience_s=1.0)
    started = time.monotonic()
    with pytest.raises(ServerDown, match=f"{url}: not reachable for 1 s .*Start the server"):
        sampler.sample(1, step=0, version=0)
    assert 1 < time.monotonic() - started < 6
    client.close()
    assert sampler._source.state_dict()["number"] == 0


def test_no_more_requests_are_under_way_than_allowed(path, tokenizer):
    def answer(request: Request) -> Reply:
        return dataclasses.replace(text_answers(request), delay_s=0.05)

    with reply_server(answer) as server:
        sampler, client = parts(server.url, path, tokenizer=tokenizer, concurrency=3)
        sampler.sample(4, step=0, version=0)
        client.close()
    assert server.most_at_once == 3


@pytest.mark.parametrize("tells_version", [False, True])
@pytest.mark.parametrize("is_noticed", [False, True])
def test_a_server_that_was_started_anew_gets_the_weights_before_its_answers_count(
    path, tells_version, is_noticed
):
    """Noticed as a broken connection, or by the version that SGLang tells."""
    loaded: list[str] = []
    broken = [Reply(body={"choices": []}, cut_at=0)] if is_noticed else []

    def answer(request: Request) -> Reply:
        if request.body["n"] == 4 and broken:
            return broken.pop()
        reply = vllm_answers(request)
        if tells_version:
            reply.body["metadata"] = {"weight_version": loaded[-1] if loaded else "default"}
        return reply

    with reply_server(answer) as server:
        sampler, client = parts(server.url, path, load_again=lambda: loaded.append("3"))
        sampler._asker.weights = "3"
        batch = sampler.sample(2, step=0, version=3)
        client.close()
    assert loaded == ["3"] * (is_noticed or tells_version)
    assert len(batch.groups) == 2
    # A first one, the batch's two (one of them twice where it broke), and both after the loading.
    again = 2 if loaded else 0
    assert len(completions(server)) <= 3 + is_noticed + again


def test_answers_of_other_weights_than_were_loaded_end_the_run(path):
    def answer(request: Request) -> Reply:
        reply = vllm_answers(request)
        return Reply(body={**reply.body, "metadata": {"weight_version": "3"}})

    with reply_server(answer) as server:
        sampler, client = parts(server.url, path, kind="sglang", load_again=lambda: None)
        sampler._asker.weights = "3"
        assert len(sampler.sample(1, step=0, version=3).groups) == 1
        sampler._asker.weights = "4"
        with pytest.raises(ServerMismatch, match="weights of version 3, but 4 were loaded"):
            sampler.sample(1, step=0, version=4)
        client.close()


def loading(script: Any, kind: str) -> ServerClient:
    return ServerClient(ServerConfig(url=script.url, kind=kind, max_attempts=2, patience_s=2.0))


def test_weights_are_loaded_by_the_calls_that_each_server_documents():
    def answer(request: Request) -> Reply:
        if request.path == "/load_model":
            events = [{"status": "loading"}, {"status": "ready"}]
            return Reply(body="".join(f"data: {json.dumps(e)}\n\n" for e in events).encode())
        return Reply(body={"success": True, "message": "ok"})

    with reply_server(answer) as server:
        for loader in (VLLMLoader, SGLangLoader, TransformersLoader):
            client = loading(server, "vllm")
            made = loader(client)
            made.load(Path("/policy/version_000003"), 3)
            client.close()
    assert made.model() == "/policy/version_000003"
    folder = "/policy/version_000003"
    assert [(r.path, r.body) for r in server.requests] == [
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}}),
        ("/reset_prefix_cache", {}),
        (
            "/update_weights_from_disk",
            {
                "model_path": folder,
                "flush_cache": True,
                "abort_all_requests": True,
                "weight_version": "3",
            },
        ),
        ("/reset", {}),
        ("/load_model", {"model": folder}),
    ]


@pytest.mark.parametrize(
    ("loader", "reply", "error", "message"),
    [
        (VLLMLoader, Reply(status=404, body={"detail": "Not Found"}), ServerError, "DEV_MODE=1"),
        (SGLangLoader, Reply(body={"success": False, "message": "shapes"}), ServerError, "shapes"),
        (
            TransformersLoader,
            Reply(body=b'data: {"status": "error", "model": "m", "message": "no config"}\n\n'),
            ServerError,
            "loading m failed: no config",
        ),
        (
            TransformersLoader,
            Reply(body=b'data: {"status": "load'),
            RequestFailed,
            "failed 2 times",
        ),
        (TransformersLoader, Reply(status=404, body={}), ServerError, "is it transformers serve"),
    ],
)
def test_weights_that_are_not_loaded_are_an_error_in_the_servers_words(
    loader, reply, error, message
):
    def answer(request: Request) -> Reply:
        return Reply(body={"status": "ok"}) if request.path == "/reset" else reply

    with reply_server(answer) as server:
        client = loading(server, "vllm")
        with pytest.raises(error, match=message):
            loader(client).load(Path("/policy/version_000003"), 3)
        client.close()


@pytest.mark.parametrize(
    ("model", "listed", "message"),
    [
        ("policy", ["other"], "server.model: policy is not on .* which lists other"),
        (None, ["a", "b"], "server.model: None is not on .* which lists a, b"),
    ],
)
def test_a_model_that_the_server_does_not_list_is_named_with_those_it_does(model, listed, message):
    answer = Reply(body={"object": "list", "data": [{"id": name} for name in listed]})
    with reply_server(lambda request: answer) as server:
        config = ServerConfig(url=server.url, model=model)
        client = ServerClient(config)
        reader = Reader(tokenizer=None, stop_tokens=(END,), max_response_length=4)
        asker = Asker(client, config, reader, temperature=1.0, top_p=1.0)
        with pytest.raises(ServerError, match=message):
            asker.find_model()
        server.script = lambda request: Reply(body={"data": [{"id": model or "only"}]})
        asker.find_model()
        assert asker.model == (model or "only")
        client.close()

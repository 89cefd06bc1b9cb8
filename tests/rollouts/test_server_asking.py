"""Broken networks, broken servers, servers that were started anew: what a run makes of them."""

from __future__ import annotations

import dataclasses
import socket
import time

import numpy as np
import pytest

from megatron_prefix.config import ServerConfig
from megatron_prefix.rollouts.engine import EndOfRollouts
from megatron_prefix.rollouts.sampling.sampler import SamplingSpec
from megatron_prefix.rollouts.server.answers import Reader, ServerMismatch
from megatron_prefix.rollouts.server.asking import Asker
from megatron_prefix.rollouts.server.client import ServerClient, ServerDown, ServerError
from tests.rollouts.asking import GOOD, completions, parts, text_answers, vllm_answers
from tests.rollouts.replies import Reply, Request, reply_server
from tests.rollouts.servers import END


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
    assert list(batch.rollouts.sources) == [f"{path}:{line}" for line in sources]
    assert np.diff(batch.rollouts.group_offsets).tolist() == sizes
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
        Reply(body={"choices": []}, delay_s=4.0),
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
        sampler, client = parts(server.url, path, request_timeout_s=3.0)
        batch = sampler.sample(2, step=0, version=0)
        client.close()
    assert np.diff(batch.rollouts.group_offsets).tolist() == [4, 4]
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
    assert list(batch.rollouts.sources) == [f"{path}:2"]
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
        assert sampler.sample(6, step=0, version=0).rollouts.sources[0] == f"{path}:1"
        with pytest.raises(EndOfRollouts):
            sampler.sample(1, step=0, version=0)
        client.close()


def test_a_server_that_stays_away_ends_the_run_after_its_patience_with_nothing_used_up(path):
    # A bound port without a listener refuses connections, and no other process can take it.
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
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
    assert batch.rollouts.num_groups == batch.num_groups == 2
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
        assert sampler.sample(1, step=0, version=3).num_groups == 1
        sampler._asker.weights = "4"
        with pytest.raises(ServerMismatch, match="weights of version 3, but 4 were loaded"):
            sampler.sample(1, step=0, version=4)
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
        spec = SamplingSpec(max_response_length=4, stop_tokens=(END,))
        asker = Asker(client, config, Reader(tokenizer=None, spec=spec))
        with pytest.raises(ServerError, match=message):
            asker.find_model()
        server.script = lambda request: Reply(body={"data": [{"id": model or "only"}]})
        asker.find_model()
        assert asker.requests.model == (model or "only")
        client.close()

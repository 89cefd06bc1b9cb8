"""What different servers answer, and the tokens that a run makes of it.

Not covered here: that any of these servers really answers so. `test_openai_engine.py` samples from
a real one.
"""

from __future__ import annotations

import re

import pytest

from megatron_prefix.rollouts.server.answers import ServerMismatch
from megatron_prefix.rollouts.server.client import ServerError
from tests.rollouts.asking import (
    GOOD,
    completion,
    completions,
    ids_choice,
    parts,
    text_answers,
    vllm_answers,
)
from tests.rollouts.files import plain
from tests.rollouts.replies import Reply, Request, reply_server
from tests.rollouts.servers import END


def test_token_ids_and_log_probabilities_are_taken_as_the_server_gives_them(path, tokenizer):
    with reply_server(vllm_answers) as server:
        sampler, client = parts(server.url + "/v1", path, tokenizer=tokenizer)
        batch = sampler.sample(2, step=0, version=7)
        client.close()
    first, second = plain(batch.rollouts)
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
        [group] = plain(sampler.sample(1, step=0, version=0).rollouts)
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
    for n, group in enumerate(plain(batch.rollouts)):
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
        assert plain(batch.rollouts)[0].responses == ((1, 2, END),) * 4
        assert batch.metrics["partial_groups"] == 1
        assert batch.metrics["rejected_responses"] >= 2
        server.script = lambda request: text_answers(request, [bad])
        with pytest.raises(ServerError, match=f"in 5 rounds only 0 of 1 .*{re.escape(reason)}"):
            sampler.sample(1, step=0, version=0)
        client.close()

"""Servers that understand less, or do other than they say: seen, and said in one line.

Each is a small server in this process that behaves so. Servers that people run do all of this.
"""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prefix.config import RolloutsConfig, ServerConfig
from megatron_prefix.rollouts.prompts import Prompt
from megatron_prefix.rollouts.sampling.groups import GroupMaker, GroupSpec
from megatron_prefix.rollouts.sampling.sampler import SamplingSpec
from megatron_prefix.rollouts.server.answers import (
    OtherWeights,
    Reader,
    SampleRejected,
    ServerMismatch,
)
from megatron_prefix.rollouts.server.client import ServerError
from megatron_prefix.rollouts.server.weights import KeptWeights
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
from megatron_prefix.rollouts.validation import Limits
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
from tests.rollouts.servers import DIGITS, END, save_word_tokenizer

ENDS = DIGITS.index("!")


def one(request: Request, **changes: Any) -> Reply:
    """A response that depends on the seed, by token ids."""
    prompt, seed = request.body["prompt"], request.body.get("seed", random.randrange(9))
    choice = ids_choice(0, [seed % 9, seed % 7, END], prompt, **changes)
    return Reply(body=completion([choice], len(prompt), 3))


@pytest.mark.parametrize("status", [400, 422, 500])
@pytest.mark.parametrize("refused", [("n",), ("seed",), ("logprobs", "top_p"), ("n", "extras")])
def test_a_server_that_refuses_fields_is_asked_without_them(path, caplog, status, refused):
    names = [{"extras": "return_token_ids"}.get(name, name) for name in refused]

    def answer(request: Request) -> Reply:
        wrong = [n for n in names if n in request.body and (n != "n" or request.body[n] > 1)]
        if wrong:
            return Reply(status=status, body={"error": {"message": f"{wrong[0]}: not supported"}})
        changes = {} if "logprobs" in request.body else {"logprobs": None}
        return one(request, **changes)

    caplog.set_level(logging.INFO)
    with reply_server(answer) as server:
        sampler, client = parts(server.url, path)
        batch = sampler.sample(2, step=0, version=0)
        asked = len(completions(server))
        client.close()
    assert np.diff(batch.rollouts.group_offsets).tolist() == [4, 4]
    assert (batch.rollouts.old_logprobs is None) == ("logprobs" in refused)
    assert f"refuses {', '.join(sorted(refused))}" in caplog.text
    assert asked < 30


def test_a_sampling_that_the_server_does_not_know_ends_the_run(path):
    def answer(request: Request) -> Reply:
        if "top_p" in request.body:
            return Reply(status=400, body={"error": {"message": "top_p is unknown"}})
        return one(request)

    with reply_server(answer) as server:
        sampler, client = parts(server.url, path, top_p=0.9)
        with pytest.raises(ServerError, match=r"rollouts.top_p: 0.9, but .*top_p is unknown.*to 1"):
            sampler.sample(1, step=0, version=0)
        client.close()


def test_n_copies_of_one_response_are_noticed_and_asked_for_one_by_one(path, caplog):
    def answer(request: Request) -> Reply:
        body = one(request).body
        copies = [{**body["choices"][0], "index": i} for i in range(request.body["n"])]
        return Reply(body={**body, "choices": copies})

    with reply_server(answer) as server:
        sampler, client = parts(server.url, path)
        batch = sampler.sample(2, step=0, version=0)
        client.close()
    for group in plain(batch.rollouts):
        assert len(set(group.responses)) > 1
    assert batch.metrics["identical_groups"] == 0
    assert "with n copies" in caplog.text


@pytest.mark.parametrize("takes_n", [True, False])
def test_a_server_that_decodes_greedily_is_said(path, tokenizer, caplog, takes_n):
    with reply_server(text_answers) as server:
        if takes_n:
            server.script = lambda request: Reply(
                body=completion(
                    [ids_choice(0, [1, 2, END], request.body["prompt"])] * request.body["n"], 3, 3
                )
            )
        sampler, client = parts(server.url, path, tokenizer=tokenizer)
        for step in range(2):
            batch = sampler.sample(2, step=step, version=step)
            assert batch.metrics["identical_groups"] == 2
        client.close()
    warnings = [r.message for r in caplog.records if "all the same" in r.message]
    assert len(warnings) == 1
    assert "may decode greedily or overlook seeds, or the policy may be certain" in warnings[0]


def test_a_policy_that_is_certain_of_one_prompt_is_not_asked_again_and_again(path):
    def answer(request: Request) -> Reply:
        if request.body["prompt"][0]:
            return vllm_answers(request)
        choice = ids_choice(0, [1, 2, END], request.body["prompt"])
        return Reply(body=completion([choice] * request.body["n"], 3, 3))

    with reply_server(answer) as server:
        sampler, client = parts(server.url, path)
        batch = sampler.sample(3, step=0, version=0)
        client.close()
        assert [request.body["n"] for request in completions(server)] == [2, 4, 4, 4]
    assert batch.metrics["identical_groups"] == 1


def test_text_that_was_cleaned_up_is_seen_in_the_servers_own_tokens(path, tokenizer):
    def answer(request: Request) -> Reply:
        reply = text_answers(request)
        if reply.status == 200:
            logprobs = {"tokens": ["1", " ", " 2"], "token_logprobs": [-1.0] * 3}
            reply.body["choices"][0] |= {"text": "1 2", "logprobs": logprobs}
        return reply

    with reply_server(answer) as server:
        sampler, client = parts(server.url, path, tokenizer=tokenizer, kind="openai")
        with pytest.raises(ServerMismatch, match=r":1: the server's text '1 2' is not that of"):
            sampler.sample(1, step=0, version=0)
        client.close()


def test_text_by_a_tokenizer_that_cleans_up_is_refused_unless_the_run_hands_it_over(path, tmp_path):
    words = [*DIGITS[:10], ".", ",", "one", "two", "do", "n't"]
    folder = save_word_tokenizer(tmp_path / "cleans", words, ".")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["clean_up_tokenization_spaces"] = True
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = TextTokenizer(folder, vocab_size=16)
    if not tokenizer.cleans_up:
        pytest.fail("this release of transformers does not clean up by this tokenizer")
    tokenizer.save(tmp_path / "policy")
    assert not TextTokenizer(tmp_path / "policy", vocab_size=16).cleans_up
    with reply_server(text_answers) as server:
        sampler, client = parts(server.url, path, tokenizer=tokenizer, kind="openai")
        with pytest.raises(ServerMismatch, match=r"cleans text up .*clean_up_tokenization_spaces"):
            sampler.sample(1, step=0, version=0)
        client.close()


@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": 0, "completion_tokens": 0}, {"prompt_tokens": "3"}, None]
)
def test_counts_that_a_server_does_not_know_are_not_taken_for_counts(path, tokenizer, usage):
    def answer(request: Request) -> Reply:
        reply = text_answers(request)
        if reply.status == 200:
            reply.body["usage"] = usage
        return reply

    with reply_server(answer) as server:
        sampler, client = parts(server.url, path, tokenizer=tokenizer, kind="openai")
        [group] = plain(sampler.sample(1, step=0, version=0).rollouts)
        client.close()
    assert group.responses == ((1, 2, END),) * 4


def test_a_second_end_of_sequence_is_read_beside_the_tokenizer_and_named(path, tmp_path):
    folder = save_word_tokenizer(tmp_path / "two_ends", DIGITS, ";")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, ENDS]}))
    tokenizer = TextTokenizer(folder, vocab_size=16)
    assert tokenizer.stop_tokens == (END, ENDS)

    def answer(request: Request, **changes: Any) -> Reply:
        return one(request, token_ids=[1, 2], finish_reason="stop", text=None, **changes)

    with reply_server(lambda request: answer(request, stop_reason=ENDS, logprobs=None)) as server:
        sampler, client = parts(server.url, path, stop_tokens=tokenizer.stop_tokens)
        [group] = plain(sampler.sample(1, step=0, version=0).rollouts)
        assert group.responses == ((1, 2, ENDS),) * 4
        assert group.finished == (True,) * 4
        client.close()
        sampler, client = parts(server.url, path)
        server.script = lambda request: answer(request, stop_reason=ENDS)
        with pytest.raises(ServerMismatch, match=rf"stopped at token {ENDS}, which is not in stop"):
            sampler.sample(1, step=0, version=0)
        server.script = lambda request: answer(request, stop_reason=None)
        with pytest.raises(ServerMismatch, match=r"after token 2, .* may have cut off the token"):
            sampler.sample(1, step=0, version=0)
        client.close()
        server.script = lambda request: text_answers(request, [GOOD])
        sampler, client = parts(
            server.url, path, tokenizer=tokenizer, kind="openai", stop_tokens=(END, ENDS)
        )
        with pytest.raises(ServerMismatch, match=r"does not say which of the stop tokens \[11, 13"):
            sampler.sample(1, step=0, version=0)
        client.close()


def test_log_probabilities_that_are_none_are_not_trained_on(path):
    def answer(request: Request) -> Reply:
        reply = vllm_answers(request)
        if request.body["n"] > 2:
            reply.body["choices"][0]["logprobs"]["token_logprobs"][1] = -9999.0
        return reply

    with reply_server(answer) as server:
        sampler, client = parts(server.url, path, partial_groups="keep")
        batch = sampler.sample(1, step=0, version=0)
        client.close()
    assert batch.rollouts.num_responses == 3
    assert batch.metrics["rejected_responses"] == 1


def test_weights_that_a_server_keeps_are_noticed_by_its_log_probabilities(path, tmp_path, caplog):
    """It says that it has loaded others, and answers as before."""
    with reply_server(vllm_answers) as server:
        sampler, client = parts(server.url, path)
        kept = KeptWeights(sampler._asker)

        def hand_over(version: int, content: bytes) -> None:
            folder = tmp_path / f"version_{version}"
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(content)
            kept.check(folder, kept.before())

        hand_over(0, b"zero")
        sampler.sample(1, step=0, version=0)
        hand_over(1, b"zero")
        assert not caplog.records
        hand_over(2, b"two")
        hand_over(3, b"three")
        assert [r.message for r in caplog.records] == [
            f"{tmp_path}/version_{v}: the server has loaded it, and gives the same "
            "log-probabilities as before, [-0.5, -1.5] ...; it may have kept its old weights"
            for v in (2, 3)
        ]
        with pytest.raises(OtherWeights, match=r"version_4: .*\(3 hand-overs in a row\)"):
            hand_over(4, b"four")
        client.close()


def test_a_server_that_loads_is_not_warned_of(path, tmp_path, caplog):
    loaded = [0]

    def answer(request: Request) -> Reply:
        reply = vllm_answers(request)
        for choice in reply.body["choices"]:
            logprobs = choice["logprobs"]["token_logprobs"]
            logprobs[:] = [value - loaded[0] / 1000 for value in logprobs]
        return reply

    with reply_server(answer) as server:
        sampler, client = parts(server.url, path)
        kept = KeptWeights(sampler._asker)
        sampler.sample(1, step=0, version=0)
        for version in range(5):
            folder = tmp_path / f"version_{version}"
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(bytes([version]))
            before = kept.before()
            loaded[0] = version
            kept.check(folder, before)
        client.close()
    assert not caplog.records


def test_log_probabilities_that_are_none_are_taken_only_where_the_objective_corrects():
    spec = SamplingSpec(max_response_length=4, stop_tokens=(END,))
    choice = ids_choice(0, [1, END], [5])
    choice["logprobs"]["token_logprobs"] = [-9999.0, -0.5]
    with pytest.raises(SampleRejected, match="-9999 is no log-probability"):
        Reader(tokenizer=None, spec=spec).read(choice, (5,), None)
    response = Reader(tokenizer=None, spec=spec, is_corrected=True).read(choice, (5,), None)
    prompt = Prompt(tokens=(5,), answer=None, source="a.jsonl:1")
    made = {
        corrects: GroupMaker(
            GroupSpec(
                sampling=spec,
                limits=Limits(vocab_size=16, max_positions=8, is_corrected=corrects),
                uses_logprobs=True,
            ),
            None,
        )
        for corrects in (False, True)
    }
    assert made[True].group(prompt, [response], 0).old_logprobs[0].tolist() == [-9999.0, -0.5]
    with pytest.raises(ValueError, match=r"old_logprobs\[0\]\[0\]: -9999 is no log-probability"):
        made[False].group(prompt, [response], 0)


@pytest.mark.parametrize(
    ("changes", "takes_them"),
    [({}, True), ({"top_p": 0.9}, False), ({"temperature": 0.7}, False)],
)
def test_log_probabilities_after_another_sampling_are_the_trainers(changes, takes_them):
    """Some servers give those of the tokens that top_p leaves, others those of all."""
    config = RolloutsConfig(
        engine="openai",
        paths=(Path("a.jsonl"),),
        group_size=2,
        max_response_length=4,
        reward="exact_match",
        server=ServerConfig(url="http://localhost:1", kind="vllm"),
        **changes,
    )
    assert config.takes_samplers_logprobs == takes_them

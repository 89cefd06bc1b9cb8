"""Responses of several turns: asked with the tokens that came before, and costly to nobody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prefix.config import ServerConfig, TextConfig
from megatron_prefix.config.loader import ConfigError, load_dataclass
from megatron_prefix.config.rollouts import AgentConfig, RolloutsConfig
from megatron_prefix.rollouts.sampling.agent import AgentLoop
from megatron_prefix.rollouts.sampling.environment import Environment
from megatron_prefix.rollouts.sampling.groups import GroupMaker, GroupSpec
from megatron_prefix.rollouts.sampling.sampler import SamplingSpec
from megatron_prefix.rollouts.server.answers import Reader
from megatron_prefix.rollouts.server.asking import Asker
from megatron_prefix.rollouts.server.client import ServerClient, ServerError
from megatron_prefix.rollouts.text.dialogue import DialogueEncoder
from megatron_prefix.rollouts.text.prompts import TextPrompts
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
from megatron_prefix.rollouts.validation import Limits
from tests.rollouts.asking import BatchSampler, completion, ids_choice
from tests.rollouts.files import write
from tests.rollouts.replies import Reply, ReplyServer, Request, reply_server
from tests.rollouts.servers import DIGITS, END, save_word_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '> ' + m.content + ' ; ' }}"
    "{% else %}{{ m.content + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
USER = {"role": "user", "content": "0 1 ?"}
PROMPT = [0, 1, 12, 10]
FIRST, SECOND = [1, 2, END], [1, 3, END]
SEEN = [3, 4, 10]
"""The tool's answer, and where the assistant is asked."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: Any) -> TextTokenizer:
    folder = save_word_tokenizer(tmp_path_factory.mktemp("tokenizer"), DIGITS, ";")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return TextTokenizer(folder, vocab_size=16)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def two_turns(request: Request) -> Reply:
    """A first turn, and a second one that is told by the tokens before it."""
    prompt = request.body["prompt"]
    tokens = SECOND if END in prompt else FIRST
    choices = [ids_choice(i, tokens, prompt) for i in range(request.body["n"])]
    return Reply(body=completion(choices, len(prompt), 3 * len(choices)))


def sampler(
    server: ReplyServer, path: Path, tokenizer: TextTokenizer, **options: Any
) -> tuple[BatchSampler, AgentLoop, ServerClient]:
    turn_rewards, partial = options.pop("turn_rewards", False), options.pop("partial", "drop")
    config = ServerConfig(url=server.url, model="policy", patience_s=5.0, kind="openai")
    client = ServerClient(config)
    sampling = SamplingSpec(group_size=2, max_response_length=4, stop_tokens=(END,), seed=1)
    asker = Asker(client, config, Reader(tokenizer=tokenizer, spec=sampling))
    agent = AgentConfig(
        **{"environment": "tests.rollouts.user_environments:echo", "turn_timeout_s": 3.0, **options}
    )
    loop = AgentLoop(
        Environment(agent),
        tokenizer,
        DialogueEncoder(tokenizer, stop_tokens=[END]),
        agent,
        max_sequence_length=32,
        max_turn_length=4,
        can_be_asked=asker.can_be_asked,
    )
    spec = GroupSpec(
        sampling=sampling,
        limits=Limits(vocab_size=16, max_positions=32),
        uses_logprobs=True,
        partial_groups=partial,
        turn_rewards=turn_rewards,
    )
    prompts = TextPrompts(
        [path],
        tokenizer,
        TextConfig(tokenizer=tokenizer.path),
        vocab_size=16,
        max_prompt_length=20,
        shuffle=False,
        seed=0,
        epochs=1,
    )
    maker = GroupMaker(spec, None, agent=loop)
    return BatchSampler(asker, prompts, maker), loop, client


def records(path: Path, *answers: str) -> Path:
    return write(path, [{"messages": [USER], "answer": answer} for answer in answers])


@pytest.mark.parametrize("turn_rewards", [False, True])
def test_a_turn_is_asked_with_exactly_the_tokens_before_it(tmp_path, tokenizer, turn_rewards):
    path = records(tmp_path / "a.jsonl", "good")
    with reply_server(two_turns) as server:
        batches, loop, client = sampler(server, path, tokenizer, turn_rewards=turn_rewards)
        batch = batches.sample(1, step=0, version=None)
        loop.close()
        client.close()
        asked = [request.body["prompt"] for request in server.requests]
    # The first request of all finds out what the server can do.
    assert asked == [PROMPT, *[PROMPT] * 2, *[[*PROMPT, *FIRST, *SEEN]] * 2]
    (group,) = batch.rollouts.groups()
    assert group.prompt.tolist() == PROMPT
    for response, mask, logprobs in zip(
        group.responses, group.loss_mask, group.old_logprobs, strict=True
    ):
        assert response.tolist() == [*FIRST, *SEEN, *SECOND]
        assert mask.tolist() == [True] * 3 + [False] * 3 + [True] * 3
        assert logprobs.tolist() == [-0.5, -1.5, -2.5, 0, 0, 0, -0.5, -1.5, -2.5]
    assert group.rewards.tolist() == [1.25, 1.25]
    found = group.turn_rewards
    assert found is None if not turn_rewards else np.array(found).tolist() == [[0.25, 1]] * 2
    assert group.finished.tolist() == [True, True]
    assert batch.metrics["turns"] == 2
    assert batch.metrics["environment_failures"] == batch.metrics["rejected_responses"] == 0


FAULTS = {
    "hang": "took too long",
    "crash": "its process ended",
    "exit": "its process ended in the call (limit 3 s) (exit status 3)",
    "raise": "failed: KeyError: 'no such tool'",
    "read": "failed: EOFError",
    "text": "returned 'done'; it must return a dict",
    "object": "it must return a dict of what JSON can hold",
    "nan": "returned the reward nan; it must be a finite number",
    "typo": "returned 'rewards'; what is read are messages, reward, done",
    "chat": "returned a message of the assistant",
    "ids": "returned messages[0].token_ids: given in a message of role tool",
    "half": r"returned messages[0].content: '\ud800' is no text: surrogates not allowed",
    "special": "returned messages that cannot be written: [0].content: holds ';'",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_environment_that_fails_costs_its_own_responses(tmp_path, tokenizer, caplog, fault):
    path = records(tmp_path / "a.jsonl", fault, "good", "good")
    with reply_server(two_turns) as server:
        batches, loop, client = sampler(server, path, tokenizer)
        batch = batches.sample(2, step=0, version=None)
        loop.close()
        client.close()
    assert FAULTS[fault] in caplog.text and f"{path}:1" in caplog.text
    assert list(batch.rollouts.sources) == [f"{path}:2", f"{path}:3"]
    assert batch.metrics["environment_failures"] == 2
    assert batch.metrics["rejected_responses"] == 2
    assert batch.metrics["dropped_groups"] == 1


def test_messages_that_the_template_writes_nothing_of_fail(tmp_path, tokenizer, caplog):
    folder = save_word_tokenizer(tmp_path / "tokenizer", DIGITS, ";")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ;' }}{% endif %}{% endfor %}"
    )
    path = records(tmp_path / "a.jsonl", *["good"] * 5)
    with reply_server(two_turns) as server:
        batches, loop, client = sampler(server, path, TextTokenizer(folder, vocab_size=16))
        with pytest.raises(ServerError, match="of which the chat template writes nothing"):
            batches.sample(1, step=0, version=None)
        loop.close()
        client.close()


def test_what_an_environment_prints_is_no_answer(tmp_path, tokenizer, capfd):
    path = records(tmp_path / "a.jsonl", "flood")
    with reply_server(two_turns) as server:
        batches, loop, client = sampler(server, path, tokenizer)
        batch = batches.sample(1, step=0, version=None)
        loop.close()
        client.close()
    assert batch.rollouts.rewards.tolist() == [1.25, 1.25]
    assert batch.metrics["environment_failures"] == 0
    assert capfd.readouterr().err.count('{"value": 7}') == 2 * 10_000


def test_or_gets_the_reward_that_is_set_for_it(tmp_path, tokenizer):
    path = records(tmp_path / "a.jsonl", "crash", "good")
    with reply_server(two_turns) as server:
        batches, loop, client = sampler(server, path, tokenizer, on_failure=-1.0)
        batch = batches.sample(2, step=0, version=None)
        loop.close()
        client.close()
    assert batch.rollouts.rewards.tolist() == [-1, -1, 1.25, 1.25]
    assert batch.rollouts.finished.tolist() == [0, 0, 1, 1]
    assert batch.metrics["environment_failures"] == 2
    assert batch.metrics["unfinished_responses"] == 2


@pytest.mark.parametrize(
    ("options", "turns"),
    # 4 tokens of the prompt, 3 of each turn and 2 seen ones; a turn needs room for 4 of the 32.
    [({"max_turns": 3}, 3), ({"max_turns": 50}, 5), ({"max_seconds": 1e-6}, 1)],
)
def test_a_dialogue_without_end_stops_at_its_limits(tmp_path, tokenizer, options, turns):
    path = records(tmp_path / "a.jsonl", "good")
    options["environment"] = "tests.rollouts.user_environments:endless"
    with reply_server(two_turns) as server:
        batches, loop, client = sampler(server, path, tokenizer, **options)
        batch = batches.sample(1, step=0, version=None)
        loop.close()
        client.close()
    assert batch.metrics["turns"] == turns
    assert batch.metrics["unfinished_responses"] == 2
    # It ends with a turn of the model, not with what nobody answers.
    assert batch.rollouts.loss_mask[-1]
    assert len(batch.rollouts.response_tokens) == 2 * (3 * turns + 2 * (turns - 1))


def test_an_environment_that_always_fails_ends_the_run_with_its_words(tmp_path, tokenizer):
    path = records(tmp_path / "a.jsonl", *["raise"] * 5)
    with reply_server(two_turns) as server:
        batches, loop, client = sampler(server, path, tokenizer)
        with pytest.raises(ServerError, match="no such tool"):
            batches.sample(1, step=0, version=None)
        loop.close()
        client.close()


def test_a_prompt_that_is_no_chat_is_refused(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"prompt": "0 1 >", "answer": "good"}])
    with reply_server(two_turns) as server:
        batches, loop, client = sampler(server, path, tokenizer)
        with pytest.raises(ServerError, match=r"a.jsonl:1: prompt: rollouts.agent goes on with a"):
            batches.sample(1, step=0, version=None)
        loop.close()
        client.close()


def test_an_environment_that_is_not_there_is_an_error_at_the_start():
    with pytest.raises(ValueError, match=r"rollouts.agent.environment: tests:none: .*none"):
        Environment(AgentConfig(environment="tests:none"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "embedded", "reward": "numeric"}, "agent: set with engine: embedded"),
        ({"reward": "numeric"}, "reward: numeric, but with agent the environment gives"),
        ({"text": None}, "text: required by agent"),
        ({"agent": {"environment": "a"}}, "environment: a is not of the form module:function"),
        (
            {"agent": {"environment": "a:b", "tool_calls": "llama"}},
            'tool_calls: expected one of text, hermes, got "llama"',
        ),
        ({"agent": {"environment": "a:b", "max_turns": 0}}, "max_turns: 0 must be at least 1"),
        ({"agent": {"environment": "a:b", "max_seconds": 0}}, "max_seconds: 0.0 must be above 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes, message):
    values = {
        "engine": "openai",
        "paths": ["a.jsonl"],
        "group_size": 2,
        "max_response_length": 4,
        "text": {"tokenizer": "t"},
        "server": {"url": "http://x"},
        "agent": {"environment": "a:b"},
    }
    load_dataclass(RolloutsConfig, values)
    values |= changes
    if values["engine"] != "openai":
        del values["server"]
    with pytest.raises(ConfigError, match=message):
        load_dataclass(RolloutsConfig, values)

"""What a policy samples reaches the loss as it was sampled, through any number of turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_prefix.config import ParallelConfig, ServerConfig, TextConfig
from megatron_prefix.config.packing import packing_of_run
from megatron_prefix.config.rollouts import AgentConfig
from megatron_prefix.model.build import model_shape
from megatron_prefix.model.transformer_config import transformer_config
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.rollouts.records import RolloutBatch
from megatron_prefix.rollouts.sampling.agent import AgentLoop
from megatron_prefix.rollouts.sampling.environment import Environment
from megatron_prefix.rollouts.sampling.groups import GroupMaker, GroupSpec
from megatron_prefix.rollouts.sampling.sampler import SamplingSpec
from megatron_prefix.rollouts.server.answers import Reader
from megatron_prefix.rollouts.server.asking import Asker
from megatron_prefix.rollouts.server.client import ServerClient
from megatron_prefix.rollouts.text.dialogue import DialogueEncoder
from megatron_prefix.rollouts.text.prompts import TextPrompts
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
from megatron_prefix.rollouts.validation import Limits
from megatron_prefix.training.minibatch import build_minibatch
from tests.megatron.models import ON_CPU, TRAINING, model_config
from tests.rollouts.asking import BatchSampler, completion
from tests.rollouts.chat_templates import FORMATS, chat_tokenizer
from tests.rollouts.files import write
from tests.rollouts.replies import Reply, Request, Script, reply_server

USER = {"role": "user", "content": "the sum of two and three?"}
VOCAB_SIZE, POSITIONS, TURN = 400, 1200, 200


@pytest.fixture(params=sorted(FORMATS))
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> TextTokenizer:
    return chat_tokenizer(tmp_path / "tokenizer", request.param)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


class OddPolicy:
    """Samples characters one by one, which no tokenizer makes of a text."""

    def __init__(self, tokenizer: TextTokenizer, texts: list[str] | None = None) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self.sampled: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        """What was asked, and all that was sampled behind it."""

    def __call__(self, request: Request) -> Reply:
        prompt, tokenizer = request.body["prompt"], self._tokenizer
        turn = self._tokenizer.decode(prompt).count("says the")
        text = f"the tool of {request.body['seed'] % 1000}, says turn {turn}"
        if self._texts is not None:
            text = self._texts[sum(tuple(prompt[: len(asked)]) == asked for asked in self.sampled)]
        tokens = [token for character in text for token in tokenizer.encode(character)]
        assert tuple(tokens) != tokenizer.encode(text)
        tokens.append(tokenizer.end_token)
        # The first request is for what the server can do.
        if request.body["n"] == 1:
            self.sampled.setdefault(tuple(prompt), set()).add(tuple(tokens))
        choice = {"text": text, "finish_reason": "stop", "token_ids": tokens}
        choices = [{"index": i, **choice} for i in range(request.body["n"])]
        return Reply(body=completion(choices, len(prompt), len(choices) * len(tokens)))


def sampled_batch(
    tmp_path: Path, tokenizer: TextTokenizer, policy: Script, *, group_size: int, **options: Any
) -> RolloutBatch:
    end = tokenizer.end_token
    assert end is not None
    record = {"messages": [USER], **options.pop("record", {})}
    agent = AgentConfig(**options)
    with reply_server(policy) as server:
        config = ServerConfig(url=server.url, model="policy", kind="openai")
        client = ServerClient(config)
        sampling = SamplingSpec(
            group_size=group_size, max_response_length=TURN, stop_tokens=(end,), seed=1
        )
        asker = Asker(client, config, Reader(tokenizer=tokenizer, spec=sampling))
        loop = AgentLoop(
            Environment(agent),
            tokenizer,
            DialogueEncoder(tokenizer, stop_tokens=[end]),
            agent,
            max_sequence_length=POSITIONS,
            max_turn_length=TURN,
            can_be_asked=asker.can_be_asked,
        )
        prompts = TextPrompts(
            [write(tmp_path / "a.jsonl", [record])],
            tokenizer,
            TextConfig(tokenizer=tokenizer.path),
            vocab_size=VOCAB_SIZE,
            max_prompt_length=POSITIONS,
            shuffle=False,
            seed=0,
        )
        spec = GroupSpec(
            sampling=sampling, limits=Limits(vocab_size=VOCAB_SIZE, max_positions=POSITIONS)
        )
        sampler = BatchSampler(asker, prompts, GroupMaker(spec, None, agent=loop))
        batch = sampler.sample(1, step=0, version=None).rollouts
        loop.close()
        client.close()
    assert batch is not None
    return batch


def trained_labels(batch: RolloutBatch) -> list[list[int]]:
    """The labels that the loss has of each response, in their order."""
    config = model_config({}, vocab_size=VOCAB_SIZE, max_sequence_length=POSITIONS)
    shape = model_shape(config, transformer_config(config, ParallelConfig(), TRAINING))
    packing = packing_of_run(TRAINING, ParallelConfig(), model_shape=shape, data_parallel_size=1)
    minibatch = build_minibatch(
        batch, ObjectiveConfig(), packing, attention=ON_CPU, data_parallel_rank=0
    )
    labels: list[dict[int, int]] = [{} for _ in range(batch.num_responses)]
    for row, responses in zip(minibatch.rows, minibatch.responses_of_rows, strict=True):
        for sequence, token, label in zip(
            responses[row.sequence_ids].tolist(),
            row.sequence_tokens.tolist(),
            row.labels[row.entry_labels].tolist(),
            strict=True,
        ):
            labels[sequence][token] = label
    return [[found[token] for token in sorted(found)] for found in labels]


def test_the_loss_has_what_was_sampled_through_five_turns(tmp_path, tokenizer) -> None:
    policy = OddPolicy(tokenizer)
    environment = "tests.rollouts.user_environments:dialogue"
    batch = sampled_batch(tmp_path, tokenizer, policy, group_size=3, environment=environment)
    (group,) = batch.groups()
    assert group.rewards.tolist() == [5.0] * 3
    labels = trained_labels(batch)
    assert len({tuple(found) for found in labels}) == 3
    for response, mask, found in zip(group.responses, group.loss_mask, labels, strict=True):
        seen, sampled, place = tuple(group.prompt.tolist()), [], 0
        while place < len(response):
            end = place + int(mask[place:].argmin()) if not mask[place:].all() else len(response)
            turn = tuple(response[place:end].tolist())
            # It was asked for behind exactly these tokens.
            assert turn in policy.sampled[seen]
            sampled += turn
            following = end + int(mask[end:].argmax()) if end < len(response) else end
            seen += (*turn, *response[end:following].tolist())
            place = following
        assert found == sampled
        assert sampled.count(tokenizer.end_token) == 5


def test_calls_of_tools_are_read_from_a_turn(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", "chatml")
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": %d}}\n</tool_call>'
    texts = [f"ask\n{call % 3}\n{call % 4}", '<tool_call>{"name"</tool_call>']
    policy = OddPolicy(tokenizer, texts)
    batch = sampled_batch(
        tmp_path,
        tokenizer,
        policy,
        group_size=1,
        record={"tools": [{"name": "add"}], "answer": texts[1]},
        environment="tests.rollouts.user_environments:calculator",
        tool_calls="hermes",
    )
    (group,) = batch.groups()
    assert '{"name": "add"}' in tokenizer.decode(group.prompt.tolist())
    seen = group.responses[0][~group.loss_mask[0]]
    assert tokenizer.decode(seen.tolist()) == (
        "\n<|im_start|>user\n<tool_response>\nadd 5\n</tool_response><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nadd 6\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    # What is no call stays text.
    assert group.rewards.tolist() == [1.0]

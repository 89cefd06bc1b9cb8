"""The `openai` engine that a run's configuration asks for."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist

from megatron_prefix.config import RunConfig
from megatron_prefix.rollouts.embedded.batch import SamplingOptions
from megatron_prefix.rollouts.hf.folders import PolicyFolders
from megatron_prefix.rollouts.prompts import PromptSource
from megatron_prefix.rollouts.rewards import RewardFunction
from megatron_prefix.rollouts.server.agent import AgentLoop, AskedAgent
from megatron_prefix.rollouts.server.answers import Reader
from megatron_prefix.rollouts.server.asking import Asker
from megatron_prefix.rollouts.server.batches import GroupSpec
from megatron_prefix.rollouts.server.client import ServerClient
from megatron_prefix.rollouts.server.engine import OpenAIEngine
from megatron_prefix.rollouts.server.environment import Environment
from megatron_prefix.rollouts.server.loading import weight_loader
from megatron_prefix.rollouts.text.dialogue import DialogueEncoder
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer


def build_openai_engine(
    config: RunConfig,
    source: PromptSource,
    reward: RewardFunction | None,
    folders: PolicyFolders,
    options: SamplingOptions,
    tokenizer: TextTokenizer | None,
    environment: Mapping[str, str],
) -> OpenAIEngine:
    """The engine; nothing is sent yet.

    Raises:
        ValueError: the key's variable is not set, or a server that answers in text would have to
            say which of several stop tokens it ended with.
    """
    rollouts, server = config.rollouts, config.rollouts.server
    assert server is not None and rollouts.group_size is not None
    key = None
    if server.api_key_variable is not None:
        key = environment.get(server.api_key_variable)
        if not key:
            raise ValueError(
                f"rollouts.server.api_key_variable: the environment variable "
                f"{server.api_key_variable} is not set; set it to the server's key"
            )
    if server.kind == "transformers" and len(options.stop_tokens) != 1:
        raise ValueError(
            f"rollouts.stop_tokens: {list(options.stop_tokens)}, but server.kind: {server.kind} "
            "answers in text, which does not say which of them ended it; give one"
        )
    client = ServerClient(server, api_key=key)
    reader = Reader(
        tokenizer=tokenizer,
        has_our_tokenizer=server.kind == "transformers",
        stop_tokens=options.stop_tokens,
        max_response_length=options.max_response_length,
    )
    asker = Asker(client, server, reader, temperature=options.temperature, top_p=options.top_p)
    spec = GroupSpec(
        group_size=rollouts.group_size,
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.model.max_sequence_length,
        uses_logprobs=rollouts.takes_servers_logprobs,
        partial_groups=server.partial_groups,
        seed=config.training.seed,
        turn_rewards=rollouts.agent is not None and rollouts.agent.turn_rewards,
    )
    agent = None
    if rollouts.agent is not None and dist.get_rank() == 0:  # rank 0 alone asks
        assert tokenizer is not None
        agent = AskedAgent(asker, build_agent_loop(config, options, tokenizer), tokenizer)
    return OpenAIEngine(
        asker,
        client,
        source,
        reward,
        spec,
        agent=agent,
        server=server,
        weights=rollouts.weights,
        folders=folders,
        loader=weight_loader(server, client, timeout_s=rollouts.weights.load_timeout_s),
    )


def build_agent_loop(
    config: RunConfig, options: SamplingOptions, tokenizer: TextTokenizer
) -> AgentLoop:
    """The dialogues of `rollouts.agent`; its environment's first process starts.

    Raises:
        ValueError: see `Environment`.
    """
    agent = config.rollouts.agent
    assert agent is not None
    return AgentLoop(
        Environment(agent),
        tokenizer,
        DialogueEncoder(tokenizer, stop_tokens=options.stop_tokens),
        agent,
        max_sequence_length=config.model.max_sequence_length,
        max_turn_length=options.max_response_length,
    )

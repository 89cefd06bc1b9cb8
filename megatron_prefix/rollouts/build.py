"""The engine and the evaluator that a run's configuration asks for."""

from __future__ import annotations

import os

from megatron_prefix.config import RunConfig
from megatron_prefix.distributed.runtime import Runtime
from megatron_prefix.model.build import ModelChunks
from megatron_prefix.packages import needed_by
from megatron_prefix.rollouts.embedded.evaluator import Evaluator
from megatron_prefix.rollouts.embedded.sampler import EmbeddedSampler
from megatron_prefix.rollouts.engine import RolloutEngine
from megatron_prefix.rollouts.hf.export import weights_exporter
from megatron_prefix.rollouts.hf.folders import PolicyFolders
from megatron_prefix.rollouts.hf.sampler import TransformersSampler
from megatron_prefix.rollouts.mixed_prompts import MixedPrompts
from megatron_prefix.rollouts.parts import RolloutParts
from megatron_prefix.rollouts.prompts import PromptSource
from megatron_prefix.rollouts.rewards import check_answer
from megatron_prefix.rollouts.routes import RouteReader, route_reader
from megatron_prefix.rollouts.sampling.agent import AgentLoop
from megatron_prefix.rollouts.sampling.engine import SampledGroups
from megatron_prefix.rollouts.sampling.environment import Environment
from megatron_prefix.rollouts.sampling.groups import GroupMaker, GroupSpec
from megatron_prefix.rollouts.sampling.sampler import Sampler, SamplingSpec

_CACHED_PER_TRAINED_TOKEN = 8
"""Keys and values of so many tokens are held where one token is trained on: all that a layer keeps
for backward is many times as large as its keys and values."""


def build_engine(parts: RolloutParts, chunks: ModelChunks, runtime: Runtime) -> RolloutEngine:
    """The engine of `config.rollouts`.

    Raises:
        ValueError: a file or tokenizer that is not there or of unknown format, a reward or
            environment that is not found, or a key that is not set.
    """
    rollouts = parts.config.rollouts
    if rollouts.engine == "file":
        return parts.file_engine
    assert rollouts.group_size is not None
    spec = parts.sampling(group_size=rollouts.group_size, temperature=rollouts.temperature)
    sampler = _sampler(parts, chunks, runtime, spec)
    source: PromptSource | None = None
    if parts.is_main:
        data_sets = parts.data_sets
        source = MixedPrompts(data_sets, rollouts.ratios) if rollouts.ratios else data_sets[0]
    maker = _maker(
        parts,
        spec,
        sampler,
        uses_logprobs=rollouts.takes_samplers_logprobs,
        routes=route_reader(parts.config),
    )
    return SampledGroups(
        sampler,
        source,
        maker,
        prefetch=rollouts.server is not None and rollouts.server.prefetch,
        max_staleness=rollouts.weights.max_staleness,
    )


def build_evaluator(parts: RolloutParts, chunks: ModelChunks, runtime: Runtime) -> Evaluator | None:
    """The evaluator of `config.evaluation`; None where there is none.

    Raises:
        ValueError: wrong or too few prompts, or a reward or environment that is not found.
    """
    evaluation = parts.config.evaluation
    if evaluation is None:
        return None
    spec = parts.sampling(
        group_size=evaluation.responses_per_prompt, temperature=evaluation.temperature
    )
    sampler = _embedded_sampler(parts.config, chunks, runtime, spec)
    maker = _maker(parts, spec, sampler)
    if maker is None:
        return Evaluator(sampler, None)
    prompts, data_sets = parts.evaluation_prompts()
    if parts.reward is not None:
        for prompt in prompts:
            check_answer(parts.reward, prompt.answer, prompt.source)
    return Evaluator(sampler, maker, prompts, data_sets=data_sets)


def _maker(
    parts: RolloutParts,
    spec: SamplingSpec,
    sampler: Sampler,
    *,
    uses_logprobs: bool = False,
    routes: RouteReader | None = None,
) -> GroupMaker | None:
    """Makes groups on rank 0; with `rollouts.agent`, its environment's first process starts."""
    if not parts.is_main:
        return None
    config, server, limits = parts.config.rollouts.agent, parts.config.rollouts.server, parts.limits
    agent = None
    if config is not None:
        assert parts.tokenizer is not None and parts.dialogues is not None
        agent = AgentLoop(
            Environment(config),
            parts.tokenizer,
            parts.dialogues,
            config,
            max_sequence_length=limits.max_positions,
            max_turn_length=spec.max_response_length,
            can_be_asked=sampler.can_be_asked,
        )
    groups = GroupSpec(
        sampling=spec,
        limits=limits,
        partial_groups="drop" if server is None else server.partial_groups,
        turn_rewards=config is not None and config.turn_rewards,
        asked="the model" if server is None else server.address,
        uses_logprobs=uses_logprobs,
        routes=routes,
    )
    return GroupMaker(groups, parts.reward, agent=agent)


def _sampler(
    parts: RolloutParts, chunks: ModelChunks, runtime: Runtime, spec: SamplingSpec
) -> Sampler:
    """Of the engine's kind."""
    config, rollouts = parts.config, parts.config.rollouts
    if rollouts.engine == "embedded":
        return _embedded_sampler(config, chunks, runtime, spec)
    folders = PolicyFolders(
        rollouts.weights.directory or config.output.directory / "policy",
        weights_exporter(chunks, config.model, timeout_minutes=config.training.timeout_minutes),
        spec=spec,
        tokenizer=parts.tokenizer,
        weights=rollouts.weights,
    )
    if rollouts.engine == "hf":
        return TransformersSampler(folders, spec, device=runtime.device)
    with needed_by("rollouts.engine: openai", extra="rollouts"):
        from megatron_prefix.rollouts.server.sampler import server_sampler
    return server_sampler(config, spec, parts.tokenizer, folders, os.environ)


def _embedded_sampler(
    config: RunConfig, chunks: ModelChunks, runtime: Runtime, spec: SamplingSpec
) -> EmbeddedSampler:
    return EmbeddedSampler(
        chunks,
        spec,
        device=runtime.device,
        kernel=config.training.kernel,
        max_cached_tokens=(
            _CACHED_PER_TRAINED_TOKEN
            * config.training.token_budget
            // config.parallel.context_parallel_size
        ),
    )

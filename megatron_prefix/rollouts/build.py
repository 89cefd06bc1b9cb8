"""The engine and the evaluator that a run's configuration asks for."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prefix.config import RunConfig
from megatron_prefix.distributed.rank_results import rank_0_alone
from megatron_prefix.distributed.runtime import Runtime
from megatron_prefix.model.build import ModelChunks
from megatron_prefix.packages import needed_by
from megatron_prefix.rollouts.embedded.batch import SamplingOptions
from megatron_prefix.rollouts.embedded.engine import EmbeddedEngine
from megatron_prefix.rollouts.embedded.evaluator import Evaluator
from megatron_prefix.rollouts.embedded.sampler import Sampler
from megatron_prefix.rollouts.engine import ENGINE_ERRORS, RolloutEngine
from megatron_prefix.rollouts.file_engine import FileEngine
from megatron_prefix.rollouts.hf.engine import HuggingFaceEngine
from megatron_prefix.rollouts.hf.export import weights_exporter
from megatron_prefix.rollouts.hf.folders import PolicyFolders, generation_settings
from megatron_prefix.rollouts.mixed_prompts import MixedPrompts
from megatron_prefix.rollouts.prompts import Prompt, PromptSource, prompt_stream, take_first
from megatron_prefix.rollouts.record_forms import RecordForms
from megatron_prefix.rollouts.rewards import (
    RewardFunction,
    WeightedReward,
    check_answer,
    close_reward,
    load_reward,
)
from megatron_prefix.rollouts.routes import FIELD as ROUTES
from megatron_prefix.rollouts.routes import route_reader
from megatron_prefix.rollouts.stream import RecordStream
from megatron_prefix.rollouts.survey import survey_groups, survey_prompts
from megatron_prefix.rollouts.text.dialogue import DialogueEncoder
from megatron_prefix.rollouts.text.prompts import TextPrompts
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
from megatron_prefix.rollouts.usable import Usable

if TYPE_CHECKING:
    from megatron_prefix.rollouts.embedded.agent_evaluator import AgentEvaluator

_CACHED_PER_TRAINED_TOKEN = 8
"""Keys and values of so many tokens are held where one token is trained on: all that a layer keeps
for backward is many times as large as its keys and values."""


def build_engine(config: RunConfig, chunks: ModelChunks, runtime: Runtime) -> RolloutEngine:
    """The engine of `config.rollouts`.

    Raises:
        ValueError: a file or tokenizer that is not there or of unknown format, or a reward that is
            not found.
    """
    rollouts = config.rollouts
    tokenizer = _tokenizer(config)
    reward = None if rollouts.reward is None else _reward(config, tokenizer)
    usable = Usable(leave_out=rollouts.unusable == "leave_out")
    if rollouts.engine == "file":
        return _file_engine(
            config,
            tokenizer,
            reward,
            usable=usable,
            reads=runtime.is_main,
            run_alone=functools.partial(rank_0_alone, errors=ENGINE_ERRORS),
            epochs=rollouts.epochs,
        )
    assert rollouts.group_size is not None
    sources = _sources(config, tokenizer, usable)
    source: PromptSource = sources[0]
    if rollouts.ratios:
        source = MixedPrompts(sources, rollouts.ratios)
    options = _options(config, tokenizer, temperature=rollouts.temperature)
    if rollouts.engine == "openai":
        with needed_by("rollouts.engine: openai", extra="rollouts"):
            from megatron_prefix.rollouts.server.build import build_openai_engine
        folders = _folders(config, chunks, options, tokenizer)
        return build_openai_engine(config, source, reward, folders, options, tokenizer, os.environ)
    assert reward is not None
    if rollouts.engine == "embedded":
        return EmbeddedEngine(
            _sampler(config, chunks, runtime),
            source,
            vocab_size=config.model.vocab_size,
            max_sequence_length=config.model.max_sequence_length,
            group_size=rollouts.group_size,
            options=options,
            reward=reward,
            seed=config.training.seed,
        )
    return HuggingFaceEngine(
        source,
        reward,
        _folders(config, chunks, options, tokenizer),
        options,
        weights=rollouts.weights,
        group_size=rollouts.group_size,
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.model.max_sequence_length,
        seed=config.training.seed,
        device=runtime.device,
    )


def build_evaluator(
    config: RunConfig, chunks: ModelChunks, runtime: Runtime
) -> Evaluator | AgentEvaluator | None:
    """The evaluator of `config.evaluation`; None where there is none.

    Raises:
        ValueError: wrong or too few prompts, or a reward or environment that is not found.
    """
    evaluation = config.evaluation
    if evaluation is None:
        return None
    tokenizer = _tokenizer(config)
    options = _options(config, tokenizer, temperature=evaluation.temperature)
    usable = Usable(leave_out=config.rollouts.unusable == "leave_out")
    prompts: list[Prompt] = []
    data_sets: list[str] = []
    for name, files in evaluation.data_sets.items():
        prompts += take_first(
            _prompts(config, tokenizer, usable, files=files, epochs=1, is_shuffled=False),
            evaluation.num_prompts,
            names=", ".join(map(str, files)),
        )
        data_sets += [name] * evaluation.num_prompts if name else []
    sampler = _sampler(config, chunks, runtime)
    if config.rollouts.agent is not None:
        with needed_by("rollouts.agent", extra="rollouts"):
            from megatron_prefix.rollouts.embedded.agent_evaluator import AgentEvaluator
            from megatron_prefix.rollouts.server.build import build_agent_loop
        assert tokenizer is not None
        loop = build_agent_loop(config, options, tokenizer) if runtime.is_main else None
        return AgentEvaluator(
            sampler,
            loop,
            prompts,
            options=options,
            seed=config.training.seed,
            data_sets=data_sets,
        )
    reward = _reward(config, tokenizer)
    for prompt in prompts:
        check_answer(reward, prompt.answer, prompt.source)
    return Evaluator(
        sampler,
        prompts,
        options=options,
        reward=reward,
        seed=config.training.seed,
        responses_per_prompt=evaluation.responses_per_prompt,
        data_sets=data_sets,
    )


def build_text_reader(config: RunConfig) -> Callable[[Sequence[int]], str]:
    """Writes tokens as text, special tokens included; ids where the run has no tokenizer.

    Raises:
        ValueError: a tokenizer that is not there.
    """
    tokenizer = _tokenizer(config)
    return tokenizer.decode if tokenizer is not None else lambda tokens: " ".join(map(str, tokens))


def _tokenizer(config: RunConfig) -> TextTokenizer | None:
    text = config.rollouts.text
    if text is None:
        return None
    return TextTokenizer(text.tokenizer, vocab_size=config.model.vocab_size)


def _folders(
    config: RunConfig,
    chunks: ModelChunks,
    options: SamplingOptions,
    tokenizer: TextTokenizer | None,
) -> PolicyFolders:
    """Where weights are handed over."""
    weights = config.rollouts.weights
    return PolicyFolders(
        weights.directory or config.output.directory / "policy",
        weights_exporter(chunks, config.model, timeout_minutes=config.training.timeout_minutes),
        generation=generation_settings(
            temperature=options.temperature, top_p=options.top_p, stop_tokens=options.stop_tokens
        ),
        tokenizer=tokenizer,
        keep=weights.keep,
    )


def _forms(config: RunConfig, tokenizer: TextTokenizer | None) -> RecordForms:
    dialogues = None
    if tokenizer is not None:
        dialogues = DialogueEncoder(tokenizer, stop_tokens=_stop_tokens(config, tokenizer))
    return RecordForms(
        config.rollouts.fields,
        dialogues=dialogues,
        need_rewards=config.objective.name != "supervised" or config.rollouts.reward is not None,
        ignored=(ROUTES,) if config.training.replayed_routes == "ignore" else (),
    )


def _reward(config: RunConfig, tokenizer: TextTokenizer | None) -> RewardFunction:
    reward = config.rollouts.reward
    assert reward is not None
    load = functools.partial(
        load_reward, tokenizer=tokenizer, process=config.rollouts.reward_process
    )
    if isinstance(reward, str):
        return load(reward)
    assert config.objective.reward_weights is not None
    return WeightedReward(
        {name: load(spec) for name, spec in reward.items()}, config.objective.reward_weights
    )


def groups_of_files(config: RunConfig) -> FileEngine:
    """The groups of `rollouts.paths`, once and in order, for a process that reads them alone.

    Raises:
        ValueError: see `build_engine`.
    """
    tokenizer = _tokenizer(config)
    reward = None if config.rollouts.reward is None else _reward(config, tokenizer)
    usable = Usable(leave_out=config.rollouts.unusable == "leave_out")
    return _file_engine(config, tokenizer, reward, usable=usable, epochs=1)


def _file_engine(
    config: RunConfig,
    tokenizer: TextTokenizer | None,
    reward: RewardFunction | None,
    **reading: Any,
) -> FileEngine:
    """The engine that reads groups; `reading` says who reads, and how often (see `FileEngine`)."""
    return FileEngine(
        config.rollouts.files,
        vocab_size=config.model.vocab_size,
        max_positions=config.model.max_sequence_length,
        group_size=config.rollouts.group_size,
        forms=_forms(config, tokenizer),
        reward=reward,
        reward_weights=config.objective.reward_weights,
        is_corrected=config.objective.correction is not None,
        routes=route_reader(config),
        has_mrope=config.model.position_embedding_type == "mrope",
        **reading,
    )


def prompts_of_files(config: RunConfig) -> PromptSource:
    """The prompts of `rollouts.paths`, once and in order.

    Raises:
        ValueError: see `build_engine`.
    """
    rollouts = config.rollouts
    usable = Usable(leave_out=rollouts.unusable == "leave_out")
    return _prompts(
        config, _tokenizer(config), usable, files=rollouts.files, epochs=1, is_shuffled=False
    )


def survey_records(config: RunConfig) -> None:
    """Look at the records of a run before its first step (see `survey`), on one rank.

    Raises:
        ValueError: what is wrong with one, naming it.
    """
    rollouts = config.rollouts
    if rollouts.check_records == 0:
        return
    tokenizer = _tokenizer(config)
    reward = None if rollouts.reward is None else _reward(config, tokenizer)
    usable = Usable(leave_out=rollouts.unusable == "leave_out")
    at_most = rollouts.check_records
    try:
        if rollouts.engine == "file":
            engine = _file_engine(config, tokenizer, reward, usable=usable, epochs=1)
            survey_groups(engine.each(), reward, usable, at_most=at_most)
            return
        for source in _sources(config, tokenizer, usable):
            fields = source.read_fields if isinstance(source, TextPrompts) else frozenset()
            survey_prompts(source.each(), reward, usable, at_most=at_most, read_fields=fields)
    finally:
        close_reward(reward)


def _sources(
    config: RunConfig, tokenizer: TextTokenizer | None, usable: Usable
) -> list[RecordStream[Prompt] | TextPrompts]:
    """The data sets of prompts to train on."""
    rollouts = config.rollouts
    data_sets = rollouts.data_sets if rollouts.ratios else [rollouts.files]
    return [
        _prompts(config, tokenizer, usable, files=files, epochs=rollouts.epochs)
        for files in data_sets
    ]


def _prompts(
    config: RunConfig,
    tokenizer: TextTokenizer | None,
    usable: Usable,
    *,
    files: Sequence[Path],
    epochs: int | None,
    is_shuffled: bool = True,
) -> RecordStream[Prompt] | TextPrompts:
    """The prompts of files."""
    rollouts = config.rollouts
    assert rollouts.max_response_length is not None
    vocab_size = config.model.vocab_size
    max_prompt_length = config.model.max_sequence_length - rollouts.max_response_length
    if rollouts.text is None or tokenizer is None:
        return prompt_stream(
            files,
            vocab_size=vocab_size,
            max_prompt_length=max_prompt_length,
            epochs=epochs,
            usable=usable,
        )
    return TextPrompts(
        files,
        tokenizer,
        rollouts.text,
        vocab_size=vocab_size,
        max_prompt_length=max_prompt_length,
        shuffle=rollouts.text.shuffle and is_shuffled,
        seed=config.training.seed,
        epochs=epochs,
        usable=usable,
    )


def _options(
    config: RunConfig, tokenizer: TextTokenizer | None, *, temperature: float
) -> SamplingOptions:
    rollouts = config.rollouts
    assert rollouts.max_response_length is not None
    return SamplingOptions(
        max_response_length=rollouts.max_response_length,
        temperature=temperature,
        top_p=rollouts.top_p,
        stop_tokens=_stop_tokens(config, tokenizer),
    )


def _stop_tokens(config: RunConfig, tokenizer: TextTokenizer | None) -> tuple[int, ...]:
    stop_tokens = config.rollouts.stop_tokens
    if stop_tokens or tokenizer is None:
        return stop_tokens
    server = config.rollouts.server
    if server is not None and server.kind == "transformers":
        # It ends with what the hand-over tells it, and answers in text: that says one token only.
        return () if tokenizer.end_token is None else (tokenizer.end_token,)
    return tokenizer.stop_tokens


def _sampler(config: RunConfig, chunks: ModelChunks, runtime: Runtime) -> Sampler:
    return Sampler(
        chunks,
        device=runtime.device,
        kernel=config.training.kernel,
        max_cached_tokens=(
            _CACHED_PER_TRAINED_TOKEN
            * config.training.token_budget
            // config.parallel.context_parallel_size
        ),
    )

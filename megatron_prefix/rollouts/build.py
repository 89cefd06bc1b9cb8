"""The engine and the evaluator that a run's configuration asks for."""

from __future__ import annotations

from megatron_prefix.rollouts.embedded.batch import SamplingOptions
from megatron_prefix.rollouts.embedded.engine import EmbeddedEngine
from megatron_prefix.rollouts.embedded.evaluator import Evaluator
from megatron_prefix.rollouts.embedded.prompts import first_prompts
from megatron_prefix.rollouts.embedded.sampler import Sampler
from megatron_prefix.rollouts.engine import RolloutEngine
from megatron_prefix.rollouts.file_engine import FileEngine
from megatron_prefix.rollouts.rewards import load_reward
from megatron_prefix.training.config import RunConfig
from megatron_prefix.training.model import ModelChunks
from megatron_prefix.training.runtime import Runtime

_CACHED_PER_TRAINED_TOKEN = 8
"""Keys and values of so many tokens are held where one token is trained on: all that a layer keeps
for backward is many times as large as its keys and values."""


def build_engine(config: RunConfig, chunks: ModelChunks, runtime: Runtime) -> RolloutEngine:
    """The engine of `config.rollouts`.

    Raises:
        ValueError: a file that is not there or of unknown format, or a reward that is not found.
    """
    rollouts = config.rollouts
    reward = None if rollouts.reward is None else load_reward(rollouts.reward)
    if rollouts.engine == "file":
        return FileEngine(
            rollouts.paths,
            vocab_size=config.model.vocab_size,
            max_positions=config.model.max_sequence_length,
            group_size=rollouts.group_size,
            reward=reward,
            epochs=rollouts.epochs,
        )
    assert rollouts.group_size is not None and reward is not None
    return EmbeddedEngine(
        _sampler(config, chunks, runtime),
        rollouts.paths,
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.model.max_sequence_length,
        group_size=rollouts.group_size,
        options=_options(config, temperature=rollouts.temperature),
        reward=reward,
        seed=config.training.seed,
        epochs=rollouts.epochs,
    )


def build_evaluator(config: RunConfig, chunks: ModelChunks, runtime: Runtime) -> Evaluator | None:
    """The evaluator of `config.evaluation`; None where there is none.

    Raises:
        ValueError: wrong or too few prompts, or a reward that is not found.
    """
    evaluation = config.evaluation
    if evaluation is None:
        return None
    assert config.rollouts.reward is not None
    options = _options(config, temperature=evaluation.temperature)
    prompts = first_prompts(
        evaluation.paths,
        evaluation.num_prompts,
        vocab_size=config.model.vocab_size,
        max_prompt_length=config.model.max_sequence_length - options.max_response_length,
    )
    return Evaluator(
        _sampler(config, chunks, runtime),
        prompts,
        options=options,
        reward=load_reward(config.rollouts.reward),
        seed=config.training.seed,
    )


def _options(config: RunConfig, *, temperature: float) -> SamplingOptions:
    rollouts = config.rollouts
    assert rollouts.max_response_length is not None
    return SamplingOptions(
        max_response_length=rollouts.max_response_length,
        temperature=temperature,
        top_p=rollouts.top_p,
        stop_tokens=rollouts.stop_tokens,
    )


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

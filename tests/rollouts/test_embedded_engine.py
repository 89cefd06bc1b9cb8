"""Prompts in, groups with rewards out; evaluation; and what a configuration builds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prefix.config import (
    EvaluationConfig,
    OutputConfig,
    ParallelConfig,
    RolloutsConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_prefix.config.loader import ConfigError
from megatron_prefix.distributed.runtime import Runtime, runtime
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.rollouts.build import build_engine, build_evaluator
from megatron_prefix.rollouts.embedded.evaluator import Evaluator
from megatron_prefix.rollouts.embedded.sampler import EmbeddedSampler
from megatron_prefix.rollouts.engine import EndOfRollouts
from megatron_prefix.rollouts.file_engine import FileEngine
from megatron_prefix.rollouts.parts import RolloutParts
from megatron_prefix.rollouts.prompts import PromptSource, prompt_stream, take_first
from megatron_prefix.rollouts.sampling.engine import SampledGroups
from megatron_prefix.rollouts.sampling.groups import GroupMaker, GroupSpec
from megatron_prefix.rollouts.sampling.sampler import SamplingSpec
from megatron_prefix.rollouts.validation import Limits
from tests.megatron.models import model_config
from tests.rollouts.files import FORMATS, plain, write
from tests.rollouts.sampling import greedy_response, sampling_model, unmodified

SPEC = SamplingSpec(group_size=4, max_response_length=5, stop_tokens=tuple(range(0, 61, 4)), seed=8)
PROMPTS = [{"prompt": list(range(2, 4 + n)), "answer": n, "id": f"p{n}"} for n in range(5)]


@pytest.fixture(autouse=True)
def place() -> Iterator[Runtime]:
    with runtime(ParallelConfig(), device="cpu", seed=3, timeout_minutes=2, float64=True) as place:
        yield place


def even_first_token(prompt: tuple[int, ...], response: tuple[int, ...], answer: Any) -> float:
    assert prompt[-1] == 3 + answer
    return float(response[0] % 2 == 0)


def prompts_of(path: Path, *, epochs: int = 1) -> PromptSource:
    return prompt_stream([path], vocab_size=61, max_prompt_length=59, epochs=epochs)


def maker(spec: SamplingSpec) -> GroupMaker:
    limits = Limits(vocab_size=61, max_positions=64)
    return GroupMaker(GroupSpec(sampling=spec, limits=limits), even_first_token)


def embedded(chunks: Any, spec: SamplingSpec) -> EmbeddedSampler:
    return EmbeddedSampler(chunks, spec, device=torch.device("cpu"))


def engine(path: Path) -> SampledGroups:
    chunks = sampling_model(model_config())
    return SampledGroups(embedded(chunks, SPEC), prompts_of(path, epochs=2), maker(SPEC))


@pytest.mark.parametrize("suffix", FORMATS)
def test_groups_hold_the_prompts_in_order_with_sampled_responses_and_rewards(tmp_path, suffix):
    path = write(tmp_path / f"prompts{suffix}", PROMPTS)
    groups = plain(engine(path).next_rollouts(3, step=0))
    place = "{}: row {}" if suffix == ".parquet" else "{}:{}"
    first = 0 if suffix == ".parquet" else 1
    assert [group.source for group in groups] == [place.format(path, first + n) for n in range(3)]
    assert [list(group.prompt) for group in groups] == [p["prompt"] for p in PROMPTS[:3]]
    assert [group.answer for group in groups] == [0, 1, 2]
    for group in groups:
        assert len(group.responses) == 4
        assert group.old_logprobs is None
        assert group.rewards == tuple(float(r[0] % 2 == 0) for r in group.responses)
        for response, finished in zip(group.responses, group.finished, strict=True):
            assert finished == (response[-1] in SPEC.stop_tokens)
            assert finished or len(response) == 5
    assert len({response for group in groups for response in group.responses}) > 4


def test_a_resumed_engine_goes_on_with_the_same_groups(tmp_path):
    path = write(tmp_path / "prompts.jsonl", PROMPTS)
    first = engine(path)
    first.next_rollouts(3, step=0)
    state = first.state_dict()
    # Over the end of the epoch, at another step than the first time.
    expected = plain(first.next_rollouts(4, step=1))
    second = engine(path)
    second.load_state_dict(state)
    assert plain(second.next_rollouts(4, step=1)) == expected
    assert [group.answer for group in expected] == [3, 4, 0, 1]
    with pytest.raises(EndOfRollouts):
        second.next_rollouts(4, step=2)
    assert second.next_rollouts(3, step=2).num_groups == 3
    second.close()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": 1}, "prompts.jsonl:2: prompt: missing"),
        ({"prompt": "text"}, "prompts.jsonl:2: prompt: 'text' is not a list of token ids"),
        ({"prompt": []}, "prompts.jsonl:2: prompt: is empty"),
        ({"prompt": [3, 61]}, r"prompts.jsonl:2: prompt\[1\]: token 61 is outside the vocabulary"),
        ({"prompt": [3, 1.5]}, r"prompts.jsonl:2: prompt\[1\]: 1.5 is not a token id"),
        ({"prompt": [3], "answers": 1}, "prompts.jsonl:2: answers: not a known field; is answer"),
        ({"prompt": [3], "prompt_keys": [1]}, "prompts.jsonl:2: prompt_keys: no engine that samp"),
        ({"prompt": [3] * 60}, "prompts.jsonl:2: prompt: its 60 tokens leave .* at most 59"),
    ],
)
def test_a_wrong_prompt_is_named_by_file_line_and_field(tmp_path, record, message):
    path = write(tmp_path / "prompts.jsonl", [PROMPTS[0], record])
    with pytest.raises(ValueError, match=message):
        engine(path).next_rollouts(2, step=0)


def test_a_reward_that_fails_is_named_with_its_prompt(tmp_path):
    path = write(tmp_path / "prompts.jsonl", [PROMPTS[0], {"prompt": [1, 2], "answer": 7}])
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: responses\[0\]: reward .* failed"):
        engine(path).next_rollouts(2, step=0)


def evaluator(path: Path, chunks: Any, count: int) -> Evaluator:
    prompts = take_first(prompts_of(path), count, names=str(path))
    spec = SamplingSpec(max_response_length=3, temperature=0.0, seed=1)
    return Evaluator(embedded(chunks, spec), maker(spec), prompts)


def test_an_evaluation_is_the_mean_reward_of_the_first_prompts_and_changes_nothing(tmp_path):
    path = write(tmp_path / "prompts.jsonl", PROMPTS)
    chunks = sampling_model(model_config())
    random_state = torch.get_rng_state()
    tested = evaluator(path, chunks, 4)
    mean = tested.evaluate()
    assert torch.equal(torch.get_rng_state(), random_state)
    model = unmodified(model_config(), chunks)
    first_tokens = [greedy_response(model, p["prompt"], 1, 61)[0] for p in PROMPTS[:4]]
    assert tested.last.rewards == tuple(float(token % 2 == 0) for token in first_tokens)
    assert mean == tested.last.mean == tested.last.num_correct / 4
    assert tested.last.num_prompts == 4
    assert tested.evaluate() == mean


def test_too_few_prompts_to_evaluate_on_are_refused(tmp_path):
    path = write(tmp_path / "prompts.jsonl", PROMPTS)
    with pytest.raises(ValueError, match=r"prompts.jsonl: fewer than the 6 prompts"):
        take_first(prompts_of(path), 6, names=str(path))


def run_config(path: Path, **options: Any) -> RunConfig:
    rollouts = {
        "engine": "embedded",
        "paths": (path,),
        "group_size": 3,
        "max_response_length": 4,
        "reward": "tests.rollouts.user_rewards:even_first_token",
        **options,
    }
    return RunConfig(
        model=model_config(),
        training=TrainingConfig(steps=1, token_budget=128, dtype="float64", device="cpu"),
        rollouts=RolloutsConfig(**rollouts),
        output=OutputConfig(directory=path.parent),
        objective=ObjectiveConfig(temperature=rollouts.get("temperature", 1.0)),
        evaluation=EvaluationConfig(paths=(path,), num_prompts=2),
    )


def test_a_configuration_builds_its_engine_and_its_evaluator(tmp_path, place):
    path = write(tmp_path / "prompts.jsonl", PROMPTS)
    chunks = sampling_model(model_config())
    config = run_config(path, temperature=0.7, stop_tokens=(1,))
    parts = RolloutParts(config, is_main=True)
    with_config = build_engine(parts, chunks, place)
    [group] = plain(with_config.next_rollouts(1, step=0))
    assert len(group.responses) == 3
    assert max(map(len, group.responses)) <= 4
    found = build_evaluator(parts, chunks, place)
    assert found.evaluate() in (0.0, 0.5, 1.0)
    from_file = run_config(path, engine="file")
    parts = RolloutParts(from_file, is_main=True)
    assert isinstance(build_engine(parts, chunks, place), FileEngine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "file", "reward": None}, "rollouts.reward: required by evaluation"),
        (
            {"engine": "file", "max_response_length": None},
            "rollouts.max_response_length: required by evaluation",
        ),
        ({"max_response_length": 64}, "rollouts.max_response_length: 64 leaves no room"),
        ({"stop_tokens": (5, 61)}, "rollouts.stop_tokens: 61 is outside the vocabulary of 61"),
        ({"group_size": 0}, "group_size: 0 must be at least 1"),
    ],
)
def test_sampling_options_that_cannot_work_are_refused_by_the_configuration(
    tmp_path, options, message
):
    with pytest.raises(ConfigError, match=message):
        run_config(tmp_path / "prompts.jsonl", **options)

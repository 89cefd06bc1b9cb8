"""A converted model learns from a packed row what its source learns from every sequence alone.

The witness is transformers' own model: the loss is written out here, and gradients are compared
under the names that transformers saves tensors by. Both sides run in float64.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.checkpoints.weights import load_weights
from megatron_prefix.config import ParallelConfig
from megatron_prefix.config.packing import packing_of_run
from megatron_prefix.conversion import hf_to_megatron
from megatron_prefix.conversion.hf_folder import HFFolder
from megatron_prefix.conversion.mapping import Mapping, Parameter
from megatron_prefix.model.build import build_model_chunks, model_shape
from megatron_prefix.model.full_tensors import full_gradients
from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.rollouts.records import RolloutGroup
from megatron_prefix.training.minibatch import build_minibatch
from megatron_prefix.training.step import accumulate_gradients, compute_logprobs
from tests.conversion.loading import model_section
from tests.conversion.models import CASES, QWEN3_5, QWEN3_NEXT, write_model
from tests.megatron.models import (
    HAS_GATED_DELTA_NET,
    ON_CPU,
    TRAINING,
    relative_error,
    single_process,
)


class Float32IsFloat64(TorchFunctionMode):
    """Code that asks for float32 gets float64.

    Transformers computes norms, rotary angles and the delta rule in float32, whatever the model's
    dtype. Its code stays as it is; without this, gradients differ by up to 4e-5.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call it with the other type."""
        if func is Tensor.float:
            return args[0].double()
        wide = [torch.float64 if x is torch.float32 else x for x in args]
        named = {
            name: torch.float64 if x is torch.float32 else x for name, x in (kwargs or {}).items()
        }
        return func(*wide, **named)


CLIP, EPSILON = 0.2, 1e-6
OBJECTIVE = ObjectiveConfig(clip_low=CLIP, clip_high=CLIP, advantage_epsilon=EPSILON)
# A prompt of one token, responses of one token, and a prompt that is shared by four.
SHAPES = [(30, [9, 1, 14, 5]), (1, [6, 3])]


def _groups() -> list[RolloutGroup]:
    rng = np.random.default_rng(4)
    return [
        RolloutGroup(
            prompt=rng.integers(0, 61, prompt),
            responses=[rng.integers(0, 61, n) for n in lengths],
            rewards=rng.normal(size=len(lengths)),
            source=f"group {index}",
        )
        for index, (prompt, lengths) in enumerate(SHAPES)
    ]


def _logprobs(model: torch.nn.Module, group: RolloutGroup, response: np.ndarray) -> Tensor:
    """Of a response's tokens, by transformers."""
    tokens = torch.from_numpy(np.concatenate([group.prompt, response]))
    logits = model(tokens[None]).logits[0, len(group.prompt) - 1 : -1]
    chosen = torch.from_numpy(np.asarray(response))
    return logits.double().log_softmax(-1).gather(1, chosen[:, None])[:, 0]


def _with_old_logprobs(model: torch.nn.Module, groups: list[RolloutGroup]) -> list[RolloutGroup]:
    """Near the policy's, some so far off that the ratio is clipped."""
    rng = np.random.default_rng(5)
    found = []
    for group in groups:
        with torch.no_grad():
            now = [_logprobs(model, group, response).numpy() for response in group.responses]
        drawn = [np.minimum(x + rng.normal(scale=0.25, size=len(x)), -1e-3) for x in now]
        # As records have them.
        old = [x.astype(np.float32) for x in drawn]
        found.append(dataclasses.replace(group, old_logprobs=old))
    return found


def _train_transformers(model: torch.nn.Module, groups: list[RolloutGroup]) -> list[Tensor]:
    """GRPO's loss (arXiv 2402.03300, eq. 3), sequence by sequence; gradients accumulate."""
    count = sum(len(group.responses) for group in groups)
    found = []
    for group in groups:
        rewards = torch.tensor(group.rewards, dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std() + EPSILON)
        for response, old, advantage in zip(
            group.responses, group.old_logprobs, advantages, strict=True
        ):
            logprobs = _logprobs(model, group, response)
            ratio = (logprobs - torch.tensor(old, dtype=torch.float64)).exp()
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            loss = -torch.minimum(ratio * advantage, clipped * advantage).mean() / count
            loss.backward()
            found.append(logprobs.detach())
    return found


def _saved_gradients(model: torch.nn.Module, folder: Path) -> dict[str, Tensor]:
    """By the names of transformers' files."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(folder)
    saved = HFFolder(folder)
    return {name: saved.read(name) for name in saved.tensors}


def _train_converted(
    megatron: Path, groups: list[RolloutGroup]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Log-probabilities of the entries and gradients by checkpoint keys, of packed rows."""
    config = model_section(megatron)
    training = dataclasses.replace(TRAINING, share_only_where_it_pays=False)
    with single_process():
        with Float32IsFloat64():  # which Megatron's rotary angles are in, too
            chunks = build_model_chunks(
                config, ParallelConfig(), training, use_distributed_optimizer=False
            )
        load_weights(megatron, chunks)
        packing = packing_of_run(
            training,
            ParallelConfig(),
            model_shape=model_shape(config, chunks.config),
            data_parallel_size=1,
        )
        minibatch = build_minibatch(
            groups,
            OBJECTIVE,
            packing,
            attention=AttentionSetup.of(chunks.config, ON_CPU.device),
            data_parallel_rank=0,
        )
        assert minibatch.packed_tokens < minibatch.step.ungrouped_tokens
        (row,) = minibatch.rows
        (of_entries,) = compute_logprobs(chunks, minibatch.batches, OBJECTIVE)
        logprobs = [of_entries[row.sequence_ids == i] for i in range(row.num_sequences)]
        accumulate_gradients(chunks, minibatch.batches, OBJECTIVE)
        gradients = full_gradients(chunks)
    assert gradients is not None
    return logprobs, gradients


def _in_hf(mapping: Mapping, parameter: Parameter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A gradient by Hugging Face's names.

    Weights are moved, and one norm's is shifted by 1. What moves a gradient is the same without
    the shift.
    """
    ends = [end for end, _ in parameter.stored]
    (key, index), *_ = [p for p in parameter.places if p[0] + ends[0] in tensors]
    whole = torch.cat([tensors[key + end][index] for end in ends])
    moved, shift = (mapping.to_hf(parameter, x) for x in (whole, torch.zeros_like(whole)))
    return {name: moved[name] - shift[name] for name in moved}


@pytest.mark.skipif(not HAS_GATED_DELTA_NET, reason="megatron-core before 0.16")
@pytest.mark.parametrize("case", [QWEN3_NEXT, QWEN3_5])
def test_gradients_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    from transformers import AutoModelForCausalLM

    family, options = CASES[case]
    # Of bfloat16, so that a norm less 1 has no rounding either.
    source = write_model(tmp_path / "hf", family, dtype=torch.bfloat16, **options)
    architecture = hf_to_megatron(source, tmp_path / "megatron")
    with Float32IsFloat64():
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float64, experts_implementation="eager"
        ).eval()
        groups = _with_old_logprobs(model, _groups())
        expected_logprobs = _train_transformers(model, groups)
    expected = _saved_gradients(model, tmp_path / "gradients")
    logprobs, gradients = _train_converted(tmp_path / "megatron", groups)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=0, atol=1e-10)
    mapping = Mapping(architecture)
    found = {}
    for parameter in mapping.parameters():
        found |= _in_hf(mapping, parameter, gradients)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        # Rounding of float64: 1e-14 was seen, and 1e-12 where a gradient is small.
        assert relative_error(found[name], gradient) <= 1e-9, name

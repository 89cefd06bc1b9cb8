"""Small models that sample, and naive decoding with the unmodified model to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_prefix.config import ModelConfig, ParallelConfig
from megatron_prefix.megatron.gated_delta_net import delta_net_layers, is_gated_delta_net
from megatron_prefix.model.build import ModelChunks, build_model, build_model_chunks
from megatron_prefix.model.full_tensors import (
    FullTensors,
    full_parameters,
    load_full_parameters,
)
from megatron_prefix.model.transformer_config import transformer_config
from megatron_prefix.rollouts.embedded.sampler import EmbeddedSampler
from megatron_prefix.rollouts.prompts import Prompt
from megatron_prefix.rollouts.sampling.sampler import Response, SamplingSpec, Wanted
from tests.megatron.mamba_reference import run_token_by_token
from tests.megatron.models import TRAINING, sequence_logits

CPU = torch.device("cpu")

# The padding of the vocabulary must never be drawn, so there is some in every layout.
PADDED_VOCABULARY: dict[str, Any] = {"vocab_size": 61, "make_vocab_size_divisible_by": 8}


def sampling_model(config: ModelConfig, *, spread: float = 1.0) -> ModelChunks:
    """A model in one process whose distributions are neither flat nor certain.

    Args:
        spread: larger for more certain ones.
    """
    chunks = build_model_chunks(config, ParallelConfig(), TRAINING, use_distributed_optimizer=False)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in chunks.bare[0].named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if parameter.dim() == 1:
                parameter.add_(noise, alpha=0.2)
            elif name == "output_layer.weight":
                parameter.copy_(noise * spread / parameter.shape[1] ** 0.5)
                parameter[config.vocab_size :] *= 100
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
    return chunks


class PromptSampler:
    """Samples from lists of token ids, with the options of a sampling one by one."""

    def __init__(self, chunks: ModelChunks, **options: Any) -> None:
        self._chunks = chunks
        self._options = options
        EmbeddedSampler(chunks, SamplingSpec(max_response_length=1), device=CPU, **options)

    def sample(
        self, prompts: Sequence[Sequence[int]], **options: Any
    ) -> list[list[tuple[int, ...]]] | None:
        found = self.sample_with_logprobs(prompts, **options)
        if found is None:
            return None
        return [[tuple(response.tokens.tolist()) for response in group] for group in found]

    def sample_with_logprobs(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_responses: int,
        step: int,
        sources: Sequence[str] | None = None,
        **options: Any,
    ) -> list[list[Response]] | None:
        spec = SamplingSpec(group_size=num_responses, **options)
        sampler = EmbeddedSampler(self._chunks, spec, device=CPU, **self._options)
        sources = sources or [f"prompt {i}" for i in range(len(prompts))]
        wanted = [
            Wanted(
                prompt=Prompt(tokens=tuple(tokens), answer=None, source=source),
                count=num_responses,
            )
            for tokens, source in zip(prompts, sources, strict=True)
        ]
        answers = sampler.sample(wanted, step=step)
        return None if answers is None else answers.responses


def sampler(chunks: ModelChunks, **options: Any) -> PromptSampler:
    return PromptSampler(chunks, **options)


def unmodified(config: ModelConfig, weights: FullTensors | ModelChunks) -> GPTModel:
    """Megatron's own model, of the same weights; its recurrent layers as their equations."""
    if isinstance(weights, ModelChunks):
        weights = full_parameters(weights)
    megatron_config = transformer_config(config, ParallelConfig(), TRAINING)
    has_delta_nets = any(delta_net_layers(megatron_config))
    # Megatron builds gated delta nets without flash-linear-attention only so.
    megatron_config.deterministic_mode = has_delta_nets
    model = build_model(config, megatron_config, shared_prefixes=False)
    if has_delta_nets:
        from tests.megatron.test_gated_delta_net import TokenByToken

        for module in model.modules():
            if is_gated_delta_net(type(module)):
                module.__class__ = TokenByToken
    run_token_by_token(model)
    load_full_parameters(
        ModelChunks(wrapped=[], bare=[model], config=megatron_config, head=None), weights
    )
    return model


@torch.no_grad()
def next_token_logits(model: GPTModel, tokens: Sequence[int], vocab_size: int) -> Tensor:
    """[len(tokens), vocab_size]: what follows each token, by a forward pass of all of them."""
    return sequence_logits(model, np.array([*tokens, 0]))[:, :vocab_size]


def greedy_response(
    model: GPTModel, prompt: Sequence[int], length: int, vocab_size: int
) -> tuple[int, ...]:
    """The likeliest token, again and again, each by a forward pass of everything before it."""
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(int(next_token_logits(model, tokens, vocab_size)[-1].argmax()))
    return tuple(tokens[len(prompt) :])


def random_prompts(lengths: Sequence[int], *, common: int = 0, seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens that begin with the same `common` ones."""
    rng = np.random.default_rng(seed)
    beginning = rng.integers(0, 61, common).tolist()
    return [beginning + rng.integers(0, 61, length - common).tolist() for length in lengths]

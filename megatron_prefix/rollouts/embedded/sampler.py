"""Responses sampled from the model that is being trained, in whatever layout it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from numpy.typing import NDArray

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.megatron.releases import option
from megatron_prefix.model.build import ModelChunks
from megatron_prefix.rollouts.embedded.batch import ResponseBatch, SamplingOptions
from megatron_prefix.rollouts.embedded.drawing import response_uniforms
from megatron_prefix.rollouts.embedded.pipeline import draw, row_multiple, sampling_mode


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledResponse:
    """One response and how likely its tokens were."""

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float64]
    """One for each token: at the sampling temperature (at 1 where that is 0), before top-p."""


def _refuse_unsupported(config: TransformerConfig) -> None:
    """Attention to cached keys has no windows and no sinks, and requests have no images. States
    of recurrent layers are not cached."""
    for name, without in (
        ("window_size", None),
        ("softmax_type", "vanilla"),
        ("mrope_section", None),
        ("experimental_attention_variant", None),
    ):
        value = option(config, name)
        if value not in (None, without):
            raise ValueError(
                f"{name}={value!r}: the embedded engine cannot sample from such a model yet; set "
                "rollouts.engine to file, and leave evaluation out"
            )


class Sampler:
    """Samples from the live model.

    Every rank calls it with the same arguments, and rank 0 gets all responses. Prompts are divided
    over data- and context-parallel ranks; each copy of the model runs a batch of prompts once, as
    one packed row, and then all their responses together, one token per step.
    """

    def __init__(
        self,
        chunks: ModelChunks,
        *,
        device: torch.device,
        kernel: str | None = None,
        max_cached_tokens: int | None = None,
    ) -> None:
        """Nothing is allocated yet.

        Args:
            chunks: the model, in the current parallel state.
            device: of the model.
            kernel: attention kernel by name; None takes the best for the device.
            max_cached_tokens: prompts are taken in batches whose prompts and (longest possible)
                responses have together so many tokens at most, but at least one prompt at a time;
                None takes all at once.

        Raises:
            ValueError: the model has sliding windows, attention sinks, mRoPE or recurrent layers.
        """
        _refuse_unsupported(chunks.config)
        self._chunks = chunks
        self._device = device
        self._setup = AttentionSetup.of(chunks.config, device, kernel=kernel)
        self._max_cached_tokens = max_cached_tokens
        # Rows of a few tokens per response are not worth distributing: each context-parallel rank
        # samples for prompts of its own.
        self._data_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        config = chunks.config
        # Expert-parallel ranks wait for each other in every layer, so all of them take every step.
        self._in_step = config.expert_model_parallel_size > 1
        self._pad_to_multiple = row_multiple(chunks)
        # The interleaved schedule takes a microbatch per pipeline stage at least.
        self._num_microbatches = (
            config.pipeline_model_parallel_size if len(chunks.wrapped) > 1 else 1
        )

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_responses: int,
        max_response_length: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop_tokens: Sequence[int] = (),
        seed: int,
        step: int,
        sources: Sequence[str] | None = None,
    ) -> list[list[tuple[int, ...]]] | None:
        """The tokens of `sample_with_logprobs`, its options spelt out."""
        options = SamplingOptions(
            max_response_length=max_response_length,
            temperature=temperature,
            top_p=top_p,
            stop_tokens=tuple(stop_tokens),
        )
        responses = self.sample_with_logprobs(
            prompts, options, num_responses=num_responses, seed=seed, step=step, sources=sources
        )
        if responses is None:
            return None
        return [[tuple(response.tokens.tolist()) for response in group] for group in responses]

    def sample_with_logprobs(
        self,
        prompts: Sequence[Sequence[int]],
        options: SamplingOptions,
        *,
        num_responses: int,
        seed: int,
        step: int,
        sources: Sequence[str] | None = None,
    ) -> list[list[SampledResponse]] | None:
        """Responses to each prompt. Collective.

        Args:
            prompts: token ids of each prompt, at least one.
            options: of the sampling.
            num_responses: to each prompt.
            seed, step: the randomness: other numbers give other responses, the same ones the same.
            sources: what errors call each prompt; None calls them by their index.

        Returns:
            On rank 0 `num_responses` responses to each prompt, in the prompts' order; None on
            other ranks. They do not depend on the parallel layout or on batches, up to the rounding
            of logits.

        Raises:
            ValueError: an option out of range, an empty prompt, or one that leaves too few of the
                model's positions for the response, naming it.
        """
        if num_responses < 1:
            raise ValueError(f"num_responses={num_responses}: set at least 1")
        self._check(prompts, sources, options.max_response_length)
        mine: dict[int, list[SampledResponse]] = {}
        costs = [len(prompt) + num_responses * options.max_response_length for prompt in prompts]
        with sampling_mode(self._chunks):
            for indices_of_batches in self._rounds([len(prompt) for prompt in prompts], costs):
                batches = [
                    ResponseBatch(
                        [prompts[i] for i in indices],
                        _uniforms(indices, num_responses, options, seed=seed, step=step),
                        options,
                        setup=self._setup,
                        pad_to_multiple=self._pad_to_multiple,
                    )
                    for indices in indices_of_batches
                ]
                self._run(batches, options)
                for indices, batch in zip(indices_of_batches, batches, strict=True):
                    mine.update(zip(indices, _groups(batch), strict=True))
        return self._gather(mine, len(prompts))

    def _check(
        self,
        prompts: Sequence[Sequence[int]],
        sources: Sequence[str] | None,
        max_response_length: int,
    ) -> None:
        positions = self._chunks.bare[0].max_sequence_length
        for i, prompt in enumerate(prompts):
            source = f"prompt {i}" if sources is None else sources[i]
            if len(prompt) == 0:
                raise ValueError(f"{source}: prompt: is empty; it needs at least one token")
            if len(prompt) + max_response_length > positions:
                raise ValueError(
                    f"{source}: prompt: its {len(prompt)} tokens and a response of up to "
                    f"{max_response_length} exceed the model's max_sequence_length={positions}; "
                    "shorten the prompt or lower max_response_length"
                )

    def _rounds(self, lengths: Sequence[int], costs: Sequence[int]) -> list[list[list[int]]]:
        """[round][microbatch] -> indices of this rank's prompts that run together.

        All ranks come to the same number of rounds, given the same lengths and costs of prompts.
        """
        ranks = self._data_group.size()
        shares = [range(rank, len(lengths), ranks) for rank in range(ranks)]

        def split(share: Sequence[int], parts: int) -> list[list[int]]:
            # Prompts of equal length next to each other: fewer, larger attention calls.
            ordered = sorted(share, key=lambda i: (lengths[i], i))
            return [part.tolist() for part in np.array_split(np.array(ordered, dtype=int), parts)]

        def fits(part: list[int]) -> bool:
            limit = self._max_cached_tokens
            return limit is None or len(part) <= 1 or sum(costs[i] for i in part) <= limit

        parts = self._num_microbatches
        while not all(fits(part) for share in shares for part in split(share, parts)):
            parts += self._num_microbatches
        own = split(shares[self._data_group.rank()], parts)
        rounds = [
            own[start : start + self._num_microbatches]
            for start in range(0, parts, self._num_microbatches)
        ]
        return [batches for batches in rounds if self._in_step or any(batches)]

    def _run(self, batches: Sequence[ResponseBatch], options: SamplingOptions) -> None:
        """Prompts, then step after step, until every response has ended."""
        requests = [batch.prefill() for batch in batches]
        while True:
            drawn = draw(
                self._chunks, requests, temperature=options.temperature, top_p=options.top_p
            )
            for batch, draws in zip(batches, drawn, strict=True):
                batch.accept(draws)
            if not self._anyone(any(batch.unfinished for batch in batches)):
                return
            requests = [batch.decode() for batch in batches]

    def _anyone(self, unfinished: bool) -> bool:
        if not self._in_step:
            return unfinished
        flag = torch.tensor([int(unfinished)], device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._data_group)
        return bool(flag)

    def _gather(
        self, mine: dict[int, list[SampledResponse]], num_prompts: int
    ) -> list[list[SampledResponse]] | None:
        """On rank 0 all prompts' responses, from the data-parallel ranks that sampled them."""
        # The ranks of another group hold the same responses, and so need not send them.
        if 0 not in dist.get_process_group_ranks(self._data_group):
            return None
        found: list[Any] | None = None
        if dist.get_rank() == 0:
            found = [None] * self._data_group.size()
        dist.gather_object(mine, found, dst=0, group=self._data_group)
        if found is None:
            return None
        everything = {index: group for part in found for index, group in part.items()}
        return [everything[index] for index in range(num_prompts)]


def _uniforms(
    prompts: Sequence[int], num_responses: int, options: SamplingOptions, *, seed: int, step: int
) -> np.ndarray:
    """[prompts, num_responses, max_response_length] random numbers, by the prompts' indices."""
    uniforms = np.empty((len(prompts), num_responses, options.max_response_length))
    for i, prompt in enumerate(prompts):
        for response in range(num_responses):
            uniforms[i, response] = response_uniforms(
                seed=seed,
                step=step,
                prompt=prompt,
                response=response,
                length=options.max_response_length,
            )
    return uniforms


def _groups(batch: ResponseBatch) -> list[list[SampledResponse]]:
    """The responses to each prompt of a batch."""
    return [
        [SampledResponse(tokens=tokens, logprobs=logprobs) for tokens, logprobs in group]
        for group in batch.responses()
    ]

"""Responses sampled from the model that is being trained, in whatever layout it is trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.megatron.releases import option
from megatron_prefix.model.build import ModelChunks
from megatron_prefix.rollouts.embedded.batch import ResponseBatch
from megatron_prefix.rollouts.embedded.drawing import response_uniforms
from megatron_prefix.rollouts.embedded.pipeline import draw, row_multiple, sampling_mode
from megatron_prefix.rollouts.embedded.recurrent_states import state_tokens
from megatron_prefix.rollouts.sampling.sampler import (
    Answers,
    Response,
    Sampler,
    SamplingSpec,
    Wanted,
    answers_of_ranks,
)


def _refuse_unsupported(config: TransformerConfig) -> None:
    """Requests have no images."""
    value = option(config, "mrope_section")
    if value is not None:
        raise ValueError(
            f"mrope_section={value!r}: the embedded engine cannot sample from such a model yet; "
            "set rollouts.engine to file, and leave evaluation out"
        )


class EmbeddedSampler(Sampler):
    """A `Sampler` of the live model.

    Every rank calls it with the same arguments, and rank 0 gets all responses. Prompts are divided
    over data- and context-parallel ranks; each copy of the model runs a batch of prompts once, as
    one packed row, and then all their responses together, one token per step.
    """

    def __init__(
        self,
        chunks: ModelChunks,
        spec: SamplingSpec,
        *,
        device: torch.device,
        kernel: str | None = None,
        max_cached_tokens: int | None = None,
    ) -> None:
        """Nothing is allocated yet.

        Args:
            chunks: the model, in the current parallel state.
            spec: of the sampling.
            device: of the model.
            kernel: by name; None takes the best for the device.
            max_cached_tokens: prompts are taken in batches whose prompts and (longest possible)
                responses have together so many tokens at most, but at least one prompt at a time;
                a response's recurrent states count as the tokens whose keys and values are as
                large; None takes all at once.

        Raises:
            ValueError: the model has mRoPE.
        """
        config = chunks.config
        _refuse_unsupported(config)
        self._chunks = chunks
        self._spec = spec
        self._device = device
        self._setup = AttentionSetup.of(config, device, kernel=kernel, delta_rule="torch")
        self._max_cached_tokens = max_cached_tokens
        self._state_tokens = state_tokens(config)
        # Rows of a few tokens per response are not worth distributing: each context-parallel rank
        # samples for prompts of its own.
        self._data_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        # Expert-parallel ranks wait for each other in every layer, so all of them take every step.
        self._in_step = config.expert_model_parallel_size > 1
        self._pad_to_multiple = row_multiple(chunks)
        # The interleaved schedule takes a microbatch per pipeline stage at least.
        self._num_microbatches = (
            config.pipeline_model_parallel_size if len(chunks.wrapped) > 1 else 1
        )

    def sample(self, wanted: Sequence[Wanted], *, step: int) -> Answers | None:
        """Responses to each prompt, on rank 0; None on other ranks. Collective.

        They are as many for each, and depend on the spec's seed and the step, but not on the
        parallel layout or on batches, up to the rounding of logits.

        Raises:
            ValueError: an empty prompt, or one that leaves too few of the model's positions for the
                response, naming it.
        """
        self._check(wanted)
        spec, count = self._spec, wanted[0].count
        assert all(item.count == count for item in wanted)
        prompts = [item.prompt.tokens for item in wanted]
        lengths = [len(prompt) for prompt in prompts]
        of_responses = count * (spec.max_response_length + self._state_tokens)
        mine: dict[int, list[Response]] = {}
        with sampling_mode(self._chunks):
            for indices_of_batches in self._rounds(lengths, [n + of_responses for n in lengths]):
                batches = [
                    ResponseBatch(
                        [prompts[i] for i in indices],
                        _uniforms(indices, count, spec, step=step),
                        spec,
                        setup=self._setup,
                        pad_to_multiple=self._pad_to_multiple,
                    )
                    for indices in indices_of_batches
                ]
                self._run(batches)
                for indices, batch in zip(indices_of_batches, batches, strict=True):
                    mine.update(zip(indices, batch.responses(), strict=True))
        # The ranks of another group hold the same responses, and so need not send them.
        if 0 not in dist.get_process_group_ranks(self._data_group):
            mine = {}
        return answers_of_ranks(lambda: mine, len(prompts))

    def _check(self, wanted: Sequence[Wanted]) -> None:
        positions = self._chunks.bare[0].max_sequence_length
        max_response_length = self._spec.max_response_length
        for prompt in (item.prompt for item in wanted):
            if len(prompt.tokens) == 0:
                raise ValueError(f"{prompt.source}: prompt: is empty; it needs at least one token")
            if len(prompt.tokens) + max_response_length > positions:
                raise ValueError(
                    f"{prompt.source}: prompt: its {len(prompt.tokens)} tokens and a response of "
                    f"up to {max_response_length} exceed the model's max_sequence_length="
                    f"{positions}; shorten the prompt or lower max_response_length"
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

    def _run(self, batches: Sequence[ResponseBatch]) -> None:
        """Prompts, then step after step, until every response has ended."""
        requests = [batch.prefill() for batch in batches]
        while True:
            spec = self._spec
            drawn = draw(self._chunks, requests, temperature=spec.temperature, top_p=spec.top_p)
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


def _uniforms(prompts: Sequence[int], count: int, spec: SamplingSpec, *, step: int) -> np.ndarray:
    """[prompts, count, max_response_length] random numbers, by the prompts' indices."""
    length = spec.max_response_length
    found = [
        response_uniforms(seed=spec.seed, step=step, prompt=prompt, response=i, length=length)
        for prompt in prompts
        for i in range(count)
    ]
    return np.array(found).reshape(len(prompts), count, length)

"""Samples by Hugging Face transformers in the training processes.

The policy's weights are written as a Hugging Face folder, which every rank loads and samples its
share of the prompts from. Slower than a server, and needs none: for checks, and for models that a
server does not know.

Legend: n responses, l tokens of the longest, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.distributed.rank_results import gather
from megatron_prefix.packages import needed_by
from megatron_prefix.rollouts.hf.folders import PolicyFolders
from megatron_prefix.rollouts.sampling.sampler import (
    Answers,
    Response,
    Sampler,
    SamplingSpec,
    Wanted,
    answers_of_ranks,
)


class TransformersSampler(Sampler):
    """A `Sampler` whose ranks generate with transformers."""

    def __init__(self, folders: PolicyFolders, spec: SamplingSpec, *, device: torch.device) -> None:
        """Nothing is loaded yet; the model comes to the device of the trained one."""
        self._folders = folders
        self._spec = spec
        self._device = device
        self._model: Any = None

    def hand_over(self, step: int) -> int | None:
        """Write the weights and load them, where that is due. Collective."""
        if self._folders.refresh(step):
            gather(lambda: self._load(self._folders.path(step)))
        return self._folders.version

    def sample(self, wanted: Sequence[Wanted], *, step: int) -> Answers | None:
        """Responses on rank 0. Collective."""
        share = range(dist.get_rank(), len(wanted), dist.get_world_size())
        return answers_of_ranks(
            lambda: {index: self._responses(wanted[index], step, index) for index in share},
            len(wanted),
        )

    def close(self) -> None:
        """Let go of the model."""
        self._model = None

    def _load(self, folder: Path) -> None:
        with needed_by("rollouts.engine: hf", extra="rollouts"):
            from transformers import AutoModelForCausalLM

        self._model = None
        try:
            model = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto")
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{folder}: not loaded by transformers: {error}") from error
        self._model = model.to(self._device).eval()

    @torch.no_grad()
    def _responses(self, wanted: Wanted, step: int, index: int) -> list[Response]:
        """The responses to one prompt."""
        spec, prompt = self._spec, wanted.prompt.tokens
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(hash((spec.seed, step, index)) % (1 << 63))
            output = self._model.generate(
                torch.tensor([prompt], device=self._device),
                attention_mask=torch.ones(1, len(prompt), device=self._device),
                do_sample=True,
                temperature=spec.temperature,
                top_p=spec.top_p,
                top_k=0,
                num_return_sequences=wanted.count,
                max_new_tokens=spec.max_response_length,
                eos_token_id=list(spec.stop_tokens) or None,
                pad_token_id=spec.stop_tokens[0] if spec.stop_tokens else 0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        tokens = output.sequences[:, len(prompt) :]
        logprobs = _logprobs(output.logits, tokens, spec.temperature).cpu().numpy()
        responses = []
        for row, values in zip(tokens.cpu().numpy().astype(np.int32), logprobs, strict=True):
            stops = np.flatnonzero(np.isin(row, spec.stop_tokens))
            end = stops[0] + 1 if len(stops) else len(row)
            responses.append(
                Response(tokens=row[:end], logprobs=values[:end], finished=len(stops) > 0)
            )
        return responses


def _logprobs(logits: tuple[Tensor, ...], tokens: Tensor, temperature: float) -> Tensor:
    """[n, l] at the temperature, over the whole vocabulary; logits are l times [n, V]."""
    columns = [
        (step.float() / temperature).log_softmax(-1).gather(1, tokens[:, i : i + 1])
        for i, step in enumerate(logits)
    ]
    return torch.cat(columns, dim=1)

"""The `hf` engine: Hugging Face transformers generates in this process.

The policy's weights are written as a Hugging Face folder, which every rank loads and samples its
share of the prompts from. Slower than a server, and needs none: for checks, and for models that a
server does not know.

Legend: n responses, l tokens of the longest, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_prefix.config import WeightsConfig
from megatron_prefix.distributed.rank_results import gather, gather_to_rank_0, rank_0_alone
from megatron_prefix.packages import needed_by
from megatron_prefix.rollouts.embedded.batch import SamplingOptions
from megatron_prefix.rollouts.hf.folders import PolicyFolders
from megatron_prefix.rollouts.prompts import Prompt, PromptSource
from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup
from megatron_prefix.rollouts.rewards import RewardFunction, close_reward, reward_batch
from megatron_prefix.rollouts.validation import validate_batch


class HuggingFaceEngine:
    """Streams prompts, generates a group of responses to each, and rewards them."""

    def __init__(
        self,
        source: PromptSource,
        reward: RewardFunction,
        folders: PolicyFolders,
        options: SamplingOptions,
        *,
        weights: WeightsConfig,
        group_size: int,
        vocab_size: int,
        max_sequence_length: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            source: of the prompts; every rank reads all of them.
            reward: of each response.
            folders: through which the weights come.
            options: of the sampling.
            weights: when they are handed over.
            group_size: responses to each prompt.
            vocab_size: token ids lie in [0, vocab_size).
            max_sequence_length: tokens of a prompt and a response at most.
            seed: of the sampling.
            device: that the model is put on, beside the trained one.
        """
        self._source = source
        self._reward = reward
        self._folders = folders
        self._options = options
        self._weights = weights
        self._group_size = group_size
        self._vocab_size = vocab_size
        self._max_sequence_length = max_sequence_length
        self._seed = seed
        self._device = device
        self._model: Any = None
        self._version: int | None = None
        self._staleness = 0

    def next_rollouts(self, num_groups: int, *, step: int) -> RolloutBatch | None:
        """The groups of the next `num_groups` prompts. Collective.

        Args:
            num_groups: how many.
            step: rollout batches trained on so far, which is the weights' version.

        Raises:
            EndOfRollouts: fewer prompts are left in the last epoch.
            ValueError: a prompt or reward that is wrong, naming the record; a model that has no
                Hugging Face form.
        """
        prompts = self._source.take(num_groups)
        if self._version is None or step - self._version >= self._weights.every:
            folder = self._folders.write(step)
            gather(lambda: self._load(folder))
            self._version = step
        self._staleness = step - self._version
        rank, size = dist.get_rank(), dist.get_world_size()
        share = range(rank, len(prompts), size)
        shares = gather_to_rank_0(
            lambda: [(index, self._group(prompts[index], step, index)) for index in share]
        )

        def rewarded() -> RolloutBatch:
            assert shares is not None
            groups = {index: group for share in shares for index, group in share}
            batch = RolloutBatch.from_groups(groups[index] for index in range(len(prompts)))
            validate_batch(
                batch, vocab_size=self._vocab_size, max_positions=self._max_sequence_length
            )
            return reward_batch(self._reward, batch)

        return rank_0_alone(rewarded)

    def metrics(self) -> dict[str, float]:
        """The version of the policy that sampled, and its age."""
        return {
            "policy_version": float(self._version or 0),
            "staleness": float(self._staleness),
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the engine stands in its prompts; the randomness depends on the step alone."""
        return self._source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: the files have changed since.
        """
        self._source.load_state_dict(state)

    def close(self) -> None:
        """Let go of the model and the files, and end the reward's processes."""
        self._model = None
        self._source.close()
        close_reward(self._reward)

    def _load(self, folder: Any) -> None:
        with needed_by("rollouts.engine: hf", extra="rollouts"):
            from transformers import AutoModelForCausalLM

        self._model = None
        try:
            model = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto")
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{folder}: not loaded by transformers: {error}") from error
        self._model = model.to(self._device).eval()

    @torch.no_grad()
    def _group(self, prompt: Prompt, step: int, index: int) -> RolloutGroup:
        """The group of one prompt; its rewards are 0."""
        options = self._options
        with torch.random.fork_rng(devices=self._devices()):
            torch.manual_seed(hash((self._seed, step, index)) % (1 << 63))
            output = self._model.generate(
                torch.tensor([prompt.tokens], device=self._device),
                attention_mask=torch.ones(1, len(prompt.tokens), device=self._device),
                do_sample=True,
                temperature=options.temperature,
                top_p=options.top_p,
                top_k=0,
                num_return_sequences=self._group_size,
                max_new_tokens=options.max_response_length,
                eos_token_id=list(options.stop_tokens) or None,
                pad_token_id=options.stop_tokens[0] if options.stop_tokens else 0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        tokens = output.sequences[:, len(prompt.tokens) :]
        logprobs = _logprobs(output.logits, tokens, options.temperature).cpu().numpy()
        rows = tokens.cpu().numpy().astype(np.int32)
        lengths = [_length(row, options.stop_tokens) for row in rows]
        responses = tuple(row[:n] for row, n in zip(rows, lengths, strict=True))
        return RolloutGroup(
            prompt=prompt.tokens,
            responses=responses,
            rewards=(0.0,) * len(responses),
            old_logprobs=tuple(row[:n] for row, n in zip(logprobs, lengths, strict=True)),
            finished=tuple(bool(response[-1] in options.stop_tokens) for response in responses),
            answer=prompt.answer,
            record=prompt.record,
            policy_version=self._version,
            source=prompt.source,
        )

    def _devices(self) -> list[torch.device]:
        return [self._device] if self._device.type == "cuda" else []


def _logprobs(logits: tuple[Tensor, ...], tokens: Tensor, temperature: float) -> Tensor:
    """[n, l] at the temperature, over the whole vocabulary; logits are l times [n, V]."""
    columns = [
        (step.float() / temperature).log_softmax(-1).gather(1, tokens[:, i : i + 1])
        for i, step in enumerate(logits)
    ]
    return torch.cat(columns, dim=1)


def _length(tokens: NDArray[np.int32], stop_tokens: tuple[int, ...]) -> int:
    """Tokens up to the first stop token, it included."""
    stops = np.flatnonzero(np.isin(tokens, stop_tokens))
    return int(stops[0]) + 1 if len(stops) else len(tokens)

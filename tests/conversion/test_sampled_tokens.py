"""The embedded engine draws from a converted model what transformers draws from its source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_prefix.config import ParallelConfig
from megatron_prefix.conversion import hf_to_megatron
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.rollouts.embedded.sampler import EmbeddedSampler
from megatron_prefix.rollouts.prompts import Prompt
from megatron_prefix.rollouts.sampling.sampler import Response, SamplingSpec, Wanted
from tests.conversion.loading import load_converted
from tests.conversion.models import CASES, GPT_OSS, QWEN3_5, QWEN3_NEXT, write_model
from tests.megatron.models import HAS_GATED_DELTA_NET, HAS_WINDOWS

PROMPTS = [[5, 9, 60, 3, 3, 17], [1], [42, 0]]
MISTRAL = "mistral, window"
LENGTH = 8


def _sampled(megatron: Path) -> list[list[Response]]:
    spec = SamplingSpec(group_size=2, max_response_length=LENGTH, temperature=0.0)
    wanted = [
        Wanted(prompt=Prompt(tokens=tuple(tokens), answer=None, source=f"prompt {i}"), count=2)
        for i, tokens in enumerate(PROMPTS)
    ]
    with runtime(ParallelConfig(), device="cpu", seed=9, timeout_minutes=1):
        _, chunks, _ = load_converted(megatron, ParallelConfig())
        found = EmbeddedSampler(chunks, spec, device=torch.device("cpu")).sample(wanted, step=0)
    assert found is not None
    return found.responses


@pytest.mark.parametrize(
    "case", [QWEN3_NEXT, QWEN3_5] * HAS_GATED_DELTA_NET + [GPT_OSS, MISTRAL] * HAS_WINDOWS
)
def test_states_windows_and_sinks_give_transformers_greedy_tokens(
    tmp_path: Path, case: str
) -> None:
    from transformers import AutoModelForCausalLM

    family, options = CASES[case]
    folder = write_model(tmp_path / "hf", family, **options)
    hf_to_megatron(folder, tmp_path / "megatron")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt, group in zip(PROMPTS, _sampled(tmp_path / "megatron"), strict=True):
        with torch.no_grad():
            # Its own cache runs along.
            tokens = model.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=LENGTH, eos_token_id=-1
            )
            logprobs = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = tokens[0, len(prompt) :]
        assert len(expected) == LENGTH
        chosen = logprobs.gather(1, expected[:, None])[:, 0]
        for response in group:
            assert response.tokens.tolist() == expected.tolist()
            # Both compute in float32, logits of some units.
            found = torch.from_numpy(response.logprobs).float()
            torch.testing.assert_close(found, chosen, rtol=1e-4, atol=1e-4)

"""`verify_equivalence.py --device cuda`: the candidate on a GPU, the reference on the CPU.

What these tests do not cover: layouts of several ranks, which need a GPU each.
"""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_prefix.config import ParallelConfig
from tests.megatron.models import HAS_GATED_DELTA_NET, HAS_PREDICTIONS, HAS_WINDOWS, HYBRID
from tests.tools.proofs import ALWAYS, small_model, tool

__all__ = ["tool"]

# Prompts of more than one chunk of a recurrent layer and of several tiles of a kernel.
SHAPES: list[dict[str, Any]] = [
    {"prefix": 300, "responses": [40, 1, 130, 65]},
    {"system": 70, "prefix": 20, "responses": [33, 12]},
    {"system": 70, "prefix": 9, "responses": [90, 3]},
]
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 48}
LATENT = {
    "add_qkv_bias": False,
    "num_query_groups": 8,
    "multi_latent_attention": True,
    "kv_lora_rank": 32,
    "qk_head_dim": 24,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 16,
}
MODELS: dict[str, tuple[bool, dict[str, Any]]] = {
    "dense": (True, {}),
    "latent attention": (True, LATENT),
    "windows and sinks": (
        HAS_WINDOWS,
        {"window_size": [63, 0], "window_attn_skip_freq": 2, "softmax_type": "learnable"},
    ),
    "gated delta nets": (
        HAS_GATED_DELTA_NET,
        {**HYBRID, "linear_key_head_dim": 32, "linear_value_head_dim": 32},
    ),
    "multi-token prediction": (HAS_PREDICTIONS, {"mtp_num_layers": 1}),
    # In bfloat16 a score that rounds otherwise may choose another expert.
    "experts": (True, EXPERTS),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("dtype", "kernel"), [("bfloat16", None), ("float32", "reference")])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_on_a_gpu(tool: ModuleType, name: str, dtype: str, kernel: str | None) -> None:
    in_this_release, transformer = MODELS[name]
    if not in_this_release or (name == "experts" and dtype == "bfloat16"):
        pytest.skip("not in this release, or no comparison")
    model = small_model(tool, **{"hidden_size": 64, **transformer})
    report = tool.verify(
        model=dataclasses.replace(model, max_sequence_length=512),
        shapes=SHAPES,
        parallel=ParallelConfig(),
        dtype=dtype,
        device="cuda",
        kernel=kernel,
        recompute="full",
        optimizer_steps=3,
        packing={**ALWAYS, "sharing": "everything"},
    )
    assert report["ok"], report


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tp", "2", "--dtype", "bfloat16"], r"--device cuda: 2 processes need a GPU each"),
        ([], r"dtype: float64 runs on device: cpu only"),
        (["--kernel", "torch_cpus"], r"kernel: there is none named torch_cpus"),
    ],
)
def test_what_a_gpu_is_not_there_for_is_refused_before_a_process_starts(
    tool: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["verify_equivalence.py", "--device", "cuda", *options])
    assert tool.main() == 2
    assert message in capsys.readouterr().err

"""Our params remain what Megatron's own `PackedSeqParams.__post_init__` takes and leaves alone.

Releases from 0.17 on derive fields there, for layers other than attention, and others decide by
them how a batch was padded. Ours are one packed sequence; the fields stay unset.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prefix.attention.kernels import select_kernel
from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layout import pack
from megatron_prefix.rollouts.embedded.kv_cache import KeyValueCache, prompt_row
from tests.megatron.models import random_groups

OURS = {
    "qkv_format",
    "cu_seqlens_q",
    "cu_seqlens_kv",
    "max_seqlen_q",
    "max_seqlen_kv",
}
"""Megatron's fields that we set; every other one, of any release, is None."""


LAYOUT = pack(random_groups(np.random.default_rng(1), [(7, [5, 3]), (2, [4])]))
CPU = torch.device("cpu")
SETUP = AttentionSetup(
    device=CPU, kernel=select_kernel(None, device=CPU, dtype=torch.float32, head_dim=16)
)


def params_of_a_row(needed: np.ndarray | None = None) -> PrefixPackedSeqParams:
    return PrefixPackedSeqParams.from_layout(LAYOUT, SETUP, needed=needed)


def trimmed() -> PrefixPackedSeqParams:
    params = params_of_a_row(needed=np.array([LAYOUT.num_tokens - 1]))
    assert params.last_layer is not None
    return params.last_layer


def decoding() -> PrefixPackedSeqParams:
    cache = KeyValueCache(prompt_row([[1, 2], [3]]), SETUP, num_responses=2, slots=3)
    return cache.decode_params(torch.arange(3), slot=0, max_seqlen=9)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"bf16": True}, "bfloat16"),
        ({"fp16": True}, "float16"),
        ({"params_dtype": torch.float64}, "float64"),
        ({}, "float32"),
    ],
)
def test_the_kernel_is_chosen_for_the_dtype_and_the_head_size_of_the_model(
    options: dict[str, Any], dtype: str
) -> None:
    config = TransformerConfig(
        num_layers=1, hidden_size=96, num_attention_heads=4, kv_channels=24, **options
    )
    assert AttentionSetup.of(config, CPU).kernel.name == "torch_cpu"
    with pytest.raises(ValueError, match=f"device cpu, torch.{dtype}, head_dim 24"):
        AttentionSetup.of(config, CPU, kernel="torch_cuda")


MAKERS = [params_of_a_row, trimmed, decoding]


@pytest.mark.parametrize("make", MAKERS)
def test_what_megatron_has_fields_for_and_we_have_not_set_is_none(make) -> None:
    params = make()
    for field in dataclasses.fields(PackedSeqParams):
        value = getattr(params, field.name)
        assert (value is not None) == (field.name in OURS), field.name


@pytest.mark.parametrize("make", MAKERS)
def test_megatrons_post_init_changes_nothing(make) -> None:
    params = make()
    before = dict(vars(params))
    # A copy is initialised again, as when a last layer is trimmed.
    copied = vars(dataclasses.replace(params))
    if hasattr(PackedSeqParams, "__post_init__"):
        PackedSeqParams.__post_init__(params)
    assert vars(params).keys() == before.keys() == copied.keys()
    for name, value in before.items():
        assert vars(params)[name] is value and copied[name] is value, name


def test_one_packed_sequence_of_the_rows_that_attend() -> None:
    num_tokens = LAYOUT.num_tokens
    params = params_of_a_row(needed=np.array([num_tokens - 1]))
    assert params.qkv_format == params.last_layer.qkv_format == "thd"
    assert params.cu_seqlens_q.tolist() == params.cu_seqlens_kv.tolist() == [0, num_tokens]
    assert params.last_layer.cu_seqlens_q.tolist() == [0, len(params.last_layer.query_rows)]
    assert params.last_layer.cu_seqlens_kv.tolist() == [0, num_tokens]

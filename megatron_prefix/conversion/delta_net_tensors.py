"""Tensors of models with gated delta nets (Qwen3-Next, Qwen3.5), there and back.

Megatron's layer has one matrix for all that it reads from a token, in six parts, each of all heads:

    queries | keys | values | gate (z) | beta | alpha

Qwen3-Next has two, whose rows are grouped by key head; Qwen3.5 has four, each of all heads. The
layers with softmax attention have a gate too, which Hugging Face keeps with each head's queries and
Megatron with those of a key/value head.

Norms are zero-centred on both sides, but for that behind the delta rule: Hugging Face's weight is 1
larger there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_prefix.conversion.architecture import Architecture, LinearAttention

IN_PROJ = "self_attention.in_proj.weight"
CONVOLUTION = "self_attention.conv1d.weight"
OUT_NORM = "self_attention.out_norm.weight"
GATED_QKV = "self_attention.linear_qkv.weight"

_LAYER = "model.layers.{layer_number}."
_OF_ALL = {
    "self_attention.in_proj.layer_norm_weight": [f"{_LAYER}input_layernorm.weight"],
    CONVOLUTION: [f"{_LAYER}linear_attn.conv1d.weight"],
    "self_attention.A_log": [f"{_LAYER}linear_attn.A_log"],
    "self_attention.dt_bias": [f"{_LAYER}linear_attn.dt_bias"],
    OUT_NORM: [f"{_LAYER}linear_attn.norm.weight"],
    "self_attention.out_proj.weight": [f"{_LAYER}linear_attn.out_proj.weight"],
}
_INPUTS = {
    "qwen3_next": ("in_proj_qkvz", "in_proj_ba"),
    "qwen3_5_text": ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    "qwen3_5_moe_text": ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
}


def names(family: str) -> dict[str, list[str]]:
    """Hugging Face's names of each parameter of a gated delta net; none for other families."""
    if family not in _INPUTS:
        return {}
    inputs = [f"{_LAYER}linear_attn.{name}.weight" for name in _INPUTS[family]]
    return {**_OF_ALL, IN_PROJ: inputs}


def input_parts(linear: LinearAttention) -> tuple[tuple[str, int], ...]:
    """Megatron's names of the parts of what is read from a token, and rows of each."""
    return (
        *convolution_parts(linear),
        ("z", linear.values),
        ("beta", linear.value_heads),
        ("alpha", linear.value_heads),
    )


def convolution_parts(linear: LinearAttention) -> tuple[tuple[str, int], ...]:
    """Of these the ones that the convolution reads."""
    return (("query", linear.keys), ("key", linear.keys), ("value", linear.values))


def parameters(
    a: Architecture,
) -> list[tuple[str, list[tuple[int, ...]], tuple[tuple[str, int], ...]]]:
    """Names of a layer's parameters, shapes of what they are made of, and parts stored."""
    linear = a.linear
    assert linear is not None
    h, channels = a.hidden_size, 2 * linear.keys + linear.values
    return [
        ("self_attention.in_proj.layer_norm_weight", [(h,)], ()),
        (IN_PROJ, [(rows, h) for rows in input_rows(a)], input_parts(linear)),
        (CONVOLUTION, [(channels, 1, linear.convolution_width)], convolution_parts(linear)),
        ("self_attention.A_log", [(linear.value_heads,)], ()),
        ("self_attention.dt_bias", [(linear.value_heads,)], ()),
        (OUT_NORM, [(linear.value_channels,)], ()),
        ("self_attention.out_proj.weight", [(h, linear.values)], ()),
    ]


def input_rows(a: Architecture) -> list[int]:
    """Rows of each of Hugging Face's matrices of what is read from a token."""
    linear = a.linear
    assert linear is not None
    if a.family == "qwen3_next":
        return [2 * (linear.keys + linear.values), 2 * linear.value_heads]
    return [2 * linear.keys + linear.values, linear.values, *([linear.value_heads] * 2)]


def to_megatron(a: Architecture, name: str, tensors: Sequence[Tensor]) -> Tensor | None:
    """A parameter made of `tensors`; None: one that these models have like others."""
    linear = a.linear
    assert linear is not None
    if name.endswith(IN_PROJ):
        if a.family != "qwen3_next":
            return torch.cat(list(tensors))
        of_keys = [x.unflatten(0, (linear.key_heads, -1)) for x in tensors]
        sizes = _rows_of_key_head(linear)
        parts = [p for x, rows in zip(of_keys, sizes, strict=True) for p in x.split(rows, dim=1)]
        return torch.cat([part.flatten(0, 1) for part in parts])
    if name.endswith(GATED_QKV):
        queries, *others = tensors
        # Queries and gates of each head, then of each key/value head.
        both = queries.unflatten(0, (a.num_query_groups, -1, 2, a.head_dim)).transpose(1, 2)
        groups = [both.flatten(1, 3), *(x.unflatten(0, (a.num_query_groups, -1)) for x in others)]
        return torch.cat(groups, dim=1).flatten(0, 1)
    if name.endswith(OUT_NORM):
        return tensors[0] - 1
    return tensors[0] if _is_as_it_is(name) else None


def to_hf(a: Architecture, name: str, tensor: Tensor) -> list[Tensor] | None:
    """The way back; see `to_megatron`."""
    linear = a.linear
    assert linear is not None
    if name.endswith(IN_PROJ):
        if a.family != "qwen3_next":
            return list(tensor.split(input_rows(a)))
        parts = tensor.split([rows for _, rows in input_parts(linear)])
        of_keys = [x.unflatten(0, (linear.key_heads, -1)) for x in parts]
        return [
            torch.cat(of_keys[:4], dim=1).flatten(0, 1),
            torch.cat(of_keys[4:], dim=1).flatten(0, 1),
        ]
    if name.endswith(GATED_QKV):
        queries = a.num_attention_heads * a.head_dim // a.num_query_groups
        groups = tensor.unflatten(0, (a.num_query_groups, -1))
        both, key, value = groups.split([2 * queries, a.head_dim, a.head_dim], dim=1)
        both = both.unflatten(1, (2, -1, a.head_dim)).transpose(1, 2)
        return [both.flatten(0, 3), key.flatten(0, 1), value.flatten(0, 1)]
    if name.endswith(OUT_NORM):
        return [tensor + 1]
    return [tensor] if _is_as_it_is(name) else None


def _is_as_it_is(name: str) -> bool:
    return any(name.endswith(known) for known in _OF_ALL)


def _rows_of_key_head(linear: LinearAttention) -> tuple[list[int], list[int]]:
    """Rows of the parts of both of Qwen3-Next's matrices, of one key head."""
    values, heads = linear.values // linear.key_heads, linear.value_heads // linear.key_heads
    return [linear.key_channels] * 2 + [values] * 2, [heads] * 2

"""What the installed release of Megatron-Core has, asked in one place."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any

import megatron.core
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig


def release() -> str:
    """The installed version of megatron-core."""
    return megatron.core.__version__


def counts_tokens_of_all_ranks() -> bool:
    """Whether `calculate_per_token_loss` multiplies losses of routers by the tokens of all tensor-
    and context-parallel ranks (0.19 and newer), rather than by a rank's own."""
    major, minor = release().split(".")[:2]
    return (int(major), int(minor)) >= (0, 19)


def has_global_auxiliary_loss() -> bool:
    """Whether routers compute `global_aux_loss` (0.15 and newer)."""
    return hasattr(TopKRouter, "_apply_global_aux_loss")


def replays_routes() -> bool:
    """Whether routers can be given the experts of each token (0.16 and newer)."""
    return "moe_enable_routing_replay" in {f.name for f in dataclasses.fields(TransformerConfig)}


def position_embedding_types() -> tuple[str, ...]:
    """The kinds of position embedding that GPTModel declares."""
    parameter = inspect.signature(GPTModel.__init__).parameters["position_embedding_type"]
    return typing.get_args(parameter.annotation)


def have_transformer_engine() -> bool:
    """Whether Megatron-Core found Transformer Engine."""
    return bool(gpt_layer_specs.HAVE_TE)


def option(config: TransformerConfig, name: str) -> Any:
    """The value of a config's option; None where the release does not have it."""
    return getattr(config, name, None)


def gate_has_offset() -> bool:
    """Whether a gated MLP adds `glu_linear_offset` to a half, which keeps one more tensor."""
    return "glu_linear_offset" in {field.name for field in dataclasses.fields(TransformerConfig)}

"""Adapter for any framework: a GPTModel that runs a packed row without its repeated prefixes.

The framework gives the model a packed row and gets logits, or the loss of each label, for every row
in its own order, as it would from Megatron's own class. What lies between is ours: the row is
planned from its tokens, run as a `PackedLayout`, and its output given to every row that shares it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_prefix.integrations.counting import TokenCounter
from megatron_prefix.integrations.sharing_model import SharesPrefixes, Sharing
from megatron_prefix.layers.attention import RopeTable
from megatron_prefix.layers.built_model import share_in_layers
from megatron_prefix.layers.subclass import prefix_subclass
from megatron_prefix.model.build import model_shape

AnyModel = TypeVar("AnyModel", bound=nn.Module)


def share_prefixes(
    model: AnyModel,
    *,
    kernel: str | None = None,
    pad_to_multiple: int = 1,
    rope_table: RopeTable | None = None,
) -> AnyModel:
    """Let a model that a framework has built share prefixes; everything else stays as it is.

    The model, its layers and their attention get subclasses of their own classes. Weights, names,
    checkpoints, hooks and wrappers are untouched, and so is what the model computes for a batch
    without packed sequences. To be called on every chunk of every pipeline stage, before or after
    Megatron's wrappers and optimizer are made.

    Args:
        model: a GPTModel, or a module around one.
        kernel: attention kernel by name; None takes the best for the device.
        pad_to_multiple: the row that runs is padded to a multiple of this, and of the
            tensor-parallel size under sequence parallelism.
        rope_table: what the rows of the RoPE table are that the model gives to its layers: "by
            token" where it takes them by `position_ids` itself, "by position" where the table is
            longer than the longest sequence. None is for Megatron's own models.

    Returns:
        The same model.

    Raises:
        ValueError: no GPTModel, or an option or layer that cannot share prefixes, by name.
    """
    chunks = [module for module in model.modules() if isinstance(module, GPTModel)]
    if not chunks:
        raise ValueError(
            f"share_prefixes: no GPTModel in {type(model).__name__}. Pass Megatron-Core's "
            "GPTModel, or a module around one; a HybridModel shares prefixes where it is built by "
            "prefix_hybrid_model"
        )
    for chunk in chunks:
        if isinstance(chunk, SharesPrefixes):
            continue
        config = chunk.config
        _refuse_parallelism(config)
        share_in_layers(chunk, config, rope_table=rope_table)
        chunk.__class__ = prefix_subclass(SharesPrefixes, type(chunk))
        chunk.prefix_sharing = Sharing(
            config=config,
            shape=model_shape(chunk, config),
            kernel=kernel,
            pad_to_multiple=math.lcm(
                pad_to_multiple,
                config.tensor_model_parallel_size if config.sequence_parallel else 1,
            ),
        )
    return model


def prefix_model_provider(
    provider: Callable[..., AnyModel], **options: Any
) -> Callable[..., AnyModel]:
    """A framework's model provider whose models share prefixes.

    Args:
        provider: builds the model, or a chunk of it. The result takes the same arguments.
        options: of `share_prefixes`.
    """

    @functools.wraps(provider)
    def provide(*args: Any, **kwargs: Any) -> AnyModel:
        return share_prefixes(provider(*args, **kwargs), **options)

    return provide


def token_counter(model: nn.Module | Sequence[nn.Module]) -> TokenCounter:
    """What sharing has saved on this process.

    Args:
        model: that `share_prefixes` was called on, or a list of chunks (all see the same rows).
    """
    first = model[0] if isinstance(model, Sequence) else model
    for module in first.modules():
        if isinstance(module, SharesPrefixes):
            return module.prefix_sharing.counter
    raise ValueError(f"token_counter: share_prefixes was not called on this {type(first).__name__}")


def _refuse_parallelism(config: TransformerConfig) -> None:
    if config.context_parallel_size > 1:
        raise ValueError(
            f"context_parallel_size={config.context_parallel_size}: the framework cuts the row "
            "before the model sees it, and prefixes are found in whole rows only. Set "
            "context_parallel_size to 1 (megatron_prefix's own trainer shares prefixes under "
            "context parallelism)"
        )
    if config.pipeline_model_parallel_size > 1 and not config.variable_seq_lengths:
        raise ValueError(
            f"variable_seq_lengths=False with pipeline_model_parallel_size="
            f"{config.pipeline_model_parallel_size}: rows without their repetitions have many "
            "lengths, and stages would wait for others. Set variable_seq_lengths to True"
        )

"""Megatron's config of a model with gated delta nets under context parallelism.

Until 0.17 Megatron refuses context parallelism with such a model, and from 0.18 on heads that do
not divide by tensor- x context-parallel ranks. Both are about its own layer's forward, which
batches with `PrefixPackedSeqParams` never run.
"""

from __future__ import annotations

from typing import Any, TypeVar

Config = TypeVar("Config")


def config_with_context_parallelism(config_class: type[Config], **options: Any) -> Config:
    """`config_class(**options)`, of gated delta nets on context-parallel ranks as well.

    Args:
        config_class: Megatron's `TransformerConfig`, or a subclass.
        options: of it.
    """
    size = options.get("context_parallel_size", 1)
    if options.get("experimental_attention_variant") != "gated_delta_net" or size == 1:
        return config_class(**options)
    # Whatever else Megatron has to say about context parallelism, it says here.
    config_class(**{**options, "experimental_attention_variant": None})
    config = config_class(**{**options, "context_parallel_size": 1})
    config.context_parallel_size = size
    return config

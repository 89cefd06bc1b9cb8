"""A model of Megatron-Bridge that shares prefixes: its provider, with a hook of ours."""

from __future__ import annotations

from typing import Any

from megatron_prefix.integrations import share_prefixes


def with_shared_prefixes(provider: Any) -> Any:
    """The provider, whose models share prefixes before they are wrapped.

    Args:
        provider: what `AutoBridge.from_hf_pretrained(...).to_megatron_provider()` returns.
    """
    provider.variable_seq_lengths = True
    # Which Megatron's default dispatcher refuses, in models without experts too.
    if provider.moe_token_dispatcher_type == "allgather":
        provider.moe_token_dispatcher_type = "alltoall"
    provider.register_pre_wrap_hook(lambda chunks: [share_prefixes(chunk) for chunk in chunks])
    return provider

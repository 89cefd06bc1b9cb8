"""Which kind of context-parallel communication a layer uses: Megatron's option `cp_comm_type`.

all_gather      every rank gathers all shards' keys and values, while its own segments attend to
                themselves; gathered again in backward. The default.
p2p             shards go round a ring, one at a time: memory for two of them, more and smaller
                attention calls.
a2a             heads are exchanged: every rank computes its share of the heads over the whole row.
latent_gather   as all_gather, but what travels are the latents of multi-latent attention, which
                are expanded where they arrive. The default there; no kind of Megatron's.

Recurrent layers have two ways: a2a exchanges heads as above, every other kind gathers states.
"""

from __future__ import annotations

from typing import Any

from megatron_prefix.layout import COMM_TYPES, CommType

__all__ = ["COMM_TYPES", "RUN_AS", "CommType", "layer_comm_type", "model_comm_types"]

RUN_AS: dict[str, CommType] = {"a2a+p2p": "p2p"}
"""Kinds of Megatron's that we have no form of our own of, and what runs in their place.

Its a2a+p2p exchanges heads within a node, for the sake of whole sequences that go round the ring
between nodes. Only shared shards go round ours.
"""


def layer_comm_type(config: Any, layer_number: int) -> CommType:
    """The kind of one layer.

    Args:
        config: Megatron's `TransformerConfig`; its `cp_comm_type` is None, one kind, or a list of
            one for each layer.
        layer_number: of the layer in the whole model, from 1.
    """
    kinds = config.cp_comm_type
    if kinds is None:
        return _default(config)
    kind = (
        kinds
        if isinstance(kinds, str)
        else kinds[layer_number - 1 + len(kinds) - config.num_layers]
    )
    return RUN_AS.get(kind, kind)


def exchanges_heads(config: Any, layer_number: int) -> bool:
    """Whether a recurrent layer exchanges heads; otherwise it gathers states.

    Args:
        config, layer_number: as for `layer_comm_type`.
    """
    return layer_comm_type(config, layer_number) == "a2a"


def model_comm_types(config: Any) -> tuple[CommType, ...]:
    """The kinds of all layers of a model, each once.

    Args:
        config: as for `layer_comm_type`.
    """
    kinds = config.cp_comm_type
    if kinds is None:
        return (_default(config),)
    if isinstance(kinds, str):
        kinds = [kinds]
    return tuple(dict.fromkeys(RUN_AS.get(kind, kind) for kind in kinds))


def _default(config: Any) -> CommType:
    return "latent_gather" if config.multi_latent_attention else "all_gather"

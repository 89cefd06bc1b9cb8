"""A list of `cp_comm_type` for the layers, which Megatron reads one place too far."""

from __future__ import annotations

from typing import Any


def repair_comm_type_list(config: Any) -> None:
    """Let Megatron build its layers from a list of kinds, which its releases index from 1.

    `TransformerLayer` reads `cp_comm_type[layer_number]`, beyond the end for the last layer. A copy
    of the first entry is put in front; `layer_comm_type` reads both forms.
    """
    kinds = config.cp_comm_type
    if isinstance(kinds, list) and len(kinds) == config.num_layers:
        config.cp_comm_type = [kinds[0], *kinds]

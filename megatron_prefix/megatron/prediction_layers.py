"""Which of a model's layers Megatron takes those of multi-token prediction for."""

from __future__ import annotations

from typing import Any


def prediction_layer_numbers(config: Any) -> tuple[int, ...]:
    """The numbers by which MTP layers read options that say something of each layer.

    Since 0.17 they count from 1 again; 0.16 goes on counting behind the other layers. A layer that
    runs for every depth is there once.

    Args:
        config: Megatron's `TransformerConfig`.
    """
    counts_anew = hasattr(config, "mtp_use_repeated_layer")
    depths = config.mtp_num_layers or 0
    if depths and counts_anew and config.mtp_use_repeated_layer:
        depths = 1
    first = 1 if counts_anew else config.num_layers + 1
    return tuple(range(first, first + depths))

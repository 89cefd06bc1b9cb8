"""A plugin for ms-swift's Megatron trainers: `--external_plugins ms_swift.py`.

It lets every text model that mcore_bridge builds share prefixes.
"""

from __future__ import annotations

from typing import Any

from mcore_bridge.model.register import ModelLoader

from megatron_prefix.integrations import share_prefixes

_build_model = ModelLoader.build_model


def _build_model_that_shares_prefixes(loader: ModelLoader, *args: Any, **kwargs: Any) -> Any:
    model = _build_model(loader, *args, **kwargs)
    # Without the fused kernel mcore_bridge takes the rows of the rotary table by `position_ids`.
    by_token = not loader.config.apply_rope_fusion
    return share_prefixes(model, rope_table="by token" if by_token else None)


ModelLoader.build_model = _build_model_that_shares_prefixes

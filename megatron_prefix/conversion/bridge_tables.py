"""mbridge's tables of names, and what they lack, as one object for a family.

Names and the layout of fused tensors are mbridge's. Added are biases of all linear layers, the
local spec's names of norms, and families that mbridge does not have.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

from megatron_prefix.conversion import delta_net_tensors, mtp_tensors
from megatron_prefix.conversion.architecture import Architecture
from megatron_prefix.conversion.hf_qwen3_next import WITH_DELTA_NETS
from megatron_prefix.packages import needed_by

_LAYER = "model.layers.{layer_number}."
_REGISTERED_AS = {
    "mistral": "llama",
    "gpt_oss": "mixtral",
    "minimax_m2": "mixtral",
    **dict.fromkeys(WITH_DELTA_NETS, "qwen3_moe"),
}
"""Families that mbridge has no name for, and one whose tensors of attention are the same."""
_MLP_OF = {
    "gpt_oss": {
        "pre_mlp_layernorm": [f"{_LAYER}post_attention_layernorm.weight"],
        "mlp.router.weight": [f"{_LAYER}mlp.router.weight"],
        "mlp.router.bias": [f"{_LAYER}mlp.router.bias"],
        "mlp.experts.linear_fc1.weight": [f"{_LAYER}mlp.experts.gate_up_proj"],
        "mlp.experts.linear_fc1.bias": [f"{_LAYER}mlp.experts.gate_up_proj_bias"],
        "mlp.experts.linear_fc2.weight": [f"{_LAYER}mlp.experts.down_proj"],
        "mlp.experts.linear_fc2.bias": [f"{_LAYER}mlp.experts.down_proj_bias"],
    },
}
"""Names of the tensors of MLPs, where mbridge does not have them."""
_ALSO_OF = {
    "minimax_m2": {
        "mlp.router.expert_bias": [f"{_LAYER}block_sparse_moe.e_score_correction_bias"],
    },
}
"""Further ones."""
# mbridge knows these norms by Transformer Engine's names alone.
_LATENT_NORMS = {
    "self_attention.q_layernorm.weight": [f"{_LAYER}self_attn.q_a_layernorm.weight"],
    "self_attention.kv_layernorm.weight": [f"{_LAYER}self_attn.kv_a_layernorm.weight"],
}


def bridge_of(a: Architecture) -> Any:
    """mbridge's bridge of the family, as far as names and single tensors go."""
    with needed_by("converting", extra="hf"):
        import mbridge  # noqa: F401  (registers the families)
        from mbridge.core import LLMBridge
        from mbridge.core.bridge import _MODEL_REGISTRY
        from mbridge.core.parallel_states import ParallelStates
    registered = _MODEL_REGISTRY[_REGISTERED_AS.get(a.family, a.family)]

    class Bridge(registered):  # type: ignore[misc, valid-type]
        # Copies: mbridge changes the tables of its classes for tied embeddings.
        _DIRECT_MAPPING: ClassVar[Any] = dict(registered._DIRECT_MAPPING)
        _ATTENTION_MAPPING: ClassVar[Any] = {
            **registered._ATTENTION_MAPPING,
            "self_attention.linear_proj.bias": [f"{_LAYER}self_attn.o_proj.bias"],
            "self_attention.core_attention.softmax_offset": [f"{_LAYER}self_attn.sinks"],
            **(_LATENT_NORMS if a.latent is not None else {}),
            **delta_net_tensors.names(a.family),
        }
        _MLP_MAPPING: ClassVar[Any] = {
            **_MLP_OF.get(a.family, registered._MLP_MAPPING),
            **LLMBridge._MLP_MAPPING,
            **_ALSO_OF.get(a.family, {}),
            "mlp.linear_fc1.bias": [
                f"{_LAYER}mlp.gate_proj.bias",
                f"{_LAYER}mlp.up_proj.bias",
            ],
            "mlp.linear_fc2.bias": [f"{_LAYER}mlp.down_proj.bias"],
        }

        def _weight_name_mapping_mcore_to_hf(self, mcore_weights_name: str) -> list[str]:
            names_of = super()._weight_name_mapping_mcore_to_hf
            return mtp_tensors.hf_names(a, mcore_weights_name, names_of)

        def _build_config(self) -> Any:
            """No Megatron config, since no model is built; what the tables ask of it."""
            return SimpleNamespace(num_layers=a.num_layers, mtp_num_layers=None)

    sizes = SimpleNamespace(
        hidden_size=a.hidden_size,
        num_attention_heads=a.num_attention_heads,
        num_key_value_heads=a.num_query_groups,
        head_dim=a.head_dim,
        tie_word_embeddings=False,
    )
    return Bridge(sizes, dtype=None, parallel_states=ParallelStates())

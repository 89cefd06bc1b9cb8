"""Keys of a distributed checkpoint that hold nothing, and that a layer may look for."""

from __future__ import annotations

from megatron_prefix.conversion.architecture import Architecture

# What Transformer Engine's layers keep beside their weights. The local spec stores the first four
# as well, so that a checkpoint has the same keys either way; here as there they hold nothing.
_EXTRA_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "self_attention.core_attention",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "pre_mlp_layernorm",
    "mlp.experts.experts.linear_fc1",
    "mlp.experts.experts.linear_fc2",
)
_EXTRA_STATES_OF_LATENTS = (
    "input_layernorm",
    "self_attention.linear_q_proj",
    "self_attention.linear_q_down_proj",
    "self_attention.linear_q_up_proj",
    "self_attention.linear_kv_down_proj",
    "self_attention.linear_kv_up_proj",
    "self_attention.kv_layernorm",
)
_EXTRA_STATES_OF_DELTA_NETS = (
    "self_attention.in_proj",
    "self_attention.out_norm",
    "self_attention.out_proj",
)
_EXTRA_STATES_OF_MTP = ("enorm", "hnorm", "eh_proj", "final_layernorm")
_EXTRA_STATES_OF_SHARED_EXPERTS = (
    "mlp.shared_experts.linear_fc1",
    "mlp.shared_experts.linear_fc2",
)


def extra_state_keys(architecture: Architecture) -> list[str]:
    """Keys of the extra states that layers of any spec may look for in a checkpoint."""
    a = architecture
    modules = _EXTRA_STATES
    if a.latent is not None:
        modules += _EXTRA_STATES_OF_LATENTS
    if a.linear is not None:
        modules += _EXTRA_STATES_OF_DELTA_NETS
    if a.shared_expert_ffn_hidden_size is not None:
        modules += _EXTRA_STATES_OF_SHARED_EXPERTS
    keys = ["decoder.final_layernorm._extra_state/shard_0_1"]
    for layer in range(a.num_layers + a.computed_mtp_layers):
        mtp = layer - a.num_layers
        if mtp >= 0:
            of_mtp = f"mtp.layers.{mtp}."
            keys += [f"{of_mtp}{module}._extra_state/shard_0_1" for module in _EXTRA_STATES_OF_MTP]
            prefix = f"{of_mtp}transformer_layer."
        else:
            prefix = f"decoder.layers.{layer}." if a.mixed_layers else "decoder.layers."
        single = a.mixed_layers or mtp >= 0
        for module in modules:
            of_experts = ".experts." in module
            if of_experts and not a.has_experts(layer):
                continue
            offsets, shape = ([0], [1]) if single else ([layer], [a.num_layers])
            for expert in range(a.num_experts or 0) if of_experts else [None]:
                at, of = offsets, shape
                if expert is not None:
                    assert a.num_experts is not None
                    own = [] if single else offsets
                    at = [*own, expert]
                    of = [*([] if single else shape), a.num_experts]
                place = f"{'.'.join(map(str, at))}_{'.'.join(map(str, of))}"
                keys.append(f"{prefix}{module}._extra_state/shard_{place}")
    return keys

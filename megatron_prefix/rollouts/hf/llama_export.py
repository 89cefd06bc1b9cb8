"""The trained weights as a Hugging Face model of the Llama, Qwen2 or Qwen3 family (dense).

Gathers the whole model on rank 0, so it has to fit into one process's memory.

Legend: g key/value heads, r queries of each, d channels of a head, h hidden size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prefix.sharing import gather
from megatron_prefix.training.config import RunConfig
from megatron_prefix.training.full_tensors import FullTensors, full_parameters
from megatron_prefix.training.model import ModelChunks


def export_llama(chunks: ModelChunks, config: RunConfig, directory: Path) -> None:
    """Write config.json and model.safetensors into a folder that is there. Collective.

    Raises:
        ValueError: the model is of none of these families, naming the option.
    """
    settings = _settings(chunks, config)
    full = full_parameters(chunks)

    def write() -> None:
        if full is None:
            return
        from safetensors.torch import save_file

        tensors = {
            name: tensor.contiguous().to(chunks.config.params_dtype)
            for name, tensor in _renamed(full, chunks, config).items()
        }
        save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")

    gather(write)


def _settings(chunks: ModelChunks, config: RunConfig) -> dict[str, Any]:
    model, layers = config.model, chunks.config

    def require(option: str, value: Any, wanted: Any) -> None:
        if value != wanted:
            raise ValueError(
                f"{option}: {value} has no place in a Hugging Face model of the Llama family, "
                f"which the engines openai and hf sample from; it needs {wanted}"
            )

    require("model.position_embedding_type", model.position_embedding_type, "rope")
    require("model.rotary_percent", model.rotary_percent, 1.0)
    require("model.rope_scaling", model.rope_scaling, False)
    require("model.activation", model.activation, "silu")
    require("model.transformer.gated_linear_unit", layers.gated_linear_unit, True)
    require("model.transformer.normalization", layers.normalization, "RMSNorm")
    require("model.transformer.add_bias_linear", layers.add_bias_linear, False)
    require("model.transformer.num_moe_experts", layers.num_moe_experts, None)
    family = "qwen3" if layers.qk_layernorm else "qwen2" if layers.add_qkv_bias else "llama"
    if layers.qk_layernorm and layers.add_qkv_bias:
        require("model.transformer.add_qkv_bias", True, False)
    classes = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    return {
        "architectures": [f"{classes[family]}ForCausalLM"],
        "model_type": family,
        "vocab_size": model.vocab_size,
        "hidden_size": layers.hidden_size,
        "intermediate_size": layers.ffn_hidden_size,
        "num_hidden_layers": layers.num_layers,
        "num_attention_heads": layers.num_attention_heads,
        "num_key_value_heads": layers.num_query_groups,
        "head_dim": layers.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_sequence_length,
        "rms_norm_eps": layers.layernorm_epsilon,
        "rope_theta": float(model.rotary_base),
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "attention_bias": False,
        "torch_dtype": str(layers.params_dtype).removeprefix("torch."),
    }


def _renamed(full: FullTensors, chunks: ModelChunks, config: RunConfig) -> dict[str, Tensor]:
    vocab = config.model.vocab_size
    tensors = {
        "model.embed_tokens.weight": full["embedding.word_embeddings.weight"][:vocab],
        "model.norm.weight": full["decoder.final_layernorm.weight"],
    }
    if not config.model.share_embeddings_and_output_weights:
        tensors["lm_head.weight"] = full["output_layer.weight"][:vocab]
    for layer in range(chunks.config.num_layers):
        tensors |= _layer(full, layer, chunks)
    return tensors


def _layer(full: FullTensors, layer: int, chunks: ModelChunks) -> dict[str, Tensor]:
    config = chunks.config
    to = f"model.layers.{layer}."

    def get(*names: str) -> Tensor | None:
        # Layers are one tensor [layers, ...] or one of each; a norm may be fused into what follows.
        for name in names:
            if f"decoder.layers.{name}" in full:
                return full[f"decoder.layers.{name}"][layer]
            if f"decoder.layers.{layer}.{name}" in full:
                return full[f"decoder.layers.{layer}.{name}"]
        return None

    gate, up = get("mlp.linear_fc1.weight").chunk(2)
    found = {
        "input_layernorm.weight": get(
            "input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"
        ),
        "post_attention_layernorm.weight": get(
            "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"
        ),
        "self_attn.o_proj.weight": get("self_attention.linear_proj.weight"),
        "self_attn.q_norm.weight": get("self_attention.q_layernorm.weight"),
        "self_attn.k_norm.weight": get("self_attention.k_layernorm.weight"),
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": get("mlp.linear_fc2.weight"),
    }
    for kind in ("weight", "bias"):
        fused = get(f"self_attention.linear_qkv.{kind}")
        if fused is not None:
            for name, part in zip("qkv", _split_qkv(fused, config), strict=True):
                found[f"self_attn.{name}_proj.{kind}"] = part
    return {to + name: tensor for name, tensor in found.items() if tensor is not None}


def _split_qkv(fused: Tensor, config: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's [g (r + 2) d, ...], group by group, as queries, keys and values."""
    groups, channels = config.num_query_groups, config.kv_channels
    queries = config.num_attention_heads // groups
    rest = fused.shape[1:]
    parts = fused.reshape(groups, queries + 2, channels, *rest).split([queries, 1, 1], dim=1)
    query, key, value = (torch.flatten(part, 0, 2) for part in parts)
    return query, key, value

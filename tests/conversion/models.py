"""Small random Hugging Face models of every family, as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file, save_file

HAS_SHARED_EXPERT_GATE = "moe_shared_expert_gate" in TransformerConfig.__dataclass_fields__
"""megatron-core 0.16 and newer."""
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MANY_SHARDS = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 24,
    "vocab_size": 4096,
}
"""Some 100 MB in float32, so that memory can be told from noise."""
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

EXPERTS_BY_SIGMOID = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "num_nextn_predict_layers": 0,
}
LATENT = {
    **EXPERTS_BY_SIGMOID,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    "n_group": 4,
    "topk_group": 2,
}
"""Sizes of multi-latent attention and of experts as DeepSeek-V3 has them."""

OF_GPT_OSS = {
    "intermediate_size": 24,
    "head_dim": 32,
    "num_local_experts": 4,
    "sliding_window": 5,
    # So low that halves of the MLP are clamped.
    "swiglu_limit": 1.5,
    "rope_parameters": {**YARN, "truncate": False},
}

GPT_OSS = "gpt_oss, yarn, windows in some layers"
MINIMAX = "minimax_m2"
QWEN2_MOE = "qwen2_moe, gate of the shared expert"
DELTA_NETS = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
QWEN3_NEXT = "qwen3_next, dense layer"
QWEN3_5 = "qwen3_5"
WITH_SHARED_EXPERT = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, rope scaling, wide heads": ("llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}),
    "llama, tied": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-4}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16, "norm_topk_prob": True},
    ),
    "qwen3_moe, dense layer, weights as they are": (
        "qwen3_moe",
        {
            "num_hidden_layers": 3,
            "num_experts": 4,
            "moe_intermediate_size": 48,
            "head_dim": 16,
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 4, "head_dim": 32}),
    "qwen3, windows in some layers": (
        "qwen3",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "mixtral, window": ("mixtral", {"num_local_experts": 4, "sliding_window": 7}),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "deepseek_v3, yarn": (
        "deepseek_v3",
        {**LATENT, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}},
    ),
    "glm4_moe": (
        "glm4_moe",
        {
            **EXPERTS_BY_SIGMOID,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "attention_bias": True,
            "use_qk_norm": True,
            "routed_scaling_factor": 1.5,
        },
    ),
    "glm4_moe, groups": (
        "glm4_moe",
        {**EXPERTS_BY_SIGMOID, "n_group": 4, "topk_group": 2, "partial_rotary_factor": 0.25},
    ),
    GPT_OSS: ("gpt_oss", OF_GPT_OSS),
    "gpt_oss without a window": (
        "gpt_oss",
        {**OF_GPT_OSS, "layer_types": ["full_attention"] * 2, "rope_parameters": PLAIN_ROPE},
    ),
    QWEN2_MOE: (
        "qwen2_moe",
        {
            "num_hidden_layers": 3,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [1],
        },
    ),
    QWEN3_NEXT: (
        "qwen3_next",
        {
            **DELTA_NETS,
            **WITH_SHARED_EXPERT,
            "full_attention_interval": 2,
            "num_hidden_layers": 3,
            "mlp_only_layers": [0],
        },
    ),
    QWEN3_5: ("qwen3_5_text", {**DELTA_NETS, "tie_word_embeddings": True}),
    "qwen3_5, experts": (
        "qwen3_5_moe_text",
        {**DELTA_NETS, **WITH_SHARED_EXPERT, "num_hidden_layers": 2, "full_attention_interval": 2},
    ),
    MINIMAX: (
        "minimax_m2",
        {
            "intermediate_size": 24,
            "head_dim": 32,
            "num_local_experts": 4,
            "rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 0.5},
        },
    ),
    "deepseek_v3 as Moonlight": (
        "deepseek_v3",
        {**LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_hidden_layers": 2},
    ),
}


WITH_DELTA_NETS = [
    case for case, (_, options) in CASES.items() if "linear_num_key_heads" in options
]


def write_model(
    folder: Path,
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int = "50GB",
    seed: int = 0,
    **options: Any,
) -> Path:
    """Save a random model of `family`; norms and biases random too."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if family in ("qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "minimax_m2"):
        options = {"num_experts_per_tok": 2, **options}
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**SIZES, **options})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than at initialisation: errors of a part of the model must show.
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer), alpha=0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def add_mtp_layer(folder: Path, layer: int, dtype: torch.dtype = torch.float32) -> list[str]:
    """Give a folder of one file what its family has for predicting the token after the next."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    shapes = {
        "eh_proj.weight": (64, 128),
        "embed_tokens.weight": (61, 64),
        "enorm.weight": (64,),
        "mlp.gate.e_score_correction_bias": (8,),
        "self_attn.kv_b_proj.weight": (88, 14),
        "shared_head.norm.weight": (64,),
    }
    first = f"model.layers.{layer}."
    if json.loads((folder / "config.json").read_text())["model_type"] == "qwen3_next":
        first = "mtp.layers.0."
        tensors["mtp.fc.weight"] = torch.randn(64, 128, dtype=dtype)
    new = {first + name: torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {name: tensor.to(dtype) for name, tensor in new.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    edit_json(folder / "config.json", num_nextn_predict_layers=1)
    return list(new)


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def quantize_as_mxfp4(folder: Path) -> None:
    """Give a gpt-oss folder of one file random experts in 4 bits, as its makers publish them."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        # Pairs of numbers in bytes, and one exponent for 32 numbers.
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_blocks"] = blocks
        tensors[f"{name}_scales"] = torch.randint(122, 125, blocks.shape[:-1], dtype=torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})

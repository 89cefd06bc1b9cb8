"""config.json of Hugging Face models, read and written by transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_prefix.config import YarnConfig
from megatron_prefix.conversion.architecture import FAMILIES, Architecture
from megatron_prefix.conversion.errors import ConversionError
from megatron_prefix.conversion.hf_deepseek import (
    latent_values,
    latent_yarn_values,
    read_latent,
    read_latent_yarn,
)
from megatron_prefix.conversion.hf_experts import expert_values, read_experts
from megatron_prefix.conversion.hf_folder import read_json
from megatron_prefix.conversion.hf_qwen3_next import (
    MROPE_KEYS,
    WITH_DELTA_NETS,
    delta_net_values,
    read_delta_nets,
)
from megatron_prefix.packages import needed_by

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "mistral": "MistralForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
}
_WINDOWS = {
    "qwen2": "by layer",
    "qwen3": "by layer",
    "qwen3_moe": "all layers",
    "mixtral": "all layers",
    "mistral": "all layers",
    "gpt_oss": "by layer",
}
"""Families with sliding windows, and whether their layers differ in transformers."""
_QK_NORM = ("qwen3", "qwen3_moe", "deepseek_v3", "minimax_m2", *WITH_DELTA_NETS)
"""Families that norm queries and keys always."""
SAME_AS = {"kimi_k2": "deepseek_v3"}
"""Families that are another one under a name of their own."""
REFUSED = {
    "deepseek_v2": "its routers choose by softmax in groups, and YaRN's factors differ",
    "deepseek_v32": "its sparse attention (an indexer chooses keys) has no shared prefixes yet",
    "gemma3": "it reads images too; and see gemma3_text",
    "gemma3_text": "its norms, its scaled embeddings and its two rotary bases are not converted",
    "glm4_moe_lite": "its latent attention and routers are not compared with deepseek_v3's yet",
    "glm_moe_dsa": "its sparse attention (an indexer chooses keys) has no shared prefixes yet",
    "llama4": "its attention in chunks and its routers are not converted",
    "nemotron_h": "weights of its state-space layers (Mamba) are not converted yet",
    "qwen2_5_vl": "it reads images too, which runs do not yet",
    "qwen3_vl": "it reads images too, which runs do not yet",
    "qwen3_vl_moe": "it reads images too, which runs do not yet",
    **dict.fromkeys(
        ("mistral3", "qwen3_5", "qwen3_5_moe"),
        "it reads images too; convert a folder of its text model",
    ),
}
"""Families that are known and cannot be converted, and why."""
# Numbers of Llama 3's scaling that Megatron's GPTModel has no option for.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

_UNQUANTIZE_MXFP4 = (
    "let transformers write it as bfloat16 (AutoModelForCausalLM.from_pretrained(folder, "
    "dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True))"
    ".save_pretrained(other))"
)

_PARTLY_TURNED = ("glm4_moe", "minimax_m2", *WITH_DELTA_NETS)
"""Families whose heads are turned in a part of their dimensions."""
_ROPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_ROPE_KEYS = {
    "default": (*_ROPE, "factor", "original_max_position_embeddings"),
    "llama3": (*_ROPE, "factor", *_LLAMA3),
    "yarn": (
        *_ROPE,
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"),
    ),
}
"""What each kind of rotary embedding is made of here; a key beside would be lost."""
_WITHOUT = {
    ("deepseek_v3", "llama3"),
    *((family, kind) for family in _PARTLY_TURNED for kind in ("llama3", "yarn")),
}
"""Families, and the kinds that Megatron or this conversion does not have for them."""


def read_architecture(folder: Path) -> Architecture:
    """Read `folder`/config.json.

    Raises:
        ConversionError: it is missing or damaged, or says something that Megatron's GPTModel
            cannot compute, naming the key and its value.
    """
    path = folder / "config.json"
    family = _family(folder)
    try:
        return _architecture(read_config(folder), family)
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error
    # transformers checks values in many ways, and raises as many kinds of errors.
    except Exception as error:
        raise ConversionError(f"{path}: transformers cannot read it: {error}") from error


def read_config(folder: Path) -> Any:
    """config.json as transformers' own class of the family reads it."""
    with needed_by("converting", extra="hf"):
        from transformers import CONFIG_MAPPING

    family = _family(folder)
    config = CONFIG_MAPPING[family].from_pretrained(folder, local_files_only=True)
    # By this name transformers finds how the tensors of experts are stored.
    config.model_type = family
    return config


def _family(folder: Path) -> str:
    path = folder / "config.json"
    raw = read_json(path)
    name = raw.get("model_type")
    family = SAME_AS.get(name, name)
    if family not in FAMILIES:
        reason = f": {REFUSED[name]}" if name in REFUSED else ""
        raise ConversionError(
            f"{path}: model_type {name!r} is not supported{reason}; supported are "
            f"{', '.join((*FAMILIES, *SAME_AS))}"
        )
    quantized = raw.get("quantization_config")
    if quantized is not None:
        instead = "convert the unquantized one"
        if isinstance(quantized, dict) and quantized.get("quant_method") == "mxfp4":
            instead = f"{_UNQUANTIZE_MXFP4}, and convert that folder"
        raise ConversionError(f"{path}: the model is quantized (quantization_config); {instead}")
    return family


def _architecture(config: Any, family: str) -> Architecture:
    def value(name: str, default: Any = None) -> Any:
        found = getattr(config, name, None)
        return default if found is None else found

    def refuse(name: str, why: str) -> None:
        raise ConversionError(f"{name}: {value(name)!r} {why}")

    if value("hidden_act") != "silu":
        refuse("hidden_act", "is not supported; the supported models have silu")
    if value("is_causal", True) is not True:
        refuse("is_causal", "is not supported: every token would see those after it")
    attention_bias, mlp_bias = value("attention_bias", False), value("mlp_bias", False)
    if family == "gpt_oss":
        mlp_bias = True  # of its experts and routers, always
    if family == "minimax_m2":
        for name, of in (("use_qk_norm", True), ("qk_norm_type", "per_layer")):
            if value(name, of) != of:
                refuse(name, f"is not supported; transformers and this conversion have {of!r}")
        if any(kind != 1 for kind in value("attn_type_list", [])):
            refuse("attn_type_list", "has layers without full attention, which are not supported")
    if family == "qwen2_moe" and value("use_sliding_window"):
        refuse("use_sliding_window", "is not supported with qwen2_moe; set it to false")
    if attention_bias != mlp_bias and family != "glm4_moe":
        refuse(
            "attention_bias",
            f"with mlp_bias: {mlp_bias} is nothing that Megatron's GPTModel has; there the "
            "attention's output and the MLP have biases both or neither",
        )
    windows = _windows(config, family)
    return Architecture(
        # Without a window Mistral's models are Llama's.
        family="llama" if family == "mistral" and not windows else family,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=value("num_key_value_heads", config.num_attention_heads),
        head_dim=value("head_dim", config.hidden_size // config.num_attention_heads),
        ffn_hidden_size=value("intermediate_size", value("moe_intermediate_size")),
        vocab_size=config.vocab_size,
        max_length=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        tied_embeddings=bool(value("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or attention_bias or value("qkv_bias", False),
        linear_bias=attention_bias and mlp_bias,
        qk_norm=family in _QK_NORM or value("use_qk_norm", False),
        qk_norm_all_heads=family == "minimax_m2",
        latent=read_latent(config) if family == "deepseek_v3" else None,
        **windows,
        **_rope(config, family),
        **read_experts(config, family),
        **read_delta_nets(config, family),
    )


def _windows(config: Any, family: str) -> dict[str, Any]:
    """The sliding windows that transformers gives the layers."""
    if family not in _WINDOWS:
        return {}
    # Where a family's switch is off, its config has set the size to none.
    size, count = getattr(config, "sliding_window", None), config.num_hidden_layers
    kinds = ("sliding_attention" if size else "full_attention",) * count
    if _WINDOWS[family] == "by layer":
        kinds = tuple(config.layer_types)
    for layer, kind in enumerate(kinds):
        if kind != "full_attention" and (kind != "sliding_attention" or not size):
            raise ConversionError(
                f"sliding_window: {size}, and layer {layer} is of {kind} (layer_types, "
                "use_sliding_window, max_window_layers), which is not supported"
            )
    windowed = tuple(kind == "sliding_attention" for kind in kinds)
    return {"window": size, "windowed_layers": windowed} if any(windowed) else {}


def _rope(config: Any, family: str) -> dict[str, Any]:
    # transformers 5 has one dict; 4 has a number and a dict.
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        rope = {"rope_theta": config.rope_theta, **(config.rope_scaling or {})}
    theta = rope["rope_theta"]
    if theta != int(theta):
        raise ConversionError(f"rope_theta: {theta} is no whole number, as Megatron takes it")
    fraction = rope.get("partial_rotary_factor", 1.0)
    if fraction != 1.0 and family not in _PARTLY_TURNED:
        raise ConversionError(f"partial_rotary_factor: {fraction} is not supported")
    found: dict[str, Any] = {"rotary_base": int(theta), "rotary_fraction": fraction}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_KEYS or (family, kind) in _WITHOUT:
        raise ConversionError(
            f"rope_type: {kind!r} is not supported with {family}; supported are "
            f"{', '.join(k for k in _ROPE_KEYS if (family, k) not in _WITHOUT)}"
        )
    latent = family == "deepseek_v3"
    known = (*_ROPE_KEYS[kind], *(("mscale", "mscale_all_dim") if latent else ()))
    if family.startswith("qwen3_5"):
        known += MROPE_KEYS
    for name, number in rope.items():
        if name not in known and number is not None:
            raise ConversionError(
                f"rope_scaling.{name}: {number} is not supported with rope_type: {kind}; leave it "
                "out"
            )
    if kind == "llama3":
        for name, fixed in _LLAMA3.items():
            if rope[name] != fixed:
                raise ConversionError(
                    f"rope_scaling.{name}: {rope[name]} is not supported; Megatron's GPTModel has "
                    f"{fixed}"
                )
        found["llama3_rope_factor"] = float(rope["factor"])
    elif kind == "yarn":
        found["yarn"] = YarnConfig(
            rotary_scaling_factor=float(rope["factor"]),
            original_max_position_embeddings=int(
                rope.get("original_max_position_embeddings") or config.max_position_embeddings
            ),
            beta_fast=float(rope.get("beta_fast") or 32.0),
            beta_slow=float(rope.get("beta_slow") or 1.0),
            correction_range_round_to_int=rope.get("truncate", True),
            **(read_latent_yarn(rope) if latent else {}),
        )
        if latent and not found["yarn"].correction_range_round_to_int:
            raise ConversionError(
                "rope_scaling.truncate: false is not supported; Megatron's multi-latent attention "
                "rounds"
            )
    return found


def _window_values(a: Architecture) -> dict[str, Any]:
    """The sliding windows, as config.json has them."""
    values: dict[str, Any] = {"sliding_window": a.window}
    if a.family.startswith("qwen"):
        values["use_sliding_window"] = a.window is not None
    if _WINDOWS[a.family] == "by layer":
        windowed = a.windowed_layers or (False,) * a.num_layers
        if a.family.startswith("qwen"):
            # Servers read the first layer with a window; transformers each layer's kind.
            values["max_window_layers"] = windowed.index(True) if any(windowed) else a.num_layers
        values["layer_types"] = [
            "sliding_attention" if window else "full_attention" for window in windowed
        ]
    elif a.windowed_layers and not all(a.windowed_layers):
        raise ConversionError(
            "model.transformer.window_attn_skip_freq: layers without the window are nothing that "
            f"a config.json of {a.family} can say"
        )
    return values


def config_values(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """The contents of a config.json.

    Args:
        dtype: of the weights, as torch names it (bfloat16).

    Raises:
        ConversionError: the rotary scaling cannot be said.
    """
    with needed_by("converting", extra="hf"):
        from transformers import CONFIG_MAPPING

    a = architecture
    rope: dict[str, Any] = {"rope_type": "default"}
    if a.llama3_rope_factor is not None:
        rope = {"rope_type": "llama3", "factor": a.llama3_rope_factor, **_LLAMA3}
    elif a.yarn is not None:
        if a.latent is None and (a.yarn.mscale, a.yarn.mscale_all_dim) != (1.0, 0.0):
            raise ConversionError(
                "model.yarn: mscale and mscale_all_dim other than 1 and 0 are not supported"
            )
        rope = {
            "rope_type": "yarn",
            "factor": a.yarn.rotary_scaling_factor,
            "original_max_position_embeddings": a.yarn.original_max_position_embeddings,
            "beta_fast": a.yarn.beta_fast,
            "beta_slow": a.yarn.beta_slow,
            "truncate": a.yarn.correction_range_round_to_int,
            **(latent_yarn_values(a.yarn) if a.latent is not None else {}),
        }
    # Both spellings: transformers 5 reads rope_parameters, servers built on 4 the other two.
    options: dict[str, Any] = {
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_query_groups,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": a.max_length,
        "rms_norm_eps": a.norm_epsilon,
        "tie_word_embeddings": a.tied_embeddings,
        "attention_dropout": 0.0,
    }
    if a.family == "llama":
        options.update(attention_bias=a.linear_bias, mlp_bias=a.linear_bias)
    options.update(expert_values(a), **delta_net_values(a))
    if a.family == "qwen2_moe":
        options.update(qkv_bias=a.qkv_bias, use_sliding_window=False)
    if a.family == "deepseek_v3":
        options.update(latent_values(a))
    if a.family == "gpt_oss":
        options["attention_bias"] = a.qkv_bias
    if a.family in _PARTLY_TURNED:
        rope["partial_rotary_factor"] = options["partial_rotary_factor"] = a.rotary_fraction
    if a.family in ("glm4_moe", "minimax_m2"):
        options["use_qk_norm"] = a.qk_norm
    if a.family == "glm4_moe":
        options["attention_bias"] = a.qkv_bias
    if a.family == "minimax_m2":
        options.update(qk_norm_type="per_layer", rotary_dim=int(a.head_dim * a.rotary_fraction))
    if a.family in _WINDOWS:
        options.update(_window_values(a))
    # transformers takes the fraction from `rope_parameters`, servers from a key of its own.
    known = CONFIG_MAPPING[a.family](
        **options, rope_parameters={**rope, "rope_theta": float(a.rotary_base)}
    ).to_dict()
    known.pop("transformers_version", None)
    known.update(options)
    known.pop("_name_or_path", None)
    return {
        **known,
        "architectures": [_CLASSES[a.family]],
        "model_type": a.family,
        "torch_dtype": dtype,
        "dtype": dtype,
        "rope_theta": float(a.rotary_base),
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "rope_parameters": {**rope, "rope_theta": float(a.rotary_base)},
    }

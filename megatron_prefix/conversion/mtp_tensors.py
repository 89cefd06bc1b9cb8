"""Tensors of layers that predict further tokens (multi-token prediction, MTP).

Each such layer reads the output of the layers before it, behind their last norm, and the embedding
of a further token (DeepSeek-V3, arXiv 2412.19437, section 2.2). Norms of both, a projection and a
norm of its output stand around a layer like the last of the model:

    Megatron: mtp.layers.K.   DeepSeek-V3, GLM-4.5: model.layers.N+K.   Qwen: mtp.
    enorm                     enorm                                     pre_fc_norm_embedding
    hnorm                     hnorm                                     pre_fc_norm_hidden
    eh_proj                   eh_proj                                   fc
    transformer_layer         the layer's own names                     layers.K
    final_layernorm           shared_head.norm                          norm

N is the number of the other layers. All of them put the embedding's half of the projection's input
first. DeepSeek-V3 and GLM-4.5 also store the model's embedding and output layer once more
(embed_tokens, shared_head.head).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from megatron_prefix.conversion.architecture import Architecture
from megatron_prefix.conversion.errors import ConversionError
from megatron_prefix.conversion.hf_qwen3_next import WITH_DELTA_NETS

_NUMBERED = {
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "eh_proj.weight": "eh_proj.weight",
    "final_layernorm.weight": "shared_head.norm.weight",
}
_OF_QWEN = {
    "enorm.weight": "mtp.pre_fc_norm_embedding.weight",
    "hnorm.weight": "mtp.pre_fc_norm_hidden.weight",
    "eh_proj.weight": "mtp.fc.weight",
    "final_layernorm.weight": "mtp.norm.weight",
}
_FAMILIES = ("deepseek_v3", "glm4_moe", *WITH_DELTA_NETS)


def parameters(a: Architecture, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Megatron's names and shapes of what stands around the layer inside.

    Args:
        layer: its number, counted behind the other layers.
    """
    h = a.hidden_size
    for name in _NUMBERED:
        shape = (h, 2 * h) if name == "eh_proj.weight" else (h,)
        yield f"mtp.layers.{layer - a.num_layers}.{name}", shape


def hf_names(a: Architecture, name: str, names_of: Callable[[str], list[str]]) -> list[str]:
    """Hugging Face's names of a parameter.

    Args:
        name: Megatron's.
        names_of: gives those of a parameter of other layers.
    """
    found = re.fullmatch(r"mtp\.layers\.(\d+)\.(transformer_layer\.)?(.*)", name)
    if found is None:
        return names_of(name)
    mtp, inside, own = int(found[1]), found[2], found[3]
    layer = a.num_layers + mtp
    of_qwen = a.family in WITH_DELTA_NETS
    if not inside:
        return [_OF_QWEN[own] if of_qwen else f"model.layers.{layer}.{_NUMBERED[own]}"]
    names = names_of(f"decoder.layers.{layer}.{own}")
    if of_qwen:
        names = [n.replace(f"model.layers.{layer}.", f"mtp.layers.{mtp}.", 1) for n in names]
    return names


def fused_experts(a: Architecture, layer: int) -> Iterator[tuple[str, str, tuple[int, int, int]]]:
    """Experts of a layer of Qwen in one tensor, [experts, outputs, inputs] as Megatron has them.

    Megatron's names within the layer, Hugging Face's names, and shapes.
    """
    h, f, experts = a.hidden_size, a.expert_ffn_hidden_size, a.num_experts
    assert experts is not None and f is not None
    first = f"mtp.layers.{layer - a.num_layers}.mlp.experts"
    yield "mlp.experts.linear_fc1.weight", f"{first}.gate_up_proj", (experts, 2 * f, h)
    yield "mlp.experts.linear_fc2.weight", f"{first}.down_proj", (experts, h, f)


def has_fused_experts(a: Architecture, names: Collection[str]) -> bool:
    """Whether a folder has the experts of MTP layers in one tensor, as Qwen3.6's are published."""
    return a.family in WITH_DELTA_NETS and "mtp.layers.0.mlp.experts.gate_up_proj" in names


def copies(a: Architecture) -> dict[str, str]:
    """Names of a published folder's tensors that are another one once more, and of the other."""
    if a.family in WITH_DELTA_NETS:
        return {}
    output = "model.embed_tokens.weight" if a.tied_embeddings else "lm_head.weight"
    found = {}
    for layer in range(a.num_layers, a.num_layers + a.computed_mtp_layers):
        found[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        found[f"model.layers.{layer}.shared_head.head.weight"] = output
    return found


def names_in(a: Architecture, names: Iterable[str]) -> list[str]:
    """Those of a folder's tensors that belong to MTP layers."""
    if a.family in WITH_DELTA_NETS:
        # Whatever config.json says: that of Qwen3-Next says nothing of them.
        return [name for name in names if name.startswith("mtp.")]
    return [n for n in names if (layer := _mtp_layer(a, n)) is not None and layer < a.mtp_layers]


def layers_in(a: Architecture, names: Iterable[str]) -> int:
    """The number of MTP layers that a folder's tensors belong to."""
    found = (_mtp_layer(a, name) for name in names)
    return max((layer + 1 for layer in found if layer is not None), default=0)


def layers_stored(keys: Iterable[str]) -> int:
    """The number of MTP layers that a checkpoint of Megatron holds."""
    found = (re.match(r"mtp\.layers\.(\d+)\.", key) for key in keys)
    return max((int(key[1]) + 1 for key in found if key is not None), default=0)


def with_mtp(folder: Path, a: Architecture, names: Collection[str]) -> Architecture:
    """The same model with the MTP layers of a folder.

    Args:
        names: of the folder's tensors.

    Raises:
        ConversionError: it has none, or such as Megatron has not, naming the folder.
    """
    count = layers_in(a, names_in(a, names))
    if not count:
        where = "mtp.layers" if a.family in WITH_DELTA_NETS else f"model.layers.{a.num_layers}"
        raise ConversionError(
            f"{folder}: has no layers that predict further tokens (MTP): config.json counts none, "
            f"or no tensor is of {where}; convert it without --mtp"
        )
    # Where config.json counts more, a tensor is missing, which is said by its name.
    found = dataclasses.replace(a, mtp_layers=max(count, a.mtp_layers), mtp_computed=True)
    try:
        refuse_mtp(found)
        _check_experts(found, names)
    except ConversionError as error:
        raise ConversionError(f"{folder}: {error}; without --mtp it is kept aside") from error
    return found


def _check_experts(a: Architecture, names: Collection[str]) -> None:
    for mtp in range(a.mtp_layers):
        first = f"model.layers.{a.num_layers + mtp}"
        if a.family in WITH_DELTA_NETS:
            first = f"mtp.layers.{mtp}"
        if (f"{first}.mlp.gate.weight" in names) != a.has_experts(a.num_layers):
            raise ConversionError(
                f"{first} has experts and the last of the other layers has none, or the other way "
                "round; Megatron makes an MTP layer like the last one"
            )


def _mtp_layer(a: Architecture, name: str) -> int | None:
    """The number among the MTP layers, from 0, of the one that a tensor belongs to."""
    first, own = ("mtp", 0) if a.family in WITH_DELTA_NETS else ("model", a.num_layers)
    found = re.match(rf"{first}\.layers\.(\d+)\.", name)
    return int(found[1]) - own if found and int(found[1]) >= own else None


def refuse_mtp(a: Architecture) -> None:
    """What the Megatron model cannot be given, or a Hugging Face folder cannot hold.

    Raises:
        ConversionError: the model has MTP layers of this kind, saying why.
    """
    if not a.computed_mtp_layers:
        return
    key = f"model.transformer.mtp_num_layers: {a.mtp_layers}"
    if a.family not in _FAMILIES:
        raise ConversionError(
            f"{key} is nothing that a config.json of {a.family} can say; of the supported families "
            f"these have such layers: {', '.join(_FAMILIES)}"
        )
    if a.linear is None:
        return
    if a.mtp_layers > 1:
        raise ConversionError(
            f"{key} with {a.family}, whose MTP layers share one projection (mtp.fc); Megatron's "
            "have one each, so only a single layer is converted"
        )
    if a.linear_layers[-1]:
        raise ConversionError(
            f"{key} with a gated delta net as the last layer: Megatron makes an MTP layer like the "
            f"last one, and that of {a.family} has softmax attention"
        )

"""Which Hugging Face tensors make which Megatron parameter, and how.

Names and the layout of fused tensors are mbridge's; only its tables and its two functions per
tensor are used, without a model or process groups (see `bridge_tables.py`). What it lacks is added
here: keys of distributed checkpoints (all layers stacked along a first axis), shapes, tied
embeddings in every family, dense layers between layers of experts, and experts in one tensor.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prefix.conversion import delta_net_tensors, fused_experts, mtp_tensors
from megatron_prefix.conversion.architecture import Architecture
from megatron_prefix.conversion.bridge_tables import bridge_of

Shape = tuple[int, ...]
BIAS_OF_ROUTER = ".e_score_correction_bias"
"""End of the name of a tensor that stays in float32, whatever the type of the weights."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One layer's (and expert's) Megatron parameter, and the tensors that it is made of.

    Where a folder keeps the experts of a layer in one tensor, it is that of all experts.
    """

    name: str
    """As mbridge and Megatron's unsharded state dict have it."""
    places: tuple[tuple[str, Shape], ...]
    """Key in a distributed checkpoint and the leading indices there; the first is written, with
    `also`; a reader takes the first that is there."""
    also: tuple[str, ...] = ()
    """Keys of other places that are written too."""
    leading: Shape
    """Sizes of the leading axes (layers, experts) at the first place."""
    shape: Shape
    """Without the leading axes."""
    sources: tuple[tuple[str, Shape], ...]
    """Hugging Face names and shapes."""
    copies: tuple[str, ...] = ()
    """Hugging Face names of tensors that are the (only) source once more."""
    of_all_experts: bool = False
    parts: tuple[tuple[str, int], ...] = ()
    """What Megatron stores it as, if not as one tensor: ends of keys, and rows of each."""

    @property
    def stored(self) -> list[tuple[str, slice]]:
        """What is added to a place's key, and the rows that are stored there."""
        if not self.parts:
            return [("", slice(None))]
        ends = itertools.accumulate(rows for _, rows in self.parts)
        return [
            (f".{name}", slice(end - rows, end))
            for (name, rows), end in zip(self.parts, ends, strict=True)
        ]

    @property
    def is_less_1(self) -> bool:
        """One that Megatron has 1 smaller; in float32 there, so that it comes back as it was."""
        return self.name.endswith(delta_net_tensors.OUT_NORM)

    @property
    def is_bias_of_router(self) -> bool:
        """One that Megatron keeps in float32, whatever the type of the weights."""
        return self.name.endswith("mlp.router.expert_bias")

    @property
    def is_gated(self) -> bool:
        """One with the two halves of a gated MLP."""
        return ".linear_fc1." in self.name


class Mapping:
    """All parameters of an architecture."""

    def __init__(
        self,
        architecture: Architecture,
        *,
        copies: Collection[str] | None = None,
        fused_mtp_experts: bool = False,
    ) -> None:
        """Of a folder's tensors, or of those that the family's published folders have.

        Args:
            copies: which of `Parameter.copies` there are; None: all.
            fused_mtp_experts: the experts of MTP layers are one tensor, as Qwen3.6's are.
        """
        self.architecture = architecture
        self._fused_mtp_experts = fused_mtp_experts
        self._bridge = bridge_of(architecture)
        self._copies = {
            name: of
            for name, of in mtp_tensors.copies(architecture).items()
            if copies is None or name in copies
        }

    def parameters(self) -> list[Parameter]:
        """Every parameter, in the order of the layers."""
        return list(self._parameters())

    def to_megatron(self, parameter: Parameter, tensors: Sequence[Tensor]) -> Tensor:
        """Fuse the tensors of `parameter.sources`; of the same dtype."""
        if parameter.of_all_experts:
            if self.architecture.family != "gpt_oss":
                return tensors[0]
            return fused_experts.to_megatron(tensors[0], gated=parameter.is_gated)
        if self.architecture.linear is not None:
            whole = delta_net_tensors.to_megatron(self.architecture, parameter.name, tensors)
            if whole is not None:
                return whole
        return self._bridge._weight_to_mcore_format(parameter.name, list(tensors))

    def to_hf(self, parameter: Parameter, tensor: Tensor) -> dict[str, Tensor]:
        """Take a parameter apart again; rows that only pad the vocabulary are left out."""
        if parameter.of_all_experts:
            ((name, _),) = parameter.sources
            if self.architecture.family == "gpt_oss":
                tensor = fused_experts.to_hf(tensor, gated=parameter.is_gated)
            return {name: tensor}
        if tensor.shape[0] > parameter.shape[0]:
            tensor = tensor[: parameter.shape[0]]
        found = self._parts(parameter, tensor)
        # Memory of their own, as safetensors asks for.
        return found | {name: tensor.clone() for name in parameter.copies}

    def _parts(self, parameter: Parameter, tensor: Tensor) -> dict[str, Tensor]:
        if self.architecture.linear is not None:
            parts = delta_net_tensors.to_hf(self.architecture, parameter.name, tensor)
            if parts is not None:
                return dict(zip((name for name, _ in parameter.sources), parts, strict=True))
        names, tensors = self._bridge._weight_to_hf_format(parameter.name, tensor)
        return dict(zip(names, tensors, strict=True))

    def _parameters(self) -> Iterator[Parameter]:
        a = self.architecture
        h = a.hidden_size
        yield self._parameter("embedding.word_embeddings.weight", [(a.vocab_size, h)])
        for layer in range(a.num_layers):
            if a.linear is not None and a.linear_layers[layer]:
                yield from self._delta_net(layer)
            else:
                yield from self._attention(layer) if a.latent is None else self._latent(layer)
            yield from self._experts(layer) if a.has_experts(layer) else self._mlp(layer)
        yield self._parameter("decoder.final_layernorm.weight", [(h,)])
        for layer in range(a.num_layers, a.num_layers + a.computed_mtp_layers):
            for name, shape in mtp_tensors.parameters(a, layer):
                yield self._parameter(name, [shape])
            yield from self._attention(layer) if a.latent is None else self._latent(layer)
            yield from self._experts(layer) if a.has_experts(layer) else self._mlp(layer)
        if not a.tied_embeddings:
            yield self._parameter("output_layer.weight", [(a.vocab_size, h)])

    def _attention(self, layer: int) -> Iterator[Parameter]:
        a = self.architecture
        queries, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
        of = functools.partial(self._parameter, layer=layer)
        yield of("self_attention.linear_qkv.layer_norm_weight", [(a.hidden_size,)])
        rows = (queries if a.linear is None else 2 * queries, keys, keys)
        yield of("self_attention.linear_qkv.weight", [(n, a.hidden_size) for n in rows])
        if a.qkv_bias:
            yield of("self_attention.linear_qkv.bias", [(n,) for n in rows])
        if a.qk_norm:
            sizes = (queries, keys) if a.qk_norm_all_heads else (a.head_dim, a.head_dim)
            yield of("self_attention.q_layernorm.weight", [(sizes[0],)])
            yield of("self_attention.k_layernorm.weight", [(sizes[1],)])
        yield of("self_attention.linear_proj.weight", [(a.hidden_size, queries)])
        if a.linear_bias:
            yield of("self_attention.linear_proj.bias", [(a.hidden_size,)])
        if a.sinks:
            yield of("self_attention.core_attention.softmax_offset", [(a.num_attention_heads,)])

    def _delta_net(self, layer: int) -> Iterator[Parameter]:
        for name, shapes, parts in delta_net_tensors.parameters(self.architecture):
            yield dataclasses.replace(self._parameter(name, shapes, layer), parts=parts)

    def _latent(self, layer: int) -> Iterator[Parameter]:
        a = self.architecture
        assert a.latent is not None
        h, heads, latent = a.hidden_size, a.num_attention_heads, a.latent
        queries = heads * (latent.plain_channels + latent.turned_channels)
        expanded = heads * (latent.plain_channels + latent.value_channels)
        of = functools.partial(self._parameter, layer=layer)
        yield of("input_layernorm.weight", [(h,)])
        if latent.query_rank is None:
            yield of("self_attention.linear_q_proj.weight", [(queries, h)])
        else:
            yield of("self_attention.linear_q_down_proj.weight", [(latent.query_rank, h)])
            yield of(
                "self_attention.q_layernorm.weight",
                [(latent.query_rank,)],
                alias="self_attention.linear_q_up_proj.layer_norm_weight",
            )
            yield of("self_attention.linear_q_up_proj.weight", [(queries, latent.query_rank)])
        compressed = latent.rank + latent.turned_channels
        yield of("self_attention.linear_kv_down_proj.weight", [(compressed, h)])
        yield of(
            "self_attention.kv_layernorm.weight",
            [(latent.rank,)],
            alias="self_attention.linear_kv_up_proj.layer_norm_weight",
        )
        yield of("self_attention.linear_kv_up_proj.weight", [(expanded, latent.rank)])
        yield of("self_attention.linear_proj.weight", [(h, heads * latent.value_channels)])

    def _mlp(self, layer: int) -> Iterator[Parameter]:
        a = self.architecture
        h, f = a.hidden_size, a.ffn_hidden_size
        of = functools.partial(self._parameter, layer=layer)
        if a.latent is None:
            yield of("mlp.linear_fc1.layer_norm_weight", [(h,)])
        else:
            # The local spec renames no norm of layers with latent attention.
            yield self._norm_before_mlp(layer)
        yield of("mlp.linear_fc1.weight", [(f, h), (f, h)])
        yield of("mlp.linear_fc2.weight", [(h, f)])
        if a.linear_bias:
            yield of("mlp.linear_fc1.bias", [(f,), (f,)])
            yield of("mlp.linear_fc2.bias", [(h,)])

    def _experts(self, layer: int) -> Iterator[Parameter]:
        a = self.architecture
        h, f = a.hidden_size, a.expert_ffn_hidden_size
        assert a.num_experts is not None and f is not None
        yield self._norm_before_mlp(layer)
        yield self._parameter("mlp.router.weight", [(a.num_experts, h)], layer)
        if a.routing is not None:
            yield self._parameter("mlp.router.expert_bias", [(a.num_experts,)], layer)
        if a.linear_bias:
            yield self._parameter("mlp.router.bias", [(a.num_experts,)], layer)
        if a.shared_expert_ffn_hidden_size is not None:
            s = a.shared_expert_ffn_hidden_size
            yield self._parameter("mlp.shared_experts.linear_fc1.weight", [(s, h), (s, h)], layer)
            yield self._parameter("mlp.shared_experts.linear_fc2.weight", [(h, s)], layer)
        if a.shared_expert_gate:
            yield self._parameter("mlp.shared_experts.gate_weight", [(1, h)], layer)
        if a.family == "gpt_oss":
            yield from self._fused_experts(layer)
            return
        if self._fused_mtp_experts and layer >= a.num_layers:
            for name, source, shape in mtp_tensors.fused_experts(a, layer):
                yield self._of_all_experts(name, layer, (source, shape), shape[1:])
            return
        for expert in range(a.num_experts):
            of = functools.partial(self._parameter, layer=layer, expert=expert)
            yield of("mlp.experts.linear_fc1.weight", [(f, h), (f, h)])
            yield of("mlp.experts.linear_fc2.weight", [(h, f)])

    def _fused_experts(self, layer: int) -> Iterator[Parameter]:
        a = self.architecture
        h, f, experts = a.hidden_size, a.expert_ffn_hidden_size, a.num_experts
        assert experts is not None and f is not None
        for name, shape in (
            ("linear_fc1.weight", (2 * f, h)),
            ("linear_fc1.bias", (2 * f,)),
            ("linear_fc2.weight", (h, f)),
            ("linear_fc2.bias", (h,)),
        ):
            own = f"mlp.experts.{name}"
            (source,) = self._bridge._weight_name_mapping_mcore_to_hf(f"{self._layer(layer)}.{own}")
            yield self._of_all_experts(own, layer, (source, (experts, *reversed(shape))), shape)

    def _of_all_experts(
        self, name: str, layer: int, source: tuple[str, Shape], shape: Shape
    ) -> Parameter:
        return Parameter(
            name=f"{self._layer(layer)}.{name}",
            places=tuple(self._places(name, layer, None)),
            leading=self._leading(layer, None),
            shape=(source[1][0], *shape),
            sources=(source,),
            of_all_experts=True,
        )

    def _norm_before_mlp(self, layer: int) -> Parameter:
        # Transformer Engine's specs store this norm under one name, the local spec under another:
        # both are written, so that both load.
        return self._parameter(
            "pre_mlp_layernorm.weight",
            [(self.architecture.hidden_size,)],
            layer,
            alias="mlp.linear_fc1.layer_norm_weight",
        )

    def _parameter(
        self,
        name: str,
        source_shapes: list[Shape],
        layer: int | None = None,
        expert: int | None = None,
        alias: str | None = None,
    ) -> Parameter:
        full = name if layer is None else f"{self._layer(layer)}.{name}"
        if expert is not None:
            full += str(expert)
        sources = self._bridge._weight_name_mapping_mcore_to_hf(full)
        rows = sum(shape[0] for shape in source_shapes)
        return Parameter(
            name=full,
            places=tuple(
                place for n in (name, alias) if n for place in self._places(n, layer, expert)
            ),
            also=(self._places(alias, layer, expert)[0][0],) if alias else (),
            leading=self._leading(layer, expert),
            shape=(rows, *source_shapes[0][1:]),
            sources=tuple(zip(sources, source_shapes, strict=True)),
            copies=tuple(copy for copy, of in self._copies.items() if [of] == sources),
        )

    def _layer(self, layer: int) -> str:
        """Megatron's name of a layer; those that predict further tokens are counted last."""
        mtp = layer - self.architecture.num_layers
        return f"decoder.layers.{layer}" if mtp < 0 else f"mtp.layers.{mtp}.transformer_layer"

    def _is_stacked(self, layer: int) -> bool:
        """Whether all layers are one tensor where they are stored."""
        return layer < self.architecture.num_layers and not self.architecture.mixed_layers

    def _leading(self, layer: int | None, expert: int | None) -> Shape:
        a = self.architecture
        layers = () if layer is None or not self._is_stacked(layer) else (a.num_layers,)
        return layers if expert is None else (*layers, a.num_experts or 0)

    def _places(self, name: str, layer: int | None, expert: int | None) -> list[tuple[str, Shape]]:
        """Where a checkpoint may have it: layers stacked, or each under its own key."""
        if layer is None:
            return [(name, ())]
        stored = name.replace("mlp.experts.", "mlp.experts.experts.")
        experts = () if expert is None else (expert,)
        stacked = (f"decoder.layers.{stored}", (layer, *experts))
        single = (f"{self._layer(layer)}.{stored}", experts)
        return [stacked, single] if self._is_stacked(layer) else [single]


_IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


def is_no_weight(name: str) -> bool:
    """Buffers that old checkpoints hold and every release computes anew."""
    return _IGNORED.fullmatch(name) is not None


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json writes it."""
    return str(dtype).removeprefix("torch.")

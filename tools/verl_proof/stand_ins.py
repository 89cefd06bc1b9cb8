"""What stands in, on the CPU, for what verl's Megatron engine has from a GPU.

Each is named, and is the same for both engines:

- the device: megatron_prefix's `enable_cpu_device`, and torch's questions for GPU memory;
- layers: Megatron's local spec for the Transformer Engine spec that mbridge asks for, with our
  norm, since torch's refuses sequence parallelism;
- core attention over a packed row: torch's, sequence by sequence, for Transformer Engine's;
- names of weights: those of Transformer Engine's layers for those of local layers, where mbridge
  looks them up;
- float32, which verl's configuration of its engine does not name;
- plain functions for the few that verl compiles, which takes a minute on the CPU.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch
import torch._dynamo
from mbridge.core.bridge import Bridge
from mbridge.core.llm_bridge import LLMBridge
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor
from verl.workers.config import McoreEngineConfig

from megatron_prefix.megatron.cpu_device import enable_cpu_device
from megatron_prefix.megatron.norms import PrefixTorchNorm


class PackedAttention(DotProductAttention):
    """Stands in for `TEDotProductAttention` over a packed row: causal, sequence by sequence."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """query [T, heads, dim], key and value [T, kv heads, dim] -> [T, heads * dim]."""
        assert packed_seq_params is not None and attention_bias is None
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        outputs = []
        for start, stop in itertools.pairwise(bounds):
            q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (query, key, value))
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs).flatten(1)


def _local_spec(self: LLMBridge, vp_stage: int | None = None) -> Any:
    """Stands in for `LLMBridge._get_transformer_layer_spec`."""
    self.has_vp_stage = True
    block = get_gpt_decoder_block_spec(
        self.config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
    )
    block.layer_norm = PrefixTorchNorm
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = PrefixTorchNorm
        layer.submodules.pre_mlp_layernorm = PrefixTorchNorm
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = PrefixTorchNorm
        attention.core_attention = PackedAttention
    return block


def _with_names_of_transformer_engine() -> None:
    """Let mbridge look local layers' weights up under the names that it knows."""
    to_hugging_face = Bridge._weight_name_mapping_mcore_to_hf
    to_global = Bridge._weight_name_mapping_mcore_local_to_global

    def mapped(self: Bridge, name: str) -> list[str]:
        name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
        if self.config.num_moe_experts is None:
            name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
        return to_hugging_face(self, name)

    def globally(self: Bridge, model: Any, consider_ep: bool = True) -> dict[str, str]:
        names = to_global(self, model, consider_ep)
        first = 0
        if consider_ep and self.config.num_moe_experts is not None:
            first = self.config.num_moe_experts // self.mpu.ep_size * self.mpu.ep_rank

        def of_expert(found: re.Match[str]) -> str:
            return f".experts.{found['layer']}.weight{first + int(found['expert'])}"

        local = r"\.experts\.local_experts\.(?P<expert>\d+)\.(?P<layer>\w+)\.weight$"
        return {key: re.sub(local, of_expert, name) for key, name in names.items()}

    Bridge._weight_name_mapping_mcore_to_hf = mapped
    Bridge._weight_name_mapping_mcore_local_to_global = globally


def _memory(*_: Any) -> tuple[int, int]:
    """Stands in for free and total memory of a GPU."""
    return 1 << 30, 1 << 30


def stand_in() -> None:
    """Put all of them in place, in this process."""
    enable_cpu_device(float64=False)
    torch.cuda.mem_get_info = _memory
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        setattr(torch.cuda, name, lambda *_: 0)
    torch._dynamo.config.disable = True
    LLMBridge._get_transformer_layer_spec = _local_spec
    _with_names_of_transformer_engine()


def float32(config: McoreEngineConfig) -> McoreEngineConfig:
    """verl's configuration of its engine in float32."""
    object.__setattr__(config, "dtype", "float32")
    return config

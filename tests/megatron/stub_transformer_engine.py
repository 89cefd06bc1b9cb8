"""STUBS of Megatron's wrappers of Transformer Engine's modules, which need a GPU.

They take the arguments that the wrappers take, hold the parameters that these hold, and compute
the same on the CPU, by torch. `StubProvider` stands in for Megatron's `TESpecProvider`, so that
Megatron itself puts them where its specs have Transformer Engine's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor


class StubTENorm:
    """`TENorm`: one name for both norms."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:
        return torch.nn.RMSNorm(hidden_size, eps=eps)


class StubTELayerNormColumnParallelLinear(ColumnParallelLinear):
    """`TELayerNormColumnParallelLinear`: an RMSNorm and a linear layer in one module."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Any,
        gather_output: bool,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        skip_weight_param_allocation: bool = False,
        tp_comm_buffer_name: str | None = None,
        tp_group: Any = None,
        stride: int = 1,
        name: str | None = None,
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            config=config,
            init_method=init_method,
            gather_output=gather_output,
            bias=bias,
            skip_bias_add=skip_bias_add,
            is_expert=is_expert,
            tp_group=tp_group,
        )
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))
        self.eps = config.layernorm_epsilon
        self.rows: list[int] = []
        """Of each forward call."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        self.rows.append(len(x))
        normed = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        return super().forward(normed)


class StubTEColumnParallelLinear(ColumnParallelLinear):
    """`TEColumnParallelLinear`."""


class StubTERowParallelLinear(RowParallelLinear):
    """`TERowParallelLinear`."""


class StubTEDotProductAttention(torch.nn.Module):
    """`TEDotProductAttention`, of ordinary batches; keeps what it was built with."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = "p2p",
        model_comm_pgs: Any = None,
        pg_collection: Any = None,
        num_splits: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.built_with = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        num_splits: int | None = None,
    ) -> Tensor:
        assert packed_seq_params is None and attn_mask_type == AttnMaskType.causal
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)


class StubProvider(LocalSpecProvider):
    """`TESpecProvider`, which names the stubs."""

    def column_parallel_linear(self) -> type:
        return StubTEColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return StubTERowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return StubTELayerNormColumnParallelLinear

    def layer_norm(self, *args: Any, **kwargs: Any) -> type:
        return StubTENorm

    def core_attention(self) -> type:
        return StubTEDotProductAttention

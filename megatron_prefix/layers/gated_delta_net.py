"""Gated delta net (Qwen3-Next, arXiv 2412.06464) over a packed row with shared prefixes.

`prefix_gated_delta_net(C)` is a subclass of Megatron's `GatedDeltaNet`, or of a subclass of it. Its
convolution reads each token's inputs along its own path, and the state behind a segment is handed
to all segments below it. Parameters, checkpoint keys and behaviour are those of C, until a batch
carries `PrefixPackedSeqParams`.

Under context parallelism a rank either gathers what ranks' pieces of a prompt make of the state,
or has the whole row for its share of the heads; see `comm_types`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor

from megatron_prefix.attention.comm_types import exchanges_heads
from megatron_prefix.attention.context_parallel.heads import from_packed_row
from megatron_prefix.attention.delta_rule import gated_delta_rule
from megatron_prefix.attention.row_recurrence import LayerPaths, layer_paths
from megatron_prefix.layers.head_shares import HeadShare, rows_of_share
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layers.subclass import prefix_subclass
from megatron_prefix.megatron.gated_delta_net import (
    build_without_flash_linear_attention,
    have_flash_linear_attention,
)
from megatron_prefix.megatron.options import refuse_unsupported

_L2_EPSILON = 1e-6
"""Of flash-linear-attention's `l2norm`, which Megatron's layer calls."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Heads:
    """Some of a tensor-parallel rank's heads, and their parameters."""

    num_keys: int
    """Key heads."""
    num_values: int
    """Value heads."""
    conv_weight: Tensor
    """[channels of q, k and v, width]"""
    conv_bias: Tensor | None
    """[channels]"""
    log_decay: Tensor
    """[value heads] A_log"""
    step_bias: Tensor
    """[value heads] dt_bias"""


class _PrefixGatedDeltaNet:
    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        refuse_unsupported(config)
        build_without_flash_linear_attention()
        # Of Megatron's layers only attention reads it; before 0.19 this one does not take it.
        kwargs.pop("cp_comm_type", None)
        super().__init__(config, *args, **kwargs)

    def _setup_variant_attrs(self) -> None:
        """Let Megatron (0.19 and newer) build the layer where its kernel is missing."""
        super()._setup_variant_attrs()
        if self.gated_delta_rule is None:
            self.gated_delta_rule = gated_delta_rule

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """See Megatron's `GatedDeltaNet.forward`; in a trimmed last layer, of some rows only."""
        if not isinstance(packed_seq_params, PrefixPackedSeqParams):
            self._refuse_ordinary_batches()
            return super().forward(
                hidden_states, attention_mask, *args, packed_seq_params=packed_seq_params, **kwargs
            )
        by_heads = exchanges_heads(self.config, self.layer_number)
        paths = layer_paths(packed_seq_params.recurrence, self.layer_number, by_heads=by_heads)
        out, gate = self._mix(hidden_states, paths)
        if packed_seq_params.query_rows is not None:
            out, gate = (x.index_select(0, packed_seq_params.query_rows) for x in (out, gate))
        normed = self._normed(out.flatten(0, 1)).view_as(out)
        wide = torch.promote_types(gate.dtype, torch.float32)
        gated = (normed * self.act_fn(gate.to(wide))).to(out.dtype)
        return self.out_proj(gated.flatten(1)[:, None])

    def _refuse_ordinary_batches(self) -> None:
        """Where Megatron's own forward would fail, or compute something else."""
        name, size = type(self).__mro__[2].__name__, self.config.context_parallel_size
        if size > 1 and not hasattr(self, "cp_size"):
            raise ValueError(
                f"context_parallel_size={size}: batches without PrefixPackedSeqParams need "
                f"megatron-core 0.18 or newer in {name}"
            )
        if not have_flash_linear_attention() and not self.config.deterministic_mode:
            raise ValueError(
                "batches without PrefixPackedSeqParams need flash-linear-attention in "
                f"{name}: pip install flash-linear-attention"
            )

    def _normed(self, x: Tensor) -> Tensor:
        """The norm of this rank's heads, whose weight all tensor-parallel ranks have.

        Under sequence parallelism Megatron adds up the ranks' gradients of such a weight; without,
        it does not, so backward does here.
        """
        if self.tp_size == 1 or self.config.sequence_parallel:
            return self.out_norm(x)
        parameters = {
            name: copy_to_tensor_model_parallel_region(parameter)
            for name, parameter in self.out_norm.named_parameters()
        }
        return torch.func.functional_call(self.out_norm, parameters, (x,))

    def _mix(self, hidden_states: Tensor, paths: LayerPaths) -> tuple[Tensor, Tensor]:
        """What each token reads from the state, and the gate of that, [T, value heads, V] both."""
        projected, _ = self.in_proj(hidden_states)
        heads = self.num_value_heads // self.tp_size
        values = self.v_dim // self.tp_size
        widths = [sum(self._channels()), values, heads, heads]
        qkv, gate, beta, alpha = projected[:, 0].split(widths, dim=-1)
        share = self._heads(HeadShare.of_paths(paths))
        if paths.whole_row is None:
            out = self._read(qkv, beta, alpha, share, paths)
        else:
            moved = rows_of_share([*qkv.split(self._channels(), dim=-1), beta, alpha], paths)
            of_heads = moved.split([len(share.conv_weight), share.num_values, share.num_values], -1)
            out = self._read(*of_heads, share, paths)
            out = from_packed_row(out.flatten(1), paths.whole_row, paths.exchange)
            out = out.unflatten(2, (-1, self.value_head_dim)).flatten(1, 2)
        return out, gate.unflatten(-1, (-1, self.value_head_dim))

    def _channels(self) -> list[int]:
        """Of q, k and v on this tensor-parallel rank."""
        return [size // self.tp_size for size in (self.qk_dim, self.qk_dim, self.v_dim)]

    def _heads(self, share: HeadShare) -> _Heads:
        bias, channels = self.conv1d.bias, self._channels()
        return _Heads(
            num_keys=self.num_key_heads // self.tp_size // share.number,
            num_values=self.num_value_heads // self.tp_size // share.number,
            conv_weight=share.of_parts(self.conv1d.weight[:, 0], channels),
            conv_bias=None if bias is None else share.of_parts(bias, channels),
            log_decay=share.of(self.A_log),
            step_bias=share.of(self.dt_bias),
        )

    def _read(
        self, qkv: Tensor, beta: Tensor, alpha: Tensor, heads: _Heads, paths: LayerPaths
    ) -> Tensor:
        """[T, value heads, V] what tokens read from the state.

        Args:
            qkv: [T, channels]
            beta, alpha: [T, value heads]
        """
        qkv = self.act_fn(paths.convolve(qkv, heads.conv_weight, heads.conv_bias))
        keys = heads.num_keys * self.key_head_dim
        q, k, v = qkv.split([keys, keys, heads.num_values * self.value_head_dim], dim=-1)
        q, k = (x.unflatten(-1, (-1, self.key_head_dim)) for x in (q, k))
        if self.use_qk_l2norm:
            q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _L2_EPSILON) for x in (q, k))
        q, k = (x.repeat_interleave(heads.num_values // heads.num_keys, dim=1) for x in (q, k))
        v = v.unflatten(-1, (-1, self.value_head_dim))
        wide = torch.promote_types(alpha.dtype, torch.float32)
        g = -heads.log_decay.exp() * F.softplus(alpha.to(wide) + heads.step_bias)
        return paths.apply(paths.delta_rule, q, k, v, g, beta.sigmoid())


def prefix_gated_delta_net(base: type) -> type:
    """The subclass of a Megatron gated delta net class that takes shared prefixes.

    A class that already does is returned as it is.
    """
    return prefix_subclass(_PrefixGatedDeltaNet, base)

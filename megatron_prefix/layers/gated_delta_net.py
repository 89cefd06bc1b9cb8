"""Gated delta net (Qwen3-Next, arXiv 2412.06464) over a packed row with shared prefixes.

`prefix_gated_delta_net(C)` is a subclass of Megatron's `GatedDeltaNet`, or of a subclass of it. Its
convolution reads each token's inputs along its own path, and the state behind a segment is handed
to all segments below it. Parameters, checkpoint keys and behaviour are those of C, until a batch
carries `PrefixPackedSeqParams`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor

from megatron_prefix.attention.delta_rule import causal_convolution, gated_delta_rule
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layers.subclass import prefix_subclass
from megatron_prefix.megatron.gated_delta_net import (
    build_without_flash_linear_attention,
    have_flash_linear_attention,
)
from megatron_prefix.megatron.options import refuse_unsupported

_L2_EPSILON = 1e-6
"""Of flash-linear-attention's `l2norm`, which Megatron's layer calls."""


class _PrefixGatedDeltaNet:
    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        refuse_unsupported(config)
        build_without_flash_linear_attention()
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
            if not have_flash_linear_attention() and not self.config.deterministic_mode:
                raise ValueError(
                    "batches without PrefixPackedSeqParams need flash-linear-attention in "
                    f"{type(self).__mro__[2].__name__}: pip install flash-linear-attention"
                )
            return super().forward(
                hidden_states, attention_mask, *args, packed_seq_params=packed_seq_params, **kwargs
            )
        if packed_seq_params.recurrence is None and packed_seq_params.sampled_states is None:
            raise ValueError(
                f"layer {self.layer_number} is recurrent, but the row was not planned for that: "
                "give the batch's AttentionSetup the model's recurrence_width, as "
                "AttentionSetup.of does"
            )
        out, gate = self._mix(hidden_states, packed_seq_params)
        if packed_seq_params.query_rows is not None:
            out, gate = (x.index_select(0, packed_seq_params.query_rows) for x in (out, gate))
        normed = self._normed(out.flatten(0, 1)).view_as(out)
        wide = torch.promote_types(gate.dtype, torch.float32)
        gated = (normed * self.act_fn(gate.to(wide))).to(out.dtype)
        return self.out_proj(gated.flatten(1)[:, None])

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

    def _mix(self, hidden_states: Tensor, params: PrefixPackedSeqParams) -> tuple[Tensor, Tensor]:
        """What each token reads from the state, and the gate of that, [T, value heads, V] both."""
        tensor, ratio = self.tp_size, self.num_value_heads // self.num_key_heads
        projected, _ = self.in_proj(hidden_states)
        heads = self.num_value_heads // tensor
        widths = [(2 * self.qk_dim + self.v_dim) // tensor, self.v_dim // tensor, heads, heads]
        qkv, gate, beta, alpha = projected[:, 0].split(widths, dim=-1)
        weight, bias, row = self.conv1d.weight[:, 0], self.conv1d.bias, params.recurrence
        sampled = params.sampled_states
        if sampled is None:
            qkv = causal_convolution(qkv, weight, bias, row)
        else:
            qkv = sampled.convolve(self.layer_number, qkv, weight, bias)
        qkv = self.act_fn(qkv)
        keys = self.qk_dim // tensor
        q, k, v = qkv.split([keys, keys, self.v_dim // tensor], dim=-1)
        q, k = (x.unflatten(-1, (-1, self.key_head_dim)) for x in (q, k))
        if self.use_qk_l2norm:
            q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _L2_EPSILON) for x in (q, k))
        q, k = (x.repeat_interleave(ratio, dim=1) for x in (q, k))
        v, gate = (x.unflatten(-1, (-1, self.value_head_dim)) for x in (v, gate))
        wide = torch.promote_types(alpha.dtype, torch.float32)
        g = -self.A_log.exp() * F.softplus(alpha.to(wide) + self.dt_bias)
        beta = beta.sigmoid()
        if sampled is None:
            return gated_delta_rule(q, k, v, g, beta, row), gate
        return sampled.delta_rule(self.layer_number, q, k, v, g, beta), gate


def prefix_gated_delta_net(base: type) -> type:
    """The subclass of a Megatron gated delta net class that takes shared prefixes.

    A class that already does is returned as it is.
    """
    return prefix_subclass(_PrefixGatedDeltaNet, base)

"""Mamba-2 (arXiv 2405.21060) over a packed row with shared prefixes.

`prefix_mamba_mixer(C)` is a subclass of Megatron's `MambaMixer`, or of a subclass of it, and
`prefix_mamba_layer(C)` one of the `MambaLayer` around it. The convolution reads each token's inputs
along its own path, and the state behind a segment is handed to all segments below it. Parameters,
checkpoint keys and behaviour are those of C, until a batch carries `PrefixPackedSeqParams`.

Under context parallelism a rank either gathers what ranks' pieces of a prompt make of the state,
or has the whole row for its share of the heads; see `comm_types`.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_prefix.attention.comm_types import exchanges_heads
from megatron_prefix.attention.context_parallel.heads import from_packed_row
from megatron_prefix.attention.layer_kinds import MAMBA_CONVOLUTION_WIDTH
from megatron_prefix.attention.row_recurrence import LayerPaths, layer_paths
from megatron_prefix.attention.state_space import StateSpaceRule
from megatron_prefix.layers.dropout import refuse_dropout
from megatron_prefix.layers.head_shares import HeadShare, rows_of_share
from megatron_prefix.layers.last_layer import Trimming, needed_rows
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layers.subclass import prefix_subclass
from megatron_prefix.megatron.borrowed import residual_through
from megatron_prefix.megatron.mamba import (
    build_without_mamba_ssm,
    gated_norm,
    have_mamba_ssm,
    widen,
)
from megatron_prefix.megatron.options import refuse_unsupported

_RULE = StateSpaceRule()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Heads:
    """Some of a tensor-parallel rank's heads, and their parameters."""

    num_groups: int
    """Of heads that share B and C."""
    conv_weight: Tensor
    """[channels of x, B and C, width]"""
    conv_bias: Tensor | None
    """[channels]"""
    log_decay: Tensor
    """[heads] A_log"""
    step_bias: Tensor
    """[heads] dt_bias"""
    skip: Tensor
    """[heads, 1 or V] D"""


class _PrefixMambaMixer:
    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        refuse_unsupported(config)
        build_without_mamba_ssm()
        super().__init__(config, *args, **kwargs)
        if self.d_conv > MAMBA_CONVOLUTION_WIDTH:
            raise ValueError(
                f"d_conv={self.d_conv}: rows are planned for convolutions of at most "
                f"{MAMBA_CONVOLUTION_WIDTH} inputs, as Megatron's specs have them"
            )
        widen(self)

    def forward(
        self,
        hidden_states: Tensor,
        inference_context: Any = None,
        *,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """See Megatron's `MambaMixer.forward`; in a trimmed last layer, of some rows only."""
        if not isinstance(packed_seq_params, PrefixPackedSeqParams):
            self._refuse_ordinary_batches()
            return super().forward(
                hidden_states, inference_context, packed_seq_params=packed_seq_params, **kwargs
            )
        by_heads = exchanges_heads(self.config, self.layer_number)
        paths = layer_paths(packed_seq_params.recurrence, self.layer_number, by_heads=by_heads)
        out, gate = self._mix(hidden_states, paths)
        if packed_seq_params.query_rows is not None:
            out, gate = (x.index_select(0, packed_seq_params.query_rows) for x in (out, gate))
        if self.rmsnorm:
            out = gated_norm(self.norm, out, gate)
        else:
            out = (out * F.silu(gate.to(out.dtype))).to(gate.dtype)
        return self.out_proj(out[:, None])

    def _refuse_ordinary_batches(self) -> None:
        """Where Megatron's own forward would fail."""
        if not have_mamba_ssm():
            raise ValueError(
                "batches without PrefixPackedSeqParams need mamba_ssm in "
                f"{type(self).__mro__[2].__name__}: pip install mamba-ssm"
            )

    def _mix(self, hidden_states: Tensor, paths: LayerPaths) -> tuple[Tensor, Tensor]:
        """What each token reads from the state and its own input, and the gate of that, [T, H V]
        both; the first in float32 or wider."""
        projected, _ = self.in_proj(hidden_states)
        channels = self._channels()
        widths = [self.d_inner_local_tp, sum(channels), self.nheads_local_tp]
        gate, xbc, dt = projected[:, 0].split(widths, dim=-1)
        share = self._heads(HeadShare.of_paths(paths))
        if paths.whole_row is None:
            return self._read(xbc, dt, share, paths), gate
        moved = rows_of_share([*xbc.split(channels, dim=-1), dt], paths)
        of_heads = moved.split([len(share.conv_weight), len(share.step_bias)], dim=-1)
        out = self._read(*of_heads, share, paths)
        return from_packed_row(out, paths.whole_row, paths.exchange).flatten(1), gate

    def _channels(self) -> list[int]:
        """Of x, B and C on this tensor-parallel rank."""
        of_groups = self.ngroups_local_tp * self.d_state
        return [self.d_inner_local_tp, of_groups, of_groups]

    def _heads(self, share: HeadShare) -> _Heads:
        weight, bias = self._convolution()
        return _Heads(
            num_groups=self.ngroups_local_tp // share.number,
            conv_weight=share.of_parts(weight[:, 0], self._channels()),
            conv_bias=None if bias is None else share.of_parts(bias, self._channels()),
            log_decay=share.of(self.A_log),
            step_bias=share.of(self.dt_bias),
            skip=share.of(self.D.unflatten(0, (self.nheads_local_tp, -1))),
        )

    def _convolution(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias: parameters of the mixer since 0.19, of a module of it before."""
        if hasattr(self, "conv1d"):
            return self.conv1d.weight, self.conv1d.bias
        return self.conv1d_weight, self.conv1d_bias

    def _read(self, xbc: Tensor, dt: Tensor, heads: _Heads, paths: LayerPaths) -> Tensor:
        """[T, H V] what tokens read from the state and their own input, in float32 or wider.

        Args:
            xbc: [T, channels]
            dt: [T, H]
        """
        xbc = self.act(paths.convolve(xbc, heads.conv_weight, heads.conv_bias))
        of_groups = heads.num_groups * self.d_state
        x, b, c = xbc.split([xbc.shape[1] - 2 * of_groups, of_groups, of_groups], dim=-1)
        x = x.unflatten(-1, (-1, self.headdim))
        b, c = (y.unflatten(-1, (heads.num_groups, -1)) for y in (b, c))
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + heads.step_bias.to(wide))
        g = -heads.log_decay.to(wide).exp() * dt
        out = paths.apply(_RULE, c, b, x, g, dt).to(wide)
        return (out + heads.skip.to(wide) * x).flatten(1)


def prefix_mamba_mixer(base: type) -> type:
    """The subclass of a Megatron Mamba mixer class that takes shared prefixes.

    A class that already does is returned as it is.
    """
    return prefix_subclass(_PrefixMambaMixer, base)


class _PrefixMambaLayer:
    prefix_trimming: Trimming = "before"
    """See `_PrefixTransformerLayer`."""
    prefix_dropout_refused = False
    """Whether this layer was searched for dropout, which may come in after it was built."""

    def forward(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> Tensor:
        """See Megatron's `MambaLayer.forward`."""
        context: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if isinstance(packed_seq_params, PrefixPackedSeqParams):
            if self.training and not self.prefix_dropout_refused:
                refuse_dropout(self, f"layer {self.layer_number}")
                self.prefix_dropout_refused = True
            if self.prefix_trimming == "here" and packed_seq_params.last_layer is not None:
                packed_seq_params = packed_seq_params.last_layer
                change = functools.partial(
                    needed_rows, params=packed_seq_params, config=self.config
                )
                context = residual_through(self, change, adding="mamba_bda")
        with context:
            return super().forward(
                hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs
            )


def prefix_mamba_layer(base: type) -> type:
    """The subclass of a Megatron Mamba layer class that can be a trimmed last layer.

    A class that already is one is returned as it is.
    """
    return prefix_subclass(_PrefixMambaLayer, base)

"""The attention of one row in every layer: what is fixed for a model, for a batch, and for a layer.

`AttentionSetup` is made once for a model, `RowAttention` for every batch, `AttentionLayer` for
every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.attention.comm_types import model_comm_types
from megatron_prefix.attention.context_parallel import attend_across_ranks
from megatron_prefix.attention.context_parallel.latents import LatentKeys
from megatron_prefix.attention.context_parallel.layer import RankLayer
from megatron_prefix.attention.delta_rules import DeltaRule, TorchRule, select_delta_rule
from megatron_prefix.attention.exchange import Exchange
from megatron_prefix.attention.function import prefix_attention
from megatron_prefix.attention.kernels import Kernel, select_kernel
from megatron_prefix.attention.layer_kinds import convolution_widths, has_delta_nets
from megatron_prefix.attention.root_keys import RootKeys
from megatron_prefix.attention.stage_compute import StageCompute
from megatron_prefix.attention.windows import model_window
from megatron_prefix.layout import CommType, RowStages


@dataclass(frozen=True, kw_only=True)
class AttentionSetup:
    """What the attention of all batches of a model has in common."""

    device: torch.device
    """Of the model."""
    kernel: Kernel
    """What computes attention, from `select_kernel`."""
    deterministic: bool = False
    """The same batch gives the same gradients of attention, to the bit. The kernel must have been
    selected for it."""
    context_parallel_group: dist.ProcessGroup | None = None
    """The ranks that each row is distributed over; None, or a group of one, for whole rows."""
    comm_types: tuple[CommType, ...] = ("all_gather",)
    """How the model's layers communicate over that group."""
    window: int | None = None
    """Keys before its own that a query sees in the layers with a sliding window; None: the model
    has no such layer."""
    recurrence_width: int | None = None
    """Inputs that the convolution of recurrent layers reads, at most; None: the model has no such
    layer."""
    delta_rule: DeltaRule = field(default_factory=TorchRule)
    """What computes the delta rule of gated delta nets, from `select_delta_rule`."""
    mrope: bool = False
    """The model has mRoPE: each token has three positions."""

    @classmethod
    def of(
        cls,
        config: Any,
        device: torch.device,
        *,
        kernel: str | None = None,
        delta_rule: str | None = None,
        deterministic: bool = False,
        context_parallel_group: dist.ProcessGroup | None = None,
    ) -> AttentionSetup:
        """The setup of a model.

        Args:
            config: Megatron's `TransformerConfig`.
            kernel: attention kernel by name; None takes the best for the device.
            delta_rule: what computes gated delta nets, by name; None takes the best likewise.
            device, deterministic, context_parallel_group: see the fields.

        Raises:
            ValueError: the kernel cannot compute what the config asks for, see `select_kernel` and
                `select_delta_rule`.
        """
        return cls(
            device=device,
            kernel=kernel_of_model(config, device, kernel, deterministic=deterministic),
            deterministic=deterministic,
            context_parallel_group=context_parallel_group,
            comm_types=model_comm_types(config),
            window=model_window(config),
            recurrence_width=recurrence_width(config),
            delta_rule=delta_rule_of_model(config, device, delta_rule, deterministic=deterministic),
            mrope=has_mrope(config),
        )

    @property
    def num_ranks(self) -> int:
        """Context-parallel ranks."""
        group = self.context_parallel_group
        return 1 if group is None else dist.get_world_size(group)

    @property
    def rank(self) -> int:
        """Of this process among them."""
        group = self.context_parallel_group
        return 0 if group is None else dist.get_rank(group)


def has_mrope(config: Any) -> bool:
    """Whether a model with Megatron's config `config` has mRoPE."""
    return config.mrope_section is not None


def recurrence_width(config: Any) -> int | None:
    """See `AttentionSetup`, of a model with Megatron's config `config`."""
    return max(convolution_widths(config), default=None)


def attention_dtype(config: Any) -> torch.dtype:
    """Of q, k and v in a model with Megatron's config `config`."""
    if config.bf16 or config.fp16:
        return torch.bfloat16 if config.bf16 else torch.float16
    return config.params_dtype


def head_dim(config: Any) -> int:
    """The size of the heads that a kernel is given in a model with Megatron's config `config`.

    Values of multi-latent attention may be smaller than its keys, whose size it is.
    """
    if config.multi_latent_attention:
        return config.qk_head_dim + config.qk_pos_emb_head_dim
    return config.kv_channels


def kernel_of_model(
    config: Any, device: torch.device, name: str | None, *, deterministic: bool = False
) -> Kernel:
    """The kernel called `name`, or the best one, for a model with Megatron's config `config`."""
    return select_kernel(
        name,
        device=device,
        dtype=attention_dtype(config),
        head_dim=head_dim(config),
        deterministic=deterministic,
        windows=model_window(config) is not None,
    )


def delta_rule_of_model(
    config: Any, device: torch.device, name: str | None, *, deterministic: bool = False
) -> DeltaRule:
    """The delta rule called `name`, or the best one, for a model with Megatron's config `config`.

    Models without gated delta nets, which compute none, have that of torch.
    """
    if not has_delta_nets(config):
        return TorchRule()
    return select_delta_rule(
        name,
        device=device,
        dtype=attention_dtype(config),
        key_dim=config.linear_key_head_dim,
        deterministic=deterministic,
    )


@dataclass(frozen=True, kw_only=True)
class AttentionLayer:
    """A layer, as its attention needs to know it."""

    number: int
    """In the whole model, from 1."""
    scale: float
    """Factor of q k^T before the softmax."""
    comm_type: CommType
    """Its kind of context-parallel communication."""
    window: int | None = None
    """Keys before its own that a query sees; None: all. The model's window, or none."""
    sink: Tensor | None = None
    """[H] the score of one more key of each query head, whose value is zero; None: no such key."""
    latents: LatentKeys | None = None
    """What keys and values are expanded from, where they can travel as latents."""


class CoreAttention(Protocol):
    """The attention of a batch in any layer."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        """The core attention of one layer.

        Args:
            q: [T, heads, dim], or [N, heads, dim] in a trimmed last layer, rotated; k: [T, kv
                heads, dim], rotated; v: [T, kv heads, value dim].

        Returns:
            [T or N, heads, value dim] in q's dtype.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class RowAttention:
    """`CoreAttention` of a packed row, or of this rank's part of it."""

    stages: RowStages[Tensor]
    kernel: Kernel
    deterministic: bool
    exchange: Exchange | None
    """With the ranks that the row is distributed over; None: all of it is here."""
    window: int | None = None
    """That the stages of layers with a sliding window were planned for."""
    root: RootKeys | None = None
    """Of a series of rows: what its first row keeps and the later rows attend to."""
    keeps_root: bool = False
    """Whether this is the first row of its series: the root alone."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        """See `CoreAttention`. Collective where the row is distributed."""
        if layer.window is not None and layer.window != self.window:
            raise ValueError(
                f"layer {layer.number} has a sliding window of {layer.window} keys before a query, "
                f"but the row was planned for {self.window}: give the batch's AttentionSetup the "
                "model's window, as AttentionSetup.of does"
            )
        if self.exchange is None:
            of_root = None
            if self.root is not None and self.keeps_root:
                k, v = self.root.keep(layer.number, k, v)
            elif self.root is not None:
                of_root = self.root.of_layer(layer.number)
            return prefix_attention(
                q,
                k,
                v,
                self.stages,
                scale=layer.scale,
                kernel=self.kernel,
                deterministic=self.deterministic,
                root=of_root,
                windowed=layer.window is not None,
                sink=layer.sink,
            )
        of_rank = RankLayer(
            number=layer.number,
            stages=self.stages,
            compute=StageCompute(self.kernel, layer.scale, self.deterministic),
            exchange=self.exchange,
        )
        return attend_across_ranks(
            q,
            k,
            v,
            of_rank,
            layer.comm_type,
            windowed=layer.window is not None,
            sink=layer.sink,
            latents=layer.latents,
        )

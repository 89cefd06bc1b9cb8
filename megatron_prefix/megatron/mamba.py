"""Megatron's Mamba-2 layer (0.18 and newer), also where mamba_ssm is not installed."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_prefix.attention.layer_kinds import hybrid_layers
from megatron_prefix.layout.hybrid_pattern import MAMBA

try:
    # Before 0.18 there is no model around it that takes shared prefixes.
    import megatron.core.models.hybrid  # noqa: F401
    from megatron.core.ssm import mamba_mixer
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
except ImportError:
    MambaLayer = MambaMixer = None


def is_mamba_mixer(module: Any) -> bool:
    """Whether a class is Megatron's Mamba-2 mixer, in a release whose layers share prefixes."""
    return MambaMixer is not None and isinstance(module, type) and issubclass(module, MambaMixer)


def is_mamba_layer(module: Any) -> bool:
    """Whether a class is the layer around such a mixer."""
    return MambaLayer is not None and isinstance(module, type) and issubclass(module, MambaLayer)


def mamba_layers(config: Any) -> tuple[bool, ...]:
    """[num_layers] whether each layer is a Mamba-2 layer; () if none is.

    Args:
        config: Megatron's `TransformerConfig`.
    """
    found = tuple(kind == MAMBA for kind in hybrid_layers(config))
    return found if any(found) else ()


def mamba_heads(config: Any) -> int:
    """Heads of a Mamba-2 layer: of `mamba_num_heads`, or as many as twice the hidden size holds.

    Args:
        config: Megatron's `TransformerConfig`.
    """
    return config.mamba_num_heads or 2 * config.hidden_size // config.mamba_head_dim


class GatedRMSNorm(torch.nn.Module):
    """The norm of mamba_ssm that Megatron's mixer has, with the same weight and checkpoint key."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.group_size = hidden_size if group_size is None else group_size
        self.norm_before_gate = norm_before_gate
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """See `gated_norm`."""
        assert not self.norm_before_gate
        return gated_norm(self, x, z)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As Megatron describes the norm of mamba_ssm: the weight is split over tensor ranks."""
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )


def gated_norm(norm: Any, x: Tensor, z: Tensor | None) -> Tensor:
    """[..., d] x silu(z), of which each group of channels has its root mean square divided out,
    times the weight, in x's dtype.

    Args:
        norm: of mamba_ssm, or a `GatedRMSNorm`.
        x: [..., d] in float32 or wider, or rounded.
        z: [..., d]; None: x is not gated.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    gated = x.to(wide) if z is None else x.to(wide) * F.silu(z.to(wide))
    groups = gated.unflatten(-1, (-1, norm.group_size))
    scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + norm.eps)
    return ((groups * scale).flatten(-2) * norm.weight).to(norm.weight.dtype)


def build_without_mamba_ssm() -> None:
    """Let `MambaMixer` be built where mamba_ssm is missing, which it runs with.

    Ours runs batches with `PrefixPackedSeqParams` without it.
    """
    if not mamba_mixer.HAVE_MAMBA_SSM:
        mamba_mixer.HAVE_MAMBA_SSM = True
        mamba_mixer.ExtendedRMSNorm = GatedRMSNorm


def have_mamba_ssm() -> bool:
    """Whether Megatron found mamba_ssm."""
    return getattr(mamba_mixer, "mamba_split_conv1d_scan_combined", None) is not None


def widen(mixer: Any) -> None:
    """Hold a mixer's parameters that Megatron keeps in float32 in the model's dtype if it is wider,
    as a proof of equality in float64 needs them."""
    for parameter in (mixer.A_log, mixer.D):
        parameter.data = parameter.to(
            torch.promote_types(parameter.dtype, mixer.config.params_dtype)
        ).detach()


def local_mamba_layer(layer: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    """A Mamba-2 layer of Megatron's local linear layers and norm.

    Args:
        layer: Megatron's local layer spec, of which the norm and the linear layers are taken.
        config: of the model.
    """
    attention = layer.submodules.self_attention.submodules
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            # 0.18 gives a norm no epsilon.
            norm=functools.partial(layer.submodules.input_layernorm, eps=config.layernorm_epsilon),
            mixer=ModuleSpec(
                module=MambaMixer,
                submodules=MambaMixerSubmodules(
                    in_proj=attention.linear_qkv, out_proj=attention.linear_proj
                ),
            ),
            mamba_bda=layer.submodules.self_attn_bda,
            # As Transformer Engine's layer, which holds the norm too, stores it.
            sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
        ),
    )

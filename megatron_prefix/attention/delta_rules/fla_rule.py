"""The gated delta rule by flash-linear-attention's kernels: a call for each level of a row.

A level's runs are the sequences of one variable-length call, each of which begins with the state
behind the run that it goes on from. For a group of rollouts these are two calls: its prompt, and
all of its responses.

Only the public function is called, `fla.ops.gated_delta_rule.chunk_gated_delta_rule`. Signatures
were read in flash-linear-attention 0.2.0 to 0.3.1 and in fla-core 0.3.2 to 0.6.0. What it keeps for
its own backward, a state for each child among it, lives as long as one layer's backward only.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_prefix.attention.delta_rules.base import RuleInputs
from megatron_prefix.layout import Recurrence
from megatron_prefix.layout.stages import RunLevel

_NEEDED = ("q", "k", "v", "g", "beta", "initial_state", "output_final_state", "cu_seqlens")
_HOST_BOUNDS = "cu_seqlens_cpu"
"""Since 0.4.2: with it the host does not wait for `cu_seqlens`."""
_MAX_KEY_DIM = 256


class FlashLinearAttentionRule:
    """`DeltaRule` on a GPU, where the package is installed."""

    name = "flash_linear_attention"

    def unsupported(self, inputs: RuleInputs) -> str | None:
        """See `DeltaRule.unsupported`."""
        if inputs.device.type != "cuda":
            return "it needs a GPU"
        if inputs.dtype not in (torch.bfloat16, torch.float16):
            return "it takes bfloat16 and float16"
        if inputs.key_dim > _MAX_KEY_DIM:
            return f"its keys have at most {_MAX_KEY_DIM} channels, not {inputs.key_dim}"
        if inputs.deterministic:
            return "it picks the sizes of its blocks by their time, so two runs may differ"
        found = _function()
        return found if isinstance(found, str) else _unsupported_compiler(inputs.device)

    def of(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, row: Recurrence[Tensor]
    ) -> _Levels:
        """See `DeltaRule.of`."""
        tokens = row.runs.tokens
        return _Levels(q=q[tokens], k=k[tokens], v=v[tokens], g=g[tokens], beta=beta[tokens])


@functools.cache
def _function() -> Callable[..., tuple[Tensor, Tensor]] | str:
    """The package's function, or why there is none, as the end of a sentence."""
    try:
        function = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] == "fla":
            return "the package flash-linear-attention is not installed"
        return f"importing flash-linear-attention fails with ModuleNotFoundError: {error}"
    except Exception as error:  # built for another torch or triton, no driver, ...
        return f"importing flash-linear-attention fails with {type(error).__name__}: {error}"
    missing = [name for name in _NEEDED if name not in inspect.signature(function).parameters]
    if missing:
        return (
            "this release of flash-linear-attention is not known: its chunk_gated_delta_rule has "
            f"no argument {missing[0]!r}"
        )
    return function


def _unsupported_compiler(device: torch.device) -> str | None:
    """What newer releases of the package raise in their first backward (its issue 640)."""
    if torch.cuda.get_device_capability(device)[0] != 9 or importlib.util.find_spec("tilelang"):
        return None
    triton = tuple(int(n) for n in re.findall(r"\d+", version("triton"))[:3])
    if not (3, 4, 0) <= triton < (3, 7, 1):
        return None
    return (
        f"Triton {'.'.join(map(str, triton))} compiles its backward wrongly on Hopper GPUs; "
        "install Triton 3.7.1 or newer, or tilelang"
    )


@functools.cache
def _takes_host_bounds() -> bool:
    return _HOST_BOUNDS in inspect.signature(_function()).parameters


@functools.lru_cache(maxsize=256)  # the package recognises bounds by the tensor, in every layer
def _on_host(bounds: tuple[int, ...]) -> Tensor:
    return torch.tensor(bounds)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Levels:
    """`ComputedRule`: the inputs of a row's tokens, level after level."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor

    def read(self, row: Recurrence[Tensor], begins: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """See `ComputedRule.read`."""
        runs = row.runs
        heads, keys, values = *self.k.shape[1:], self.v.shape[2]
        state = ends = self.k.new_zeros(0, heads, keys, values, dtype=torch.float32)
        outs = [self.v[:0]]
        if begins is not None and len(begins):
            state = torch.cat((begins, begins.new_zeros(1, *begins.shape[1:])))
        sizes = [level.bounds[-1] for level in runs.levels]
        parts = zip(*(x.split(sizes) for x in self._inputs), strict=True)
        for number, (level, inputs) in enumerate(zip(runs.levels, parts, strict=True)):
            initial = state[level.before] if len(state) else None
            out, state = _call(*inputs, level, initial)
            outs.append(out)
            if number == 0:
                ends = state[: runs.pieces]
        # One row more, of zeros, for padding.
        out = F.pad(torch.cat(outs), (0, 0, 0, 0, 0, 1))[runs.place]
        return out, ends, state[-1] if sizes else state.sum(0)

    @torch.no_grad()
    def maps(self, row: Recurrence[Tensor], *, added: bool) -> Tensor:
        """See `ComputedRule.maps`: columns of the state that begin as the identity become the
        factor, and those that begin as zeros what is added."""
        runs = row.runs
        keys, values = self.k.shape[2], self.v.shape[2] if added else 0
        if not runs.pieces:
            return self.k.new_zeros(0, self.k.shape[1], keys, keys + values, dtype=torch.float32)
        bounds = runs.levels[0].bounds[: runs.pieces + 1]
        level = RunLevel(
            bounds=bounds,
            cu_seqlens=runs.levels[0].cu_seqlens[: runs.pieces + 1],
            before=runs.levels[0].before,
        )
        q, k, v, g, beta = (x[: bounds[-1]] for x in self._inputs)
        identity = torch.eye(keys, device=k.device)
        identity = F.pad(identity, (0, values)).expand(runs.pieces, k.shape[1], -1, -1)
        v = F.pad(v[..., :values], (keys, 0))
        return _call(q, k, v, g, beta, level, identity)[1]

    @property
    def _inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v, self.g, self.beta


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    level: RunLevel[Tensor],
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """[n, H, V] outputs of a level's tokens, and [runs, H, K, V] the states behind its runs."""
    host_bounds = {_HOST_BOUNDS: _on_host(level.bounds)} if _takes_host_bounds() else {}
    out, final = _function()(
        q=q[None].contiguous(),
        k=k[None].contiguous(),
        v=v[None].contiguous(),
        g=g[None].float().contiguous(),
        beta=beta[None].contiguous(),
        scale=q.shape[-1] ** -0.5,
        initial_state=None if initial is None else initial.float().contiguous(),
        output_final_state=True,
        cu_seqlens=level.cu_seqlens,
        **host_bounds,
    )
    return out[0], final

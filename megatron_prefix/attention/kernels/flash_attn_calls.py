"""The private calls of the flash-attn packages that return and take the lse: names and arguments.

Three packages, which install side by side:

    flash-attn    2.x   flash_attn.flash_attn_interface
    flash_attn_3  3.x   flash_attn_interface (built from the hopper folder of the sources)
    flash-attn-4  4.x   flash_attn.cute.interface

None of these calls is public, and their arguments differ between releases. So a call is bound to
the function's own signature: what it needs has to be there, what it asks for beyond that has to be
known here. Otherwise the package counts as unsupported, and the reason names the argument.
Signatures were read in flash-attn 2.7.4.post1 and 2.8.3, in the hopper sources from January 2025 to
August 2026, and in flash-attn-4 4.0.0b5, b14 and b36; `tests/attention/test_flash_attn_calls.py`
holds them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Parameters = Mapping[str, bool]
"""A function's parameters: whether each has a default."""

_TENSORS = ("q", "k", "v")
_GEOMETRY = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale")
_GRADIENTS = ("dq", "dk", "dv")
WINDOW = ("window_size_left", "window_size_right")
"""What a call with a sliding window has in addition."""


class UnknownSignatureError(Exception):
    """A function that cannot be called as we know it; the message is the end of a sentence."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a function is called with."""

    function: str
    needed: tuple[str, ...]
    """Our names of what differs from call to call."""
    other_names: Mapping[str, str] = field(default_factory=dict)
    """Of some of these: what another release calls them."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that are the same unless they are given, where the function has them."""
    marks: tuple[str, ...] = ()
    """Of the constants: without these the release is too old."""

    def bind(self, parameters: Parameters) -> tuple[dict[str, str], dict[str, Any]]:
        """The function's own names of `needed`, and the constants that it takes.

        Raises:
            UnknownSignatureError: an argument that is missing there, or not known here.
        """
        names = {}
        for name in self.needed:
            other = self.other_names.get(name, name)
            if name not in parameters and other not in parameters:
                raise UnknownSignatureError(f"its {self.function} has no argument {name!r}")
            names[name] = name if name in parameters else other
        for name in self.marks:
            if name not in parameters:
                raise UnknownSignatureError(f"its {self.function} has no argument {name!r}")
        for name, has_default in parameters.items():
            if not has_default and name not in names.values() and name not in self.constants:
                raise UnknownSignatureError(f"its {self.function} asks for {name!r}")
        constants = {k: v for k, v in self.constants.items() if k in parameters}
        return names, constants

    def bound_to(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, taking our names as keywords, and others by its own."""
        names, constants = self.bind(parameters_of(function))

        def call(**values: Any) -> Any:
            return function(**constants | {names.get(k, k): v for k, v in values.items()})

        return call


@dataclass(frozen=True, kw_only=True, eq=False)
class Package:
    """One package: where its calls are and what they are called with. Equal only to itself."""

    name: str
    """As it is installed."""
    module: str
    forward: Call
    """Returns out, lse [H, tq], and more."""
    backward: Call
    """Writes into dq, dk and dv."""


@dataclass(frozen=True, kw_only=True)
class BoundPackage:
    """The calls of a package that is installed, by our names."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    windows: bool
    """Whether both take `WINDOW`."""


_PLAIN_ATTENTION: dict[str, object] = {
    "dropout_p": 0.0,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}
"""FlashAttention 2 without dropout, window, soft cap or biases."""

FLASH_ATTN_2 = Package(
    name="flash-attn",
    module="flash_attn.flash_attn_interface",
    forward=Call(
        function="_flash_attn_varlen_forward",
        needed=(*_TENSORS, *_GEOMETRY, "causal"),
        constants={**_PLAIN_ATTENTION, "return_softmax": False},
        # Since 2.7, which also returns (out, lse, ...) and an lse without padding.
        marks=("window_size_left",),
    ),
    backward=Call(
        function="_flash_attn_varlen_backward",
        needed=(
            *("dout", *_TENSORS, "out", "softmax_lse", *_GRADIENTS, *_GEOMETRY),
            *("causal", "deterministic"),
        ),
        constants=_PLAIN_ATTENTION,
        marks=("window_size_left",),
    ),
)

FLASH_ATTN_3 = Package(
    name="flash_attn_3",
    module="flash_attn_interface",
    forward=Call(
        function="_flash_attn_forward",
        needed=(*_TENSORS, *_GEOMETRY, "causal"),
        constants=dict.fromkeys(
            (
                *("k_new", "v_new", "qv", "out", "out_", "cu_seqlens_k_new", "seqused_q"),
                *("seqused_k", "page_table", "kv_batch_idx", "leftpad_k", "rotary_cos"),
                *("rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale"),
            )
        ),
    ),
    backward=Call(
        function="_flash_attn_backward",
        needed=(
            *("dout", *_TENSORS, "out", "softmax_lse", *_GRADIENTS, *_GEOMETRY),
            *("causal", "deterministic"),
        ),
        other_names={"causal": "is_causal"},
        constants={"sequed_q": None, "sequed_k": None},
    ),
)

FLASH_ATTN_4 = Package(
    name="flash-attn-4",
    module="flash_attn.cute.interface",
    forward=Call(
        function="_flash_attn_fwd",
        needed=(*_TENSORS, *_GEOMETRY, "causal"),
        constants={"return_lse": True},
        marks=("return_lse",),
    ),
    backward=Call(
        function="_flash_attn_bwd",
        needed=(
            *(*_TENSORS, "out", "dout", "lse", *_GRADIENTS, *_GEOMETRY),
            *("causal", "deterministic"),
        ),
    ),
)


def parameters_of(function: Callable[..., Any]) -> dict[str, bool]:
    """A function's parameters in order; also those of a `torch.library.custom_op`."""
    if isinstance(function, torch.library.CustomOpDef):
        arguments = function._opoverload._schema.arguments
        return {argument.name: argument.has_default_value() for argument in arguments}
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default is not inspect.Parameter.empty for p in parameters}


@functools.cache
def load(package: Package) -> BoundPackage | str:
    """The package's calls, or why there are none, as the end of a sentence."""
    windows = True
    try:
        module = importlib.import_module(package.module)
    except ModuleNotFoundError as error:
        if f"{package.module}.".startswith(f"{error.name}."):
            return f"the package {package.name} is not installed"
        return f"importing {package.name} fails with ModuleNotFoundError: {error}"
    except Exception as error:  # extensions built for another torch, missing libraries, ...
        return f"importing {package.name} fails with {type(error).__name__}: {error}"
    calls = []
    for call in (package.forward, package.backward):
        function = getattr(module, call.function, None)
        if function is None:
            return f"this release of {package.name} has no {package.module}.{call.function}"
        try:
            calls.append(call.bound_to(function))
        except UnknownSignatureError as error:
            return f"this release of {package.name} is not known: {error}"
        windows &= set(WINDOW) <= set(parameters_of(function))
    return BoundPackage(forward=calls[0], backward=calls[1], windows=windows)
